"""Steering vectors as values: a direction with its layer and its history.

    v[l] = mean_difference at the output of block l, 0-based = `blocks.<l>.hook_resid_post`

Strength is arithmetic: `1.5 * v`, `-v`, `v + w`. Vectors are immutable, kept in fp32 on the CPU, and cast to the
model's dtype and device where they are used. A vector carries its controls (the same activations under shuffled
labels, ...), and whatever is done to the vector is done to them: the controls of `v + w` are the sums of those that both have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.directions import random_like
from caa_lens.errors import InputError
from caa_lens.provenance import Provenance


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
    __array_ufunc__ = None  # NumPy leaves `np.float64(2) * v` to this class

    def __post_init__(self) -> None:
        tensor = torch.as_tensor(self.tensor).detach().to("cpu", torch.float32, copy=True)
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
        return self.derive(lambda v: v._scaled(factor), tensor=self.tensor * factor, provenance=made)

    def derive(self, change: Callable[[SteeringVector], SteeringVector], **changes: Any) -> SteeringVector:
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
        return self.derive(lambda v: v.at_layer(layer), layer=layer, residual_norm=None)

    def retarget(self, model: str) -> SteeringVector:
        """The same direction for another model of equal shape, on purpose (base to chat, base to fine-tuned)."""
        made = replace(self.provenance, model=model)
        return self.derive(lambda v: v.retarget(model), provenance=made, residual_norm=None)

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
        return self.derive(lambda v: v.to_basis(basis), tensor=self.tensor - self.tensor.mean(), provenance=made)
