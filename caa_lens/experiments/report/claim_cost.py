"""Claim 8: what a steered forward pass costs, with hooks and with the vector baked into the weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import pandas as pd
import torch

from caa_lens.baking import bake
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.section import Section
from caa_lens.hooks import template_for
from caa_lens.models import Model, device_of, tokenizer_of
from caa_lens.positions import known_prompts
from caa_lens.steering import generate, steer
from caa_lens.vector import SteeringVector

REPEATS, NEW_TOKENS = 5, 24
SAME, SAME_IN_HALF = 1e-3, 0.25
"""How far baked and hooked logits may lie apart and count as equal, as a share of what the vector changes (root mean squares). In
half precision, adding inside a matrix product and behind it round differently at every token."""


@torch.no_grad()
def zero_cost(lab: Lab) -> Section:
    """A baked vector gives the logits of one added by hooks at all positions, and costs no time; of the first behaviour."""
    behaviour = lab.study.behaviours[0]
    model, v = lab.model, lab.vector(behaviour)
    baked, prompts = bake(model, v), lab.prompts(behaviour, 4)
    worst, share = _apart(model, baked, v, prompts)

    def hooked() -> None:
        with steer(model, v, positions="all"):
            generate(model, prompts, max_new_tokens=NEW_TOKENS)

    seconds = _medians(
        {
            "unsteered": lambda: generate(model, prompts, max_new_tokens=NEW_TOKENS),
            "hooks": hooked,
            "baked": lambda: generate(baked, prompts, max_new_tokens=NEW_TOKENS),
        }
    )
    table = pd.DataFrame(
        [
            {"model": name, "seconds": taken, "over_unsteered": taken / seconds["unsteered"] - 1}
            for name, taken in seconds.items()
        ]
    )
    dtype = next(model.parameters()).dtype
    same = share < (SAME if torch.finfo(dtype).bits >= 32 else SAME_IN_HALF)
    cost = seconds["baked"] / seconds["unsteered"] - 1
    words = (
        f"The logits of the baked and of the hooked model differ by at most {worst:.1e}, in root mean square by {share:.1g} of "
        f"what the vector changes ({str(dtype).removeprefix('torch.')}).\n"
        f"Generating {NEW_TOKENS} tokens for {len(prompts)} prompts takes {cost:+.1%} with the baked vector and "
        f"{seconds['hooks'] / seconds['unsteered'] - 1:+.1%} with hooks, against the unsteered model (medians of {REPEATS})."
    )
    return Section(
        "holds" if same else "opposite",
        words,
        {"generation_seconds": table},
        notes=(
            "The status is of the equality; seconds are of the machine that ran the study, and answers may end early.",
        ),
    )


def _apart(model: Model, baked: Model, v: SteeringVector, prompts: Sequence[str]) -> tuple[float, float]:
    """The largest difference of baked and hooked logits, and the root mean square one over that of the vector's own effect."""
    differences, effects = [], []
    for prompt in prompts:
        encoded = template_for(model, None).encode(tokenizer_of(model), prompt)
        tokens = torch.tensor([encoded.ids], device=device_of(model))
        with known_prompts([encoded.instruction_end]), steer(model, v, positions="all"):
            steered = model(tokens).float()
        differences.append((baked(tokens).float() - steered).flatten())
        effects.append((model(tokens).float() - steered).flatten())
    apart = torch.cat(differences)
    return float(apart.abs().max()), float(apart.norm() / torch.cat(effects).norm())


def _medians(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(REPEATS + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number:  # the first turn warms up
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
