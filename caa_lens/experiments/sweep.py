"""Scores over layers, multipliers, items and vectors in one table, beside their controls, resumable item by item.

score[system, vector, layer, multiplier, item]: what `runs` runs and `scoring` makes of it; `result` says what it shows

A system is a way to prompt: a system prompt, or a whole template (worked examples), put around every item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from caa_lens.arguments import Layers, Multipliers, require_options, require_pairs
from caa_lens.errors import InputError
from caa_lens.experiments.grid import Text
from caa_lens.experiments.result import SweepResult
from caa_lens.experiments.runs import UNSTEERED, Setting, run_items, settings_for
from caa_lens.experiments.scoring import Metric, MetricName, metric_for
from caa_lens.hooks import template_for
from caa_lens.models import Model, describe, tokenizer_of
from caa_lens.pairs import PairSet, prompt_digest
from caa_lens.prompts import Template
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet

NOT_OPTIONS = ("label", "parts")
"""What `sweep` itself says to `run_items`."""

System = str | Template | None
"""A way to prompt: a system prompt (None for none given), or a whole template."""


def score(
    model: Model,
    pairs: PairSet,
    vector: SteeringVector | None = None,
    *,
    metric: MetricName | None = None,
    multipliers: Multipliers = (-1.0, 0.0, 1.0),
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
    require_pairs("score", pairs)
    if vector is None:
        kept = dict(options)
        layers, controls, others = (kept.pop(name, None) for name in ("layers", "controls", "others"))
        if layers is not None or controls or others:
            raise InputError(
                "layers=, controls= and others= need a vector; give one, score(model, pairs, vector), or leave them out to score "
                "the unsteered model."
            )
        require_options("score", kept, _run, run_items, but=NOT_OPTIONS)
        return _run(model, [UNSTEERED], pairs, metric_for(pairs, metric), **kept)
    if not isinstance(vector, SteeringVector):
        raise InputError(
            f"score takes one SteeringVector, got {type(vector).__name__}; take the vector of a layer, vectors[14], or run a "
            "set with sweep(model, vectors, pairs)."
        )
    return sweep(model, VectorSet([vector]), pairs, metric=metric, multipliers=multipliers, **options)


def sweep(
    model: Model,
    vectors: VectorSet | SteeringVector,
    pairs: PairSet,
    *,
    layers: Layers | None = None,
    multipliers: Multipliers = (-1.0, 0.0, 1.0),
    metric: MetricName | None = None,
    controls: bool | int = False,
    others: Mapping[str, VectorSet | SteeringVector] | None = None,
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
        others: further vectors to run beside, at the same norm: another behaviour's, by name; one `SteeringVector` as in `vectors`.
        systems: ways to prompt, by name, each to run everything with: a system prompt in place of the template's own (None stands
            for none given), or a whole `Template`, such as one with worked examples. `pairs.system_prompts` holds the system
            prompts of a built-in behaviour, `prompting` all baselines of a set. The table gets a column `system`.
        positions, operator, template: as in `steer`.
        batch_size: items run together; changes the speed only.
        seed: of the random controls and the bootstrap.
        store: a folder that keeps each item's log-probabilities as soon as they are computed; a second call with the same
            arguments continues there.
        progress: show a progress bar.

    Raises:
        InputError: an empty grid, an argument of another kind, an unknown option, an item that the metric cannot score, a prompt
            used in training, vectors that do not fit, a system prompt or turn that a template does not write, an open `steer`
            context; all before the model runs.
        MissingError: a layer that the vectors do not have.

    Example:
        >>> result = caa.sweep(model, vectors, held_out, layers=range(10, 20), controls=True)  # doctest: +SKIP
        >>> result.best(), result.verdict()  # doctest: +SKIP
    """
    require_pairs("sweep", pairs)
    require_options("sweep", options, _run, run_items, but=NOT_OPTIONS)
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
    systems: Mapping[str, System] | None = None,
    template: Template | None = None,
    seed: int = 0,
    **options: Any,
) -> SweepResult:
    written, items = write_items(model, pairs, metric, systems=systems, template=template)
    about = {
        "metric": metric.name,
        "pairs": pairs.name,
        "pairs_hash": pairs.hash,
        "template": repr(template_for(model, template)),
        "systems": None if systems is None else {str(name): repr(way) for name, way in written.items()},
        "seed": seed,
    }
    label = f"score {pairs.name}"
    found, made = run_items(model, settings, items, about, label=label, parts=len(written), **options)
    return SweepResult(_item_table(pairs, settings, metric, list(written), found), metric, made, seed)


def write_items(
    model: Model,
    pairs: PairSet,
    metric: Metric,
    *,
    systems: Mapping[str, System] | None = None,
    template: Template | None = None,
) -> tuple[dict[str | None, Template], list[list[Text]]]:
    """The templates by system (None where none are swept), and the texts of every item, one system after the other.

    Raises:
        InputError: a system that a template does not write, an item that the metric cannot score, that is a worked example, or that
            the context cannot hold.
    """
    info, tokenizer, chosen = describe(model), tokenizer_of(model), template_for(model, template)
    written: dict[str | None, Template] = {None: chosen}
    if systems is not None:
        written = under_systems(tokenizer, chosen, systems)
    for way in written.values():
        pairs.require_disjoint(prompt_digest(example) for example, _ in way.turns)
    items = []
    for way, pair in product(written.values(), pairs):
        items.append(metric.texts(tokenizer, way, pair))
        info.require_room(pair.where, max(text.targets[-1][0] for text in items[-1]))
    return written, items


def under_systems(tokenizer: Any, template: Template, systems: Mapping[str, System]) -> dict[str | None, Template]:
    """The templates given, and for system prompts the template with each in place of its own.

    Raises:
        InputError: no system, an empty system prompt, or a template that leaves a system prompt or a turn out of the text.
    """
    if not isinstance(systems, Mapping):
        raise InputError(
            f"systems= takes ways to prompt by name, {{'none': None, 'kind': 'Be kind.'}}; got {type(systems).__name__}."
        )
    if not systems:
        raise InputError("systems={} is an empty grid; leave it out, or give {'none': None, 'positive': '...'}.")
    written: dict[str | None, Template] = {}
    for name, given in systems.items():
        way = given if isinstance(given, Template) else replace(template, system_prompt=given)
        written[name] = way
        if way.system_prompt is not None and not way.system_prompt.strip():
            raise InputError(f"the system prompt {name!r} is empty; None stands for no system prompt.")
        text = way.render(tokenizer, way.messages("?"))
        said = [("system prompt", way.system_prompt or ""), *(("turn", part) for turn in way.turns for part in turn)]
        for kind, part in said:
            if part.strip() not in text:
                raise InputError(
                    f"{type(way).__name__} does not write the {kind} {part[:40]!r} of {name!r} into the text: this tokenizer's "
                    "chat template knows none. Leave it out, or use another template."
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
    for (system, (number, pair)), logprobs in zip(product(systems, enumerate(pairs)), found, strict=True):
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
        frames.append(pd.DataFrame({**axes, **metric.values(pair, logprobs)}))
    return pd.concat(frames, ignore_index=True)
