"""Steering vectors of one origin over layers, and the paper's normalisation over several such sets.

normalised v_b = v_b * mean over b' of |v_b'| / |v_b|        at each layer, over behaviours b
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.directions import rescale_to_mean_norm
from caa_lens.errors import InputError, MissingError
from caa_lens.provenance import Provenance, same_model
from caa_lens.vector import SteeringVector

if TYPE_CHECKING:
    import pandas as pd


class VectorSet(Mapping[int, SteeringVector]):
    """An immutable mapping from layer to `SteeringVector`, all of one origin; algebra acts on every layer.

    Args:
        vectors: the vectors, one a layer.
        controls: sets of controls by name, handed to the vectors of their layers in place of those that they have.

    Raises:
        InputError: no vector, two of the same layer, or different models.
        MissingError: controls that lack a layer; (on access) a layer that is not in the set.
    """

    __array_ufunc__ = None  # NumPy leaves `np.float64(2) * vectors` to this class

    def __init__(self, vectors: Sequence[SteeringVector], controls: Mapping[str, VectorSet] | None = None) -> None:
        if not vectors:
            raise InputError("a VectorSet needs at least one vector.")
        if controls is not None:
            vectors = [replace(v, controls={name: group[v.layer] for name, group in controls.items()}) for v in vectors]
        self._by_layer = {vector.layer: vector for vector in sorted(vectors, key=lambda vector: vector.layer)}
        if len(self._by_layer) != len(vectors):
            raise InputError("two vectors of the same layer in one VectorSet; add them, or pass a list to steer().")
        for vector in vectors:
            same = same_model(vector.provenance.model, self.provenance.model)
            if not same or vector.provenance.n_layers != self.n_layers:
                raise InputError(
                    f"vectors of {self.provenance.model} and {vector.provenance.model} in one VectorSet; keep one "
                    "set a model."
                )

    @property
    def controls(self) -> dict[str, VectorSet]:
        """The controls that all vectors of the set carry, as sets, by name."""
        first, *rest = self.values()
        names = [name for name in first.controls if all(name in vector.controls for vector in rest)]
        return {name: VectorSet([vector.controls[name] for vector in self.values()]) for name in names}

    @property
    def provenance(self) -> Provenance:
        """Of the first vector; the vectors of a set share it."""
        return next(iter(self._by_layer.values())).provenance

    @property
    def n_layers(self) -> int:
        """Number of layers of the model (not of the set)."""
        return self.provenance.n_layers

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers in the set, ascending."""
        return tuple(self._by_layer)

    def __getitem__(self, layer: int) -> SteeringVector:
        try:
            index = operator.index(layer) % self.n_layers if -self.n_layers <= layer < 0 else operator.index(layer)
            return self._by_layer[index]
        except (TypeError, KeyError) as error:
            raise MissingError(
                f"no vector for layer {layer!r}; this set is indexed by one number of the layers {_ranges(self.layers)}."
            ) from error

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_layer)

    def __len__(self) -> int:
        return len(self._by_layer)

    def __repr__(self) -> str:
        return f"VectorSet({self.provenance.expression!r}, layers {_ranges(self.layers)}, {self.provenance.model})"

    def map(self, change: Callable[[SteeringVector], SteeringVector]) -> VectorSet:
        """A set of `change(vector)` for every layer."""
        return VectorSet([change(vector) for vector in self.values()])

    def _with(self, other: VectorSet, sign: int) -> VectorSet:
        if not isinstance(other, VectorSet):
            return NotImplemented
        if other.layers != self.layers:
            raise InputError(
                f"sets with layers {_ranges(self.layers)} and {_ranges(other.layers)} cannot be combined; extract "
                "both with the same layers=."
            )
        return self.map(lambda v: v + other[v.layer] if sign > 0 else v - other[v.layer])

    def __mul__(self, factor: float) -> VectorSet:
        return self.map(lambda v: v * factor)

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> VectorSet:
        return self.map(lambda v: v / factor)

    def __neg__(self) -> VectorSet:
        return self.map(lambda v: -v)

    def __add__(self, other: VectorSet) -> VectorSet:
        return self._with(other, 1)

    def __sub__(self, other: VectorSet) -> VectorSet:
        return self._with(other, -1)

    def retarget(self, model: str) -> VectorSet:
        """The same directions for another model of equal shape, on purpose (base to chat, base to fine-tuned)."""
        return self.map(lambda v: v.retarget(model))

    def stack(self) -> Float[Tensor, "layer d_model"]:
        """The vectors as one tensor, layers ascending."""
        return torch.stack([vector.tensor for vector in self.values()])

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer: `layer`, `norm`, `residual_norm`, `relative_norm`."""
        import pandas as pd

        columns = ("layer", "norm", "residual_norm", "relative_norm")
        return pd.DataFrame([{name: getattr(v, name) for name in columns} for v in self.values()])

    def save(self, path: str | os.PathLike[str], *, format: str | None = None) -> None:
        """Writes the set, whole or not at all; `load_vectors` reads it.

        Args:
            path: where to; a `.safetensors` of the package's own keeps everything.
            format: `"own"`, `"gguf"`, `"caa"`, `"lm_eval"`, `"hub"` or `"remote"` (`caa_lens.formats` says what each carries);
                by default by the end of the path.

        Raises:
            InputError: the format cannot hold these vectors.
        """
        from caa_lens.formats import save_vectors

        save_vectors(self, path, format=format)


def normalize_across(sets: Mapping[str, VectorSet]) -> dict[str, VectorSet]:
    """Gives every behaviour the same norm at each layer: the mean of the behaviours' norms.

        v_b <- v_b * mean_b'(|v_b'|) / |v_b|

    All published evaluations of the paper use vectors normalised so over its seven behaviours.

    Args:
        sets: one `VectorSet` a behaviour, of the same model and layers.

    Raises:
        InputError: fewer than two sets, different models or layers, or a zero vector.
    """
    if len(sets) < 2:
        raise InputError(f"normalize_across needs at least two behaviours, got {len(sets)}.")
    first = next(iter(sets.values()))
    for name, vectors in sets.items():
        mine, others = vectors.provenance, first.provenance
        same = same_model(mine.model, others.model) and mine.basis == others.basis
        if vectors.layers != first.layers or not same:
            raise InputError(
                f"{name!r} has layers {_ranges(vectors.layers)} of {mine.model} ({mine.basis} weights), others have "
                f"{_ranges(first.layers)} of {others.model} ({others.basis} weights), whose norms cannot be compared; extract "
                "all from one model with the same layers=."
            )
        if not vectors.stack().norm(dim=-1).all():
            raise InputError(f"{name!r} holds a zero vector, which has no direction; leave the behaviour out.")
    scaled = {
        layer: rescale_to_mean_norm(torch.stack([vectors[layer].tensor for vectors in sets.values()]))
        for layer in first.layers
    }

    def normalized(v: SteeringVector, row: int) -> SteeringVector:
        tensor = scaled[v.layer][row]
        made = replace(v.provenance, normalized_across=tuple(sets))
        return v.derive(lambda control: control * float(tensor.norm() / v.norm), tensor=tensor, provenance=made)

    return {
        name: VectorSet([normalized(v, row) for v in vectors.values()])
        for row, (name, vectors) in enumerate(sets.items())
    }


def _ranges(layers: Sequence[int]) -> str:
    """`(0, 1, 2, 5)` as `"0-2, 5"`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
