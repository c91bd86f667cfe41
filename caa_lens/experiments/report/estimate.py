"""What a study will take, before it starts: tokens that the model has to run, seconds at a measured speed, and memory.

    tokens of a sweep = items x (shared + settings x steered x share of the layers above)       a branch runs from its own layer up
    seconds           = tokens / speed, speed measured by one batch on the model itself

A rough figure, meant to tell minutes from days: it knows neither the lengths of answers nor how well branches fill the processor.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pandas as pd
import torch

from caa_lens.experiments.grid import BRANCH_TOKENS
from caa_lens.experiments.report.checks import check_layer
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.study import Study
from caa_lens.models import Model, describe, device_of, pad, run, tokenizer_of

CALIBRATION = (8, 96)
"""Rows and tokens of the batch that measures the speed."""


def estimate(study: Study, out: str | os.PathLike[str], model: Model) -> pd.DataFrame:
    """One row a claim of the study: `claim`, `thousand_tokens`, `minutes`, at the speed of this model and machine now.

    Raises:
        InputError: the model has no such layer.
    """
    check_layer(study, describe(model).n_layers)
    lab, speed = Lab(study, Path(out), model=model, progress=False), tokens_per_second(model)
    costs = dict.fromkeys(study.claims, 0.0)
    for name in study.behaviours:
        for claim, tokens in _of_behaviour(lab, study, name).items():
            if claim in costs:
                costs[claim] += tokens
    rows = [
        {"claim": claim, "thousand_tokens": tokens / 1e3, "minutes": tokens / speed / 60}
        for claim, tokens in costs.items()
    ]
    return pd.DataFrame(rows)


def _of_behaviour(lab: Lab, study: Study, name: str) -> dict[int, float]:
    pairs = lab.pairs(name)
    encode = tokenizer_of(lab.model)
    sample = pairs.train[:8]
    prompt = sum(len(encode(pair.prompt)["input_ids"]) for pair in sample) / len(sample) + 20  # the template's own
    answer = sum(len(encode(pair.positive)["input_ids"]) for pair in sample) / len(sample)
    lettered = name.startswith("ab/")
    sides = 1 if lettered else 2
    steered = (1 if lettered else answer) + 2
    n_layers, report, choose = lab.n_layers(), len(pairs.report), len(pairs.choose)
    swept = len(range(0, n_layers, study.layer_step))
    beside = 1 + study.controls + study.shuffles + (2 if lettered else 0)
    settings, systems, half = len(study.multipliers) - 1, 3, 0.5

    def sweep(items: int, branches: float, shared: float = prompt) -> float:
        return items * sides * (shared + branches * steered * half)

    extraction = (len(pairs.train) + report) * (prompt + 2 * answer)
    examples = 4 if study.examples is None else study.examples
    few_shot = prompt * (1 + examples) + examples * answer
    generated = study.questions * 7 * (prompt + study.max_new_tokens * 4)  # a decoding step is worth about four tokens
    asked = study.capability or (1400 if study.data else 48)
    return {
        1: extraction + sweep(choose, swept * 2 * beside),
        2: systems * sweep(report, settings * beside),
        3: generated * 1.5,
        4: sweep(report, 2, few_shot) * 2
        + sweep(report, 2) * 3
        + (6 * study.epochs * len(pairs.train) * (prompt + answer) * 2 if name in study.finetune else 0),
        5: asked * (prompt + 2 * 6 * 3) + 500 * 12,
        6: sweep(choose, swept * 2),
        7: 4 * report * (prompt + answer),
        8: 6 * 3 * 4 * (prompt + 24 * 4) if name == study.behaviours[0] else 0,
        9: 3 * prompt,
        10: sweep(report, 2 * (len(study.behaviours) + 5)) * (4 if lettered else 1),
    }


@torch.no_grad()
def tokens_per_second(model: Model) -> float:
    """Tokens a second of one batched pass through all blocks; the second of two."""
    rows, length = CALIBRATION
    tokens, mask = pad([[1] * length] * rows, side="right", device=device_of(model))
    for _ in range(2):
        started = time.perf_counter()
        run(model, tokens, mask)
        taken = time.perf_counter() - started
    return rows * length / taken


def memory(model: Model) -> float:
    """Bytes: the weights, twice where a baked or tuned copy is made, and the largest batch of branches."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    size = next(model.parameters()).element_size()
    info = describe(model)
    branches = BRANCH_TOKENS * size * (info.d_model * 12 + 2 * info.d_model * info.n_layers)
    return 2.0 * weights + branches
