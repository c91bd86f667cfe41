"""Scores over layers, multipliers, items and vectors in one table, beside their controls, resumable item by item.

score[vector, layer, multiplier, item]: what `grid` runs and `scoring` makes of it; `result` says what it shows
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.directions import Operator, add
from caa_lens.errors import InputError
from caa_lens.experiments.controls import with_controls
from caa_lens.experiments.grid import grid_logprobs
from caa_lens.experiments.result import SweepResult
from caa_lens.experiments.scoring import Metric, MetricName, metric_for
from caa_lens.files import atomic_path, digest
from caa_lens.hooks import flatten, template_for
from caa_lens.models import Model, check_layers, describe, tokenizer_of
from caa_lens.pairs import PairSet
from caa_lens.positions import Positions, check_positions, is_steered
from caa_lens.prompts import Template
from caa_lens.vector import SteeringVector, VectorSet


@dataclass(frozen=True)
class Setting:
    """One configuration of a sweep: a vector (by name) at its layer, times a multiplier; None is the unsteered model."""

    vector: str
    layer: int
    multiplier: float
    steering: SteeringVector | None


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
        return _run(model, [Setting("none", -1, 0.0, None)], pairs, metric_for(pairs, metric), **options)
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
        positions, operator, template: as in `steer`.
        batch_size: items run together; changes the speed only.
        seed: of the random controls and the bootstrap.
        store: a folder that keeps each item's log-probabilities as soon as they are computed; a second call with the same
            arguments continues there.
        progress: show a progress bar.

    Raises:
        InputError: an empty grid, an item that the metric cannot score, a prompt used in training, vectors that do
            not fit, a `steer` context that is still open; all before the model runs.
        MissingError: a layer that the vectors do not have.

    Example:
        >>> result = caa.sweep(model, vectors, held_out, layers=range(10, 20), controls=True)  # doctest: +SKIP
        >>> result.best(), result.verdict()  # doctest: +SKIP
    """
    chosen = _at_layers(model, vectors, layers)
    if not multipliers:
        raise InputError("an empty grid: give at least one multiplier.")
    pairs.require_disjoint(chosen.provenance.prompt_digests)
    seed = int(options.get("seed", 0))
    named = with_controls(chosen, n_random=3 if controls is True else int(controls), seed=seed, others=others)
    settings = [
        Setting(name, layer, float(m), m * group[layer] if m else None)
        for name, group in named.items()
        for layer in group
        for m in sorted(set(multipliers))
    ]
    return _run(model, settings, pairs, metric_for(pairs, metric), **options)


def _at_layers(model: Model, vectors: VectorSet | SteeringVector, layers: Sequence[int] | None) -> VectorSet:
    flatten(model, vectors)
    if layers is not None:
        layers = check_layers(model, list(layers))
    if isinstance(vectors, SteeringVector):
        return VectorSet([vectors.at_layer(layer) for layer in layers or [vectors.layer]])
    return vectors if layers is None else VectorSet([vectors[layer] for layer in layers])


