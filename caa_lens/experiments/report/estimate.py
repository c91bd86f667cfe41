"""What a study will take, before it starts: tokens that the model has to run, minutes at a measured speed, and memory.

    minutes = tokens / speed + sections and models to load, at fixed rates;  speed of one batch on the model itself, now

A rough figure, meant to tell minutes from days: half or twice as much is no surprise, and a machine that is busy meanwhile takes
longer. `costs` says what is counted; what a judge behind an endpoint takes is not.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pandas as pd
import torch

from caa_lens.experiments.grid import BRANCH_TOKENS
from caa_lens.experiments.report.checks import check_layer
from caa_lens.experiments.report.costs import Pieces, needs, own, shared
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.study import Study
from caa_lens.models import Model, describe, device_of, pad, run, tokenizer_of

CALIBRATION = (8, 96)
"""Rows and tokens of the batch that measures the speed."""
SECTION_SECONDS = 2.0
"""Of a section's figures, tables and intervals."""
LOADED = 5e7
"""Parameters of a further model (a base, a tuned one) that are read in a second."""
OF_ALL = (8, 10)
"""Claims that have a section for all behaviours only; 4 and 6 have one beside those of each."""
TEMPLATE = 20
"""Tokens that a template adds to a prompt."""
TRAINED_TOKENS, KEPT = 8 * 256, 17
"""Tokens of a training batch; numbers kept for the way back, of each token and block, in multiples of d_model."""


def estimate(study: Study, out: str | os.PathLike[str], model: Model) -> pd.DataFrame:
    """One row a claim of the study: `claim`, `thousand_tokens`, `minutes`, at the speed of this model and machine now. What several
    claims rest on (vectors, the choice of a layer) is counted once, with the first of them.

    Raises:
        InputError: the model has no such layer.
    """
    check_layer(study, describe(model).n_layers)
    lab, speed = Lab(study, Path(out), model=model, progress=False), tokens_per_second(model)
    of = {name: _pieces(lab, name) for name in study.behaviours}
    parts = {name: shared(study, pieces, lab.n_layers()) for name, pieces in of.items()}
    tokens = dict.fromkeys(study.claims, 0.0)
    for claim in sorted(tokens):
        for name in study.behaviours:
            tokens[claim] += own(study, claim, name, of, lab.n_layers())
            tokens[claim] += sum(parts[name].pop(part, 0.0) for part in needs(study, claim, name))
    rows = [
        {"claim": claim, "thousand_tokens": run / 1e3, "minutes": (run / speed + _beside(study, claim, model)) / 60}
        for claim, run in tokens.items()
    ]
    return pd.DataFrame(rows)


def _beside(study: Study, claim: int, model: Model) -> float:
    """Seconds that a claim takes beside what the model runs."""
    sections = (0 if claim in OF_ALL else len(study.behaviours)) + (claim in (4, 6, *OF_ALL))
    loads = 4 * len(study.finetune) if claim == 4 else int(claim == 6 and study.base is not None)
    return sections * SECTION_SECONDS + loads * _parameters(model) / LOADED


def _pieces(lab: Lab, name: str) -> Pieces:
    pairs, encode = lab.pairs(name), tokenizer_of(lab.model)
    sample = pairs.train[:8]
    prompt = sum(len(encode(pair.prompt)["input_ids"]) for pair in sample) / len(sample) + TEMPLATE
    answer = sum(len(encode(pair.positive)["input_ids"]) for pair in sample) / len(sample)
    sizes = len(pairs.train), len(pairs.choose), len(pairs.report)
    return Pieces(prompt, answer, *sizes, lettered=name.startswith("ab/"))


@torch.no_grad()
def tokens_per_second(model: Model) -> float:
    """Tokens a second of one batched pass through all blocks; the second of two."""
    rows, length = CALIBRATION
    tokens, mask = pad([[1] * length] * rows, side="right", device=device_of(model))
    for _ in range(2):
        started = time.perf_counter()
        logits, _ = run(model, tokens, mask, logits=1)
        assert logits is not None
        float(logits[0, -1, 0])  # an accelerator works on while Python goes on; reading a number waits for it
        taken = time.perf_counter() - started
    return rows * length / taken


def memory(study: Study, model: Model) -> float:
    """Bytes at the peak: the weights and, beside them, the most that a claim needs.

    That is a batch of branches, with a second model (a base, a tuned one) where there is one; or a model in training, whose
    weights, gradients and two moments of Adam are float32 where all weights are trained.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    size = next(model.parameters()).element_size()
    info = describe(model)
    branches = BRANCH_TOKENS * size * (info.d_model * 12 + 2 * info.d_model * info.n_layers)
    tunes, compares = bool(study.finetune) and 4 in study.claims, study.base is not None and 6 in study.claims
    copied = weights if tunes or compares else 0
    kept = TRAINED_TOKENS * size * KEPT * info.d_model * info.n_layers
    training = (4 * 4 * _parameters(model) if study.method == "full" else weights) + kept if tunes else 0
    return float(weights + max(copied + branches, training))


def _parameters(model: Model) -> int:
    return sum(p.numel() for p in model.parameters())
