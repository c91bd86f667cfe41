"""Running items under many settings: exactly, each shared part once, and resumable item by item.

    result[item][text][setting, target]      a setting = a vector of one layer times a multiplier

What an item is (a pair under a metric, a window of a text) is up to the caller; `grid` does the running, and shares it among
the processes where there are several: each gets the whole result, the main one stores it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.arguments import Layers, Multipliers, as_numbers, require_count
from caa_lens.callables import described
from caa_lens.directions import Operator, add
from caa_lens.errors import InputError
from caa_lens.experiments.controls import with_controls
from caa_lens.experiments.grid import Text, grid_logprobs
from caa_lens.experiments.store import ItemStore
from caa_lens.files import digest
from caa_lens.hooks import flatten
from caa_lens.models import Model, check_layers, describe, model_state
from caa_lens.positions import Positions, check_positions, is_steered
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet
from caa_lens.workers import is_main


@dataclass(frozen=True)
class Setting:
    """One configuration: a vector (by name) at its layer, times a multiplier; at 0, or with no direction, the unsteered model."""

    vector: str
    layer: int
    multiplier: float
    direction: SteeringVector | None

    @property
    def steering(self) -> SteeringVector | None:
        """What is added; None for the unsteered model."""
        return self.multiplier * self.direction if self.multiplier and self.direction is not None else None


UNSTEERED = Setting("none", -1, 0.0, None)


def settings_for(
    model: Model,
    vectors: VectorSet | SteeringVector,
    *,
    layers: Layers | None = None,
    multipliers: Multipliers = (-1.0, 0.0, 1.0),
    controls: bool | int = False,
    others: Mapping[str, VectorSet | SteeringVector] | None = None,
    seed: int = 0,
) -> list[Setting]:
    """Every vector and control at every layer and multiplier; arguments as in `sweep`.

    Raises:
        InputError: no multiplier or layer, or none that is a number; vectors that do not fit the model; a control's name that is
            taken.
        MissingError: a layer that the model or the vectors do not have.
    """
    strengths = sorted(set(as_numbers("multipliers", multipliers)))
    n_random = 3 if controls is True else require_count("controls", controls, least=0)
    layers = None if layers is None else check_layers(model, layers)
    if others is not None and not isinstance(others, Mapping):
        raise InputError(f"others= takes vectors by name, {{'name': vectors}}; got {type(others).__name__}.")
    chosen = _at_layers(model, vectors, layers, "vectors=")
    beside = {
        name: _at_layers(
            model, group, layers if isinstance(group, SteeringVector) else None, f"others={{{name!r}: ...}}"
        )
        for name, group in (others or {}).items()
    }
    named = with_controls(chosen, n_random=n_random, seed=seed, others=beside)
    return [
        Setting(name, layer, m, group[layer]) for name, group in named.items() for layer in group for m in strengths
    ]


def _at_layers(model: Model, vectors: VectorSet | SteeringVector, layers: Sequence[int] | None, what: str) -> VectorSet:
    if not isinstance(vectors, (VectorSet, SteeringVector)):
        raise InputError(
            f"{what} takes a VectorSet or a SteeringVector, got {type(vectors).__name__}; VectorSet([...]) makes one of the "
            "vectors of several layers."
        )
    flatten(model, vectors)
    if isinstance(vectors, SteeringVector):
        return VectorSet([vectors.at_layer(layer) for layer in layers or [vectors.layer]])
    return vectors if layers is None else VectorSet([vectors[layer] for layer in layers])


def describe_run(
    model: Model,
    settings: Sequence[Setting],
    positions: Positions,
    about: Mapping[str, Any],
    *,
    operator: Operator = add,
    store: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Provenance of a run under several settings: `about` with the model, the settings, a digest of their vectors, versions; for a
    store also what tells the model's state and the functions from others of the same name.

    Raises:
        InputError: positions that fit one prompt only, an open `steer` context, or for a store a function whose content cannot be
            told.
    """
    if is_steered(model):
        raise InputError("this measurement steers by itself; leave the steer() context and pass the vector.")
    check_positions(positions)
    if isinstance(positions, Tensor):
        raise InputError("a position mask fits one prompt; take a named choice, a slice or a function.")
    info = describe(model)
    return {
        "model": info.name,
        "revision": info.revision,
        **about,
        **({} if store is None else {"state": digest([model_state(model), described([positions, operator])])}),
        "positions": _name(positions),
        "operator": _name(operator),
        "settings": [[s.vector, s.layer, s.multiplier] for s in settings],
        "vectors": digest([s.steering.tensor.tolist() if s.steering else None for s in settings]),
        "versions": {name: version(name) for name in ("caa-lens", "transformer-lens", "transformers", "torch")},
    }


def _name(chosen: Positions | Operator) -> str:
    """For reading; a `partial` has no name of its own."""
    return getattr(chosen, "__name__", type(chosen).__name__) if callable(chosen) else str(chosen)


def run_items(
    model: Model,
    settings: Sequence[Setting],
    items: Sequence[Sequence[Text]],
    about: Mapping[str, Any],
    *,
    label: str,
    parts: int = 1,
    positions: Positions = "after_instruction",
    operator: Operator = add,
    strength: float = 1.0,
    batch_size: int = 16,
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[list[list[np.ndarray]], dict[str, Any]]:
    """Log-probabilities of every item's targets under every setting.

    Args:
        settings: what to steer with; the unsteered model is run once, however many settings ask for it.
        items: each one's texts.
        about: what the caller knows of the items, for the provenance.
        label: of the progress bar.
        parts: of how many equal parts the items consist, one after the other, each with a beginning of its own (a system prompt,
            worked examples) that is run once.
        positions, operator, strength, batch_size, store, progress: as in `sweep`.

    Returns:
        For every item one array `[setting, target]` a text; and the provenance: `about` with model, settings, digests
        of vectors and texts, and versions.

    Raises:
        InputError: positions that fit one prompt only, an open `steer` context, a store of another run, or a function that is given
            with a store and whose content cannot be told.
    """
    batch_size = require_count("batch_size", batch_size)
    made = describe_run(
        model,
        settings,
        positions,
        {**about, "strength": strength, "texts": digest([[text.ids for text in texts] for texts in items])},
        operator=operator,
        store=store,
    )
    done = ItemStore(
        store,
        made,
        what="sweep",
        encode=lambda rows: [row.tolist() for row in rows],
        decode=lambda rows: [np.array(row, dtype=np.float32) for row in rows],
    )
    missing = [number for number in range(len(items)) if number not in done.found]
    waiting: dict[int, dict[int, np.ndarray]] = {}
    shown = progress and is_main()
    with tqdm(total=len(items), initial=len(done.found), desc=label, unit="item", disable=not shown) as bar:
        distinct, place = _distinct([setting.steering for setting in settings])
        for part in range(parts):
            mine = [number for number in missing if number * parts // len(items) == part]
            flat = [(number, side, text) for number in mine for side, text in enumerate(items[number])]
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
    return [done.found[number] for number in range(len(items))], made


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
