"""Claims 5 and 8: what steering costs, in what the model still can and in what a forward pass takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import pandas as pd
import torch

from caa_lens.baking import bake
from caa_lens.experiments.capability import CapabilityResult, capability, text_loss
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.section import Section, Status
from caa_lens.hooks import template_for
from caa_lens.models import Model, device_of, tokenizer_of
from caa_lens.pairs import PairSet
from caa_lens.positions import known_prompts
from caa_lens.sources import load_pairs
from caa_lens.steering import generate, steer
from caa_lens.vector import SteeringVector

REPEATS, NEW_TOKENS = 5, 24
SAME, SAME_IN_HALF = 1e-3, 0.25
"""How far baked and hooked logits may lie apart and count as equal, as a share of what the vector changes (root mean squares). In
half precision, adding inside a matrix product and behind it round differently at every token."""


def capabilities(lab: Lab, behaviour: str) -> Section:
    """Accuracy on two-choice questions and loss on plain text at -1 and +1, beside controls of the same norm."""
    results = [
        capability(
            lab.model,
            questions,
            lab.vector(behaviour),
            controls=1,
            seed=lab.study.seed,
            batch_size=lab.study.batch_size,
            store=lab.work("capability", behaviour, questions.name),
            progress=lab.progress,
        )
        for questions in _questions(lab)
    ]
    results.append(
        text_loss(
            lab.model,
            _prose(),
            lab.vector(behaviour),
            controls=1,
            window=64,
            seed=lab.study.seed,
            store=lab.work("loss", behaviour),
            progress=lab.progress,
        )
    )
    names = [str(result.provenance["measured_on"]) for result in results]
    words = [result.verdict() for result in results]
    harmed = [name for name, result in zip(names, results, strict=True) if _worse(result)]
    status: Status = "holds" if not harmed else "opposite" if len(harmed) == len(results) else "mixed"
    summary = (
        "No loss of capability beyond the controls was shown; the intervals say how large one is still compatible."
        if not harmed
        else f"Steering costs more than a random push of the same size on: {', '.join(harmed)}."
    )
    tables = {
        f"capability_{name}": result.to_pandas() for name, result in zip(map(_plain, names), results, strict=True)
    }
    return Section(
        status,
        "\n".join([summary, *words]),
        tables,
        notes=("'Barely touched' is judged by change against the unsteered model, item by item.",),
    )


def _worse(result: CapabilityResult) -> bool:
    """Whether the principal measure got worse, beyond every control, at either multiplier."""
    sign = "+" if result.measures[0] == "loss" else "-"
    return any("beyond every control" in line and f"change {sign}" in line for line in result.verdict().splitlines())


def _plain(name: str) -> str:
    return name.rsplit("/", 1)[-1].removesuffix(".txt").replace("-", "_")


def _questions(lab: Lab) -> list[PairSet]:
    """The authors' MMLU and TruthfulQA where their data are given, else the built-in questions."""
    if lab.study.data is None:
        found = [load_pairs("questions/general-knowledge")]
    else:
        folder = Path(lab.study.data) / "test"
        found = [load_pairs(folder / name) for name in ("mmlu/mmlu.json", "truthfulqa/truthful_qa.json")]
    limit = lab.study.capability
    # Evenly spread: the authors' questions are ordered by category.
    return [pairs if limit is None else pairs[:: max(1, len(pairs) // limit)][:limit] for pairs in found]


def _prose() -> Path:
    with resources.as_file(resources.files("caa_lens") / "behaviours" / "questions" / "prose.txt") as path:
        return path


@torch.no_grad()
def zero_cost(lab: Lab) -> Section:
    """A baked vector gives the logits of one added by hooks at all positions, and costs no time; of the first behaviour."""
    behaviour = lab.study.behaviours[0]
    model, v = lab.model, lab.vector(behaviour)
    baked, prompts = bake(model, v), lab.open_questions(behaviour)[:4]
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
