"""Scores over layers, multipliers, items and vectors in one table, beside their controls, resumable item by item.

score[system prompt, vector, layer, multiplier, item]: what `runs` runs and `scoring` makes of it; `result` says what it shows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from caa_lens.errors import InputError
from caa_lens.experiments.result import SweepResult
from caa_lens.experiments.runs import UNSTEERED, Setting, run_items, settings_for
from caa_lens.experiments.scoring import Metric, MetricName, metric_for
from caa_lens.hooks import template_for
from caa_lens.models import Model, describe, tokenizer_of
from caa_lens.pairs import PairSet
from caa_lens.prompts import Template
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet


def score(
    model: Model,
    pairs: PairSet,
    vector: SteeringVector | None = None,
    *,
    metric: MetricName | None = None,
    multipliers: Sequence[float] = (-1.0, 0.0, 1.0),
    **options: Any,
) -> SweepResult:
    """Scores held-out pairs before and after steering with one vector: a `sweep` of its layer alone.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        pairs: held-out pairs; a prompt that the vector was trained on is refused.
        vector: the vector; without one, the unsteered model is scored.
        metric: `"letter"`, `"letter_published"` or `"logprob"`; by default by the kind of the pairs.
        multipliers: strengths of the vector.
        **options: as in `sweep`.

    Raises:
        InputError: as in `sweep`.
    """
    if vector is None:
        return _run(model, [UNSTEERED], pairs, metric_for(pairs, metric), **options)
    return sweep(model, VectorSet([vector]), pairs, metric=metric, multipliers=multipliers, **options)


def sweep(
    model: Model,
    vectors: VectorSet | SteeringVector,
    pairs: PairSet,
    *,
    layers: Sequence[int] | None = None,
    multipliers: Sequence[float] = (-1.0, 0.0, 1.0),
    metric: MetricName | None = None,
    controls: bool | int = False,
    others: Mapping[str, VectorSet] | None = None,
    **options: Any,
) -> SweepResult:
    """Scores pairs at every layer and multiplier, exactly, without running what does not depend on them again.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        vectors: the vectors; one `SteeringVector` is used at its own layer, or at all of `layers` (the paper's
            layer transfer).
        pairs: held-out pairs; a prompt that the vectors were trained on is refused.
        layers: which of the vectors' layers; all by default.
        multipliers: at least one; 0 is the unsteered model, computed once.
        metric: `"letter"`, `"letter_published"` or `"logprob"`; by default by the kind of the pairs.
        controls: also run norm-matched controls: a number of random directions (True: 3) and the label-shuffled, letter and
            letter-balanced vectors that the vectors carry from `extract`.
        others: further vectors to run beside, at the same norm: another behaviour's, by name.
        systems: system prompts by name, each to run everything with, in place of the template's own; None stands for none
            given. `pairs.system_prompts` holds those of a built-in behaviour. The table gets a column `system`.
        positions, operator, template: as in `steer`.
        batch_size: items run together; changes the speed only.
        seed: of the random controls and the bootstrap.
        store: a folder that keeps each item's log-probabilities as soon as they are computed; a second call with the same
            arguments continues there.
        progress: show a progress bar.

    Raises:
        InputError: an empty grid, an item that the metric cannot score, a prompt used in training, vectors that do
            not fit, a system prompt that the template cannot write, a `steer` context that is still open; all before the
            model runs.
        MissingError: a layer that the vectors do not have.

    Example:
        >>> result = caa.sweep(model, vectors, held_out, layers=range(10, 20), controls=True)  # doctest: +SKIP
        >>> result.best(), result.verdict()  # doctest: +SKIP
    """
    settings = settings_for(
        model,
        vectors,
        layers=layers,
        multipliers=multipliers,
        controls=controls,
        others=others,
        seed=int(options.get("seed", 0)),
    )
    pairs.require_disjoint(vectors.provenance.prompt_digests)
    return _run(model, settings, pairs, metric_for(pairs, metric), **options)


def _run(
    model: Model,
    settings: Sequence[Setting],
    pairs: PairSet,
    metric: Metric,
    *,
    systems: Mapping[str, str | None] | None = None,
    template: Template | None = None,
    seed: int = 0,
    **options: Any,
) -> SweepResult:
    info, tokenizer, chosen = describe(model), tokenizer_of(model), template_for(model, template)
    written = {None: chosen} if systems is None else _under_systems(tokenizer, chosen, systems)
    items = [[metric.texts(tokenizer, template, pair) for template in written.values()] for pair in pairs]
    for pair, by_system in zip(pairs, items, strict=True):
        info.require_room(pair.where, max(text.targets[-1][0] for texts in by_system for text in texts))
    about = {
        "metric": metric.name,
        "pairs": pairs.name,
        "pairs_hash": pairs.hash,
        "template": repr(chosen),
        "systems": None if systems is None else dict(systems),
        "seed": seed,
    }
    flat = [[text for texts in by_system for text in texts] for by_system in items]
    found, made = run_items(model, settings, flat, about, label=f"score {pairs.name}", **options)
    return SweepResult(_item_table(pairs, settings, metric, list(written), found), metric, made, seed)


def _under_systems(tokenizer: Any, template: Template, systems: Mapping[str, str | None]) -> dict[str | None, Template]:
    """The template with each system prompt in place of its own.

    Raises:
        InputError: no system prompt, an empty one, or a template that leaves it out of the text.
    """
    if not systems:
        raise InputError("systems={} is an empty grid; leave it out, or give {'none': None, 'positive': '...'}.")
    written: dict[str | None, Template] = {}
    for name, prompt in systems.items():
        written[name] = replace(template, system_prompt=prompt)
        if prompt is None:
            continue
        if not prompt.strip():
            raise InputError(f"the system prompt {name!r} is empty; None stands for no system prompt.")
        if prompt.strip() not in written[name].encode(tokenizer, "?").text:
            raise InputError(
                f"{type(template).__name__} does not write the system prompt {name!r} into the text: this tokenizer's chat "
                "template knows none. Leave systems= out, or use another template=."
            )
    return written


def _item_table(
    pairs: PairSet,
    settings: Sequence[Setting],
    metric: Metric,
    systems: Sequence[str | None],
    found: Sequence[Sequence[np.ndarray]],
) -> pd.DataFrame:
    frames = []
    for number, (pair, logprobs) in enumerate(zip(pairs, found, strict=True)):
        n_texts = len(logprobs) // len(systems)
        for k, system in enumerate(systems):
            axes = {
                "item": number,
                "key": pair.key,
                "system": system,
                "vector": [setting.vector for setting in settings],
                "layer": [setting.layer for setting in settings],
                "multiplier": [setting.multiplier for setting in settings],
            }
            if system is None:
                del axes["system"]
            frames.append(pd.DataFrame({**axes, **metric.values(pair, logprobs[k * n_texts : (k + 1) * n_texts])}))
    return pd.concat(frames, ignore_index=True)