def _run(
    model: Model,
    settings: Sequence[Setting],
    pairs: PairSet,
    metric: Metric,
    *,
    positions: Positions = "after_instruction",
    operator: Operator = add,
    strength: float = 1.0,
    template: Template | None = None,
    batch_size: int = 16,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SweepResult:
    if is_steered(model):
        raise InputError("score() and sweep() steer by themselves; leave the steer() context and pass the vector.")
    check_positions(positions)
    if isinstance(positions, Tensor):
        raise InputError(
            "a position mask fits one prompt; score() and sweep() take a named choice, a slice or a function."
        )
    info, tokenizer, chosen = describe(model), tokenizer_of(model), template_for(model, template)
    items = [metric.texts(tokenizer, chosen, pair) for pair in pairs]
    for pair, texts in zip(pairs, items, strict=True):
        info.require_room(pair, max(text.targets[-1][0] for text in texts))
    made = {
        "model": info.name,
        "revision": info.revision,
        "metric": metric.name,
        "pairs": pairs.name,
        "pairs_hash": pairs.hash,
        "template": repr(chosen),
        "positions": getattr(positions, "__name__", str(positions)),
        "operator": getattr(operator, "__name__", str(operator)),
        "strength": strength,
        "settings": [[s.vector, s.layer, s.multiplier] for s in settings],
        "vectors": digest([s.steering.tensor.tolist() if s.steering else None for s in settings]),
        "texts": digest([[text.ids for text in texts] for texts in items]),
        "seed": seed,
        "versions": {name: version(name) for name in ("caa-lens", "transformer-lens", "transformers", "torch")},
    }
    done = _Store(store, made)
    missing = [number for number in range(len(items)) if number not in done.found]
    flat = [(number, side, text) for number in missing for side, text in enumerate(items[number])]
    waiting: dict[int, dict[int, Any]] = {}
    with tqdm(
        total=len(items), initial=len(done.found), desc=f"score {pairs.name}", unit="item", disable=not progress
    ) as bar:
        distinct, place = _distinct([setting.steering for setting in settings])
        grid = grid_logprobs(
            model,
            [text for _, _, text in flat],
            distinct,
            positions=positions,
            operator=operator,
            strength=strength,
            batch_size=batch_size,
        )
        for index, logprobs in grid:
            number, side, _ = flat[index]
            waiting.setdefault(number, {})[side] = logprobs[place].numpy()
            if len(waiting[number]) == len(items[number]):
                sides = waiting.pop(number)
                done.add(number, [sides[side] for side in range(len(sides))])
                bar.update()
    return SweepResult(_item_table(pairs, settings, metric, done.found), metric, made, seed)


def _distinct(vectors: Sequence[SteeringVector | None]) -> tuple[list[SteeringVector | None], list[int]]:
    """Settings to run, the unsteered model once, and each setting's place among them."""
    distinct: list[SteeringVector | None] = []
    place: list[int] = []
    unsteered: int | None = None
    for vector in vectors:
        if vector is None and unsteered is not None:
            place.append(unsteered)
            continue
        place.append(len(distinct))
        distinct.append(vector)
        unsteered = place[-1] if vector is None else unsteered
    return distinct, place


class _Store:
    """Log-probabilities of finished items, in memory and, if a folder is given, one file an item."""

    def __init__(self, folder: str | os.PathLike[str] | None, made: dict[str, Any]) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.found: dict[int, list[np.ndarray]] = {}
        if self.folder is None:
            return
        signature = digest({key: value for key, value in made.items() if key != "versions"})
        about = self.folder / "about.json"
        if about.exists():
            if json.loads(about.read_text(encoding="utf-8")).get("signature") != signature:
                raise InputError(f"{self.folder} holds another sweep; give another folder, or delete this one.")
            for file in self.folder.glob("item-*.json"):
                rows = json.loads(file.read_text(encoding="utf-8"))
                self.found[int(file.stem.removeprefix("item-"))] = [np.array(row, dtype=np.float32) for row in rows]
        else:
            with atomic_path(about) as temporary:
                temporary.write_text(json.dumps({"signature": signature, **made}, indent=1), encoding="utf-8")

    def add(self, number: int, logprobs: list[np.ndarray]) -> None:
        self.found[number] = logprobs
        if self.folder is not None:
            with atomic_path(self.folder / f"item-{number:06d}.json") as temporary:
                temporary.write_text(json.dumps([row.tolist() for row in logprobs]), encoding="utf-8")


def _item_table(
    pairs: PairSet, settings: Sequence[Setting], metric: Metric, found: dict[int, list[np.ndarray]]
) -> pd.DataFrame:
    frames = []
    for number, pair in enumerate(pairs):
        values = metric.values(pair, found[number])
        frames.append(
            pd.DataFrame(
                {
                    "item": number,
                    "key": pair.key,
                    "vector": [setting.vector for setting in settings],
                    "layer": [setting.layer for setting in settings],
                    "multiplier": [setting.multiplier for setting in settings],
                    **values,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)
