"""Steering vectors as values: a direction with its layer and its history, and the set of them over layers.

    v[l] = mean_difference at the output of block l, 0-based = `blocks.<l>.hook_resid_post`

Strength is arithmetic: `1.5 * v`, `-v`, `v + w`. Vectors are immutable, kept in fp32 on the CPU, and cast to the
model's dtype and device where they are used. A vector carries its controls (the same activations under shuffled
labels, ...), and whatever is done to the vector is done to them: the controls of `v + w` are the sums of those that both have.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.directions import random_like, rescale_to_mean_norm
from caa_lens.errors import InputError, MissingError
from caa_lens.provenance import Provenance

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction in the residual stream at the output of one block.

    Attributes:
        tensor: the direction, fp32 on the CPU.
        layer: 0-based block whose output it belongs to.
        provenance: how it was made.
        residual_norm: mean |resid_post| at the positions read; None where it is not known.
        raw_norm: |v| as extracted, before any normalisation or scaling; None where it is not known.
        controls: what to compare it with, by name: vectors made from the same activations without the behaviour.

    Raises:
        InputError: not one-dimensional, not finite, or not `d_model` wide.
    """

    tensor: Float[Tensor, " d_model"]
    layer: int
    provenance: Provenance
    residual_norm: float | None = None
    raw_norm: float | None = None
    controls: Mapping[str, SteeringVector] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        tensor = torch.as_tensor(self.tensor).detach().to("cpu", torch.float32)
        if tensor.ndim != 1 or tensor.shape[0] != self.provenance.d_model:
            raise InputError(
                f"a steering vector for {self.provenance.model} has shape [{self.provenance.d_model}]; got "
                f"{list(tensor.shape)}. Take the vector of one layer, from this model."
            )
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"the vector of layer {self.layer} holds NaN or infinite values; extract it again, in float32 or "
                "bfloat16 if it was made in float16."
            )
        if not 0 <= self.layer < self.provenance.n_layers:
            raise InputError(
                f"layer {self.layer} is out of range: {self.provenance.model} has layers 0 to "
                f"{self.provenance.n_layers - 1}."
            )
        object.__setattr__(self, "tensor", tensor)
        stray = [name for name, control in self.controls.items() if control.layer != self.layer]
        if stray:
            raise InputError(f"the control {stray[0]!r} of a vector of layer {self.layer} belongs to another layer.")

    @property
    def hook_name(self) -> str:
        """`blocks.<layer>.hook_resid_post`."""
        return f"blocks.{self.layer}.hook_resid_post"

    @property
    def norm(self) -> float:
        """|v|, in the units of the residual stream."""
        return float(self.tensor.norm())

    @property
    def relative_norm(self) -> float | None:
        """|v| / |residual|: usable steering is about 0.1 to 0.4; text degenerates from about 0.35 to 0.5."""
        return self.norm / self.residual_norm if self.residual_norm else None

    def __repr__(self) -> str:
        ratio = "" if self.relative_norm is None else f", |v|/|residual| = {self.relative_norm:.2f}"
        return f"SteeringVector({self.provenance.expression!r}, layer {self.layer}, norm {self.norm:.3g}{ratio})"

    def _scaled(self, factor: float) -> SteeringVector:
        made = replace(self.provenance, expression=f"{factor:g} * {self.provenance.expression}")
        return self._with_controls(lambda v: v._scaled(factor), tensor=self.tensor * factor, provenance=made)

    def _with_controls(self, change: Callable[[SteeringVector], SteeringVector], **changes: Any) -> SteeringVector:
        """This vector with `changes`, its controls with the same change."""
        return replace(self, controls={name: change(control) for name, control in self.controls.items()}, **changes)

    def _sum(self, other: SteeringVector, sign: int) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if other.layer != self.layer:
            raise InputError(
                f"vectors of layers {self.layer} and {other.layer} cannot be added; to steer at both layers pass a "
                "list: steer(model, [v, w])."
            )
        provenance = self.provenance.combined(other.provenance, "+" if sign > 0 else "-")
        common = [name for name in self.controls if name in other.controls]
        return replace(
            self,
            tensor=self.tensor + sign * other.tensor,
            provenance=provenance,
            raw_norm=None,
            controls={name: self.controls[name]._sum(other.controls[name], sign) for name in common},
        )

    def __mul__(self, factor: float) -> SteeringVector:
        return self._scaled(float(factor))

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> SteeringVector:
        return self._scaled(1 / float(factor))

    def __neg__(self) -> SteeringVector:
        return self._scaled(-1.0)

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return self._sum(other, 1)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self._sum(other, -1)

    def with_norm(self, norm: float) -> SteeringVector:
        """The same direction at length `norm`."""
        if self.norm == 0:
            raise InputError("a zero vector has no direction to rescale; extract it from pairs that differ.")
        return self._scaled(norm / self.norm)

    def random_control(self, *, seed: int = 0) -> SteeringVector:
        """A random direction of the same norm at the same layer: what any push of this size does."""
        made = replace(self.provenance, expression=f"random({seed}) like {self.provenance.expression}")
        return replace(self, tensor=random_like(self.tensor, seed=seed), provenance=made, controls={})

    def at_layer(self, layer: int) -> SteeringVector:
        """The same direction to be used at another layer (the paper's layer transfer)."""
        if layer == self.layer:
            return self
        return self._with_controls(lambda v: v.at_layer(layer), layer=layer, residual_norm=None)

    def retarget(self, model: str) -> SteeringVector:
        """The same direction for another model of equal shape, on purpose (base to chat, base to fine-tuned)."""
        made = replace(self.provenance, model=model)
        return self._with_controls(lambda v: v.retarget(model), provenance=made, residual_norm=None)

    def to_basis(self, basis: str) -> SteeringVector:
        """Converts a raw vector of a LayerNorm model to centred weights, v - mean(v).

        Raises:
            InputError: for any other change; what centring removed cannot be restored.
        """
        if basis == self.provenance.basis:
            return self
        if basis != "centred":
            raise InputError(
                f"a vector in the {self.provenance.basis!r} basis cannot be converted to {basis!r}; extract it again "
                "from a model with unprocessed weights."
            )
        made = replace(self.provenance, basis=basis)
        return self._with_controls(
            lambda v: v.to_basis(basis), tensor=self.tensor - self.tensor.mean(), provenance=made
        )


class VectorSet(Mapping[int, SteeringVector]):
    """An immutable mapping from layer to `SteeringVector`, all of one origin; algebra acts on every layer.

    Args:
        vectors: the vectors, one a layer.
        controls: sets of controls by name, handed to the vectors of their layers in place of those that they have.

    Raises:
        InputError: no vector, two of the same layer, or different models.
        MissingError: controls that lack a layer; (on access) a layer that is not in the set.
    """

    def __init__(self, vectors: Sequence[SteeringVector], controls: Mapping[str, VectorSet] | None = None) -> None:
        if not vectors:
            raise InputError("a VectorSet needs at least one vector.")
        if controls is not None:
            vectors = [replace(v, controls={name: group[v.layer] for name, group in controls.items()}) for v in vectors]
        self._by_layer = {vector.layer: vector for vector in sorted(vectors, key=lambda vector: vector.layer)}
        if len(self._by_layer) != len(vectors):
            raise InputError("two vectors of the same layer in one VectorSet; add them, or pass a list to steer().")
        for vector in vectors:
            if (vector.provenance.model, vector.provenance.n_layers) != (self.provenance.model, self.n_layers):
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
        index = layer + self.n_layers if layer < 0 else layer
        if index not in self._by_layer:
            raise MissingError(f"no vector for layer {layer}; this set has the layers {_ranges(self.layers)}.")
        return self._by_layer[index]

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

    def stack(self) -> Float[Tensor, "layer d_model"]:
        """The vectors as one tensor, layers ascending."""
        return torch.stack([vector.tensor for vector in self.values()])

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer: `layer`, `norm`, `residual_norm`, `relative_norm`."""
        import pandas as pd

        columns = ("layer", "norm", "residual_norm", "relative_norm")
        return pd.DataFrame([{name: getattr(v, name) for name in columns} for v in self.values()])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the package's own format: one safetensors file, whole or not at all; `load_vectors` reads it."""
        from caa_lens.storage import save_vectors

        save_vectors(self, path)


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
        if vectors.layers != first.layers or (mine.model, mine.basis) != (others.model, others.basis):
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
        return v._with_controls(lambda control: control * float(tensor.norm() / v.norm), tensor=tensor, provenance=made)

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
