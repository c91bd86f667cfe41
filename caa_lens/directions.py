"""Tensor mathematics of steering directions: estimators, operators, comparisons. No model, no tokenizer.

    v_l = mean over pairs of (resid_post_l[positive] - resid_post_l[negative])          (difference of means)
    add:     x -> x + s v
    ablate:  x -> x - s (x . u) u                     u = v / |v|
    clamp:   x -> x - (x . u) u + s v                 the component along v becomes that of s v
    gate:    x -> operator(x) where x . w > threshold, else x

Directions point from negative to positive. A zero direction (`0 * v`, `v - v`) has no unit vector and leaves the
activations exactly as they are under every operator.

Source: Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", arXiv:2312.06681. The mean difference
contains every feature that differs between the two sides, wanted or not; compare with the controls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.errors import InputError

Strength = float | Float[Tensor, "batch 1 1"]
"""One strength for all rows, or one a row."""

Operator = Callable[[Tensor, Tensor, Strength], Tensor]
"""`operator(activations [..., d_model], direction [d_model], strength) -> activations [..., d_model]`."""


def unit(direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The direction at length 1; a zero direction stays zero."""
    norm = direction.norm()
    return direction / norm if norm > 0 else direction


def component(
    activations: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"]
) -> Float[Tensor, "*batch 1"]:
    """Length of the activations along the direction, x . v / |v|, in fp32."""
    return (activations.float() @ unit(direction.to(activations.device, torch.float32))).unsqueeze(-1)


def add(
    activations: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"], strength: Strength = 1.0
) -> Float[Tensor, "*batch d_model"]:
    """x + s v: contrastive activation addition. The sum is taken in the activations' dtype."""
    return activations + (strength * direction).to(activations.device, activations.dtype)


def ablate(
    activations: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"], strength: Strength = 1.0
) -> Float[Tensor, "*batch d_model"]:
    """x - s (x . u) u: removes the component along the direction (all of it at s = 1); the length of v is irrelevant."""
    along = component(activations, direction) * unit(direction.to(activations.device, torch.float32))
    return activations - (strength * along).to(activations.dtype)


def clamp(
    activations: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"], strength: Strength = 1.0
) -> Float[Tensor, "*batch d_model"]:
    """x - (x . u) u + s v: sets the component along the direction to that of s v, whatever it was."""
    direction = direction.to(activations.device, torch.float32)
    change = strength * direction - component(activations, direction) * unit(direction)
    return activations + change.to(activations.dtype)


def gate(
    operator: Operator, threshold: float, *, along: Float[Tensor, " d_model"] | None = None, below: bool = False
) -> Operator:
    """An operator that acts only where the activations' component along a direction passes a threshold.

    Args:
        operator: `add`, `ablate`, `clamp` or a function like them.
        threshold: compared with x . w / |w|, in the units of the residual stream.
        along: w; by default the steering direction itself (so `-1 * v` turns the gate's direction too).
        below: act where the component is below the threshold in place of above it.

    Raises:
        InputError: `along` is no tensor.
    """

    if along is not None and not isinstance(along, Tensor):
        raise InputError(
            f"gate(along=) takes a tensor [d_model], got {type(along).__name__}; of a vector v, take v.tensor."
        )

    def gated(activations: Tensor, direction: Tensor, strength: Strength = 1.0) -> Tensor:
        size = component(activations, direction if along is None else along)
        passes = size < threshold if below else size > threshold
        return torch.where(passes, operator(activations, direction, strength), activations)

    return gated


@dataclass
class Moments:
    """Running sums over pairs, from which vectors are computed; memory does not grow with the number of pairs.

    Kept in fp64 on the CPU. The sums of two disjoint parts add up to those of the whole (`merge`).

    Attributes:
        count: number of pairs summed.
        positive, negative: sums of the activations read on either side.
        residual_norm: sum over pairs of the mean of the two sides' |resid_post|.
        controls: sums of weighted differences, one row a control (label-shuffled vectors).
    """

    count: int
    positive: Float[Tensor, "layer d_model"]
    negative: Float[Tensor, "layer d_model"]
    residual_norm: Float[Tensor, " layer"]
    controls: Float[Tensor, "control layer d_model"]

    @classmethod
    def zeros(cls, n_layers: int, d_model: int, n_controls: int = 0) -> Moments:
        """Moments of no pairs."""
        f64 = torch.float64
        sums = torch.zeros(n_layers, d_model, dtype=f64)
        return cls(
            0,
            sums,
            sums.clone(),
            torch.zeros(n_layers, dtype=f64),
            torch.zeros(n_controls, n_layers, d_model, dtype=f64),
        )

    def update(
        self,
        positive: Float[Tensor, "pair layer d_model"],
        negative: Float[Tensor, "pair layer d_model"],
        weights: Float[Tensor, "control pair"] | None = None,
    ) -> None:
        """Adds a batch of pairs; `weights` multiply the differences that the controls sum."""
        positive, negative = positive.to("cpu", torch.float64), negative.to("cpu", torch.float64)
        self.count += len(positive)
        self.positive += positive.sum(0)
        self.negative += negative.sum(0)
        self.residual_norm += (positive.norm(dim=-1) + negative.norm(dim=-1)).sum(0) / 2
        if weights is not None:
            self.controls += torch.einsum("cp,pld->cld", weights.to("cpu", torch.float64), positive - negative)

    def merge(self, other: Moments) -> Moments:
        """Moments of both parts together."""
        return Moments(
            self.count + other.count,
            self.positive + other.positive,
            self.negative + other.negative,
            self.residual_norm + other.residual_norm,
            self.controls + other.controls,
        )

    @property
    def mean_difference(self) -> Float[Tensor, "layer d_model"]:
        """v_l for every layer, fp32."""
        return ((self.positive - self.negative) / self.count).float()

    @property
    def mean_controls(self) -> Float[Tensor, "control layer d_model"]:
        """The controls' weighted mean differences, fp32."""
        return (self.controls / self.count).float()

    @property
    def mean_residual_norm(self) -> Float[Tensor, " layer"]:
        """Mean |resid_post_l| at the positions read, fp32."""
        return (self.residual_norm / self.count).float()


def shuffled_signs(n_pairs: int, n_shuffles: int, *, seed: int = 0) -> Float[Tensor, "control pair"]:
    """Rows of +1 and -1, half of each: weights under which a mean difference is that of shuffled labels."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.ones(n_shuffles, n_pairs)
    for row in signs:
        row[torch.randperm(n_pairs, generator=generator)[: n_pairs // 2]] = -1
    return signs


def control_weights(
    keys: Sequence[str | None], *, n_shuffles: int = 3, seed: int = 0
) -> dict[str, Float[Tensor, " pair"]]:
    """Weights w_i under which mean_i(w_i * difference_i) is a control direction.

    Args:
        keys: each pair's answer letter, None for free text.
        n_shuffles: number of label-shuffled directions.
        seed: of the shuffles.

    Returns:
        `shuffled-<k>`; and where all pairs have letters of at least two kinds, `letter`, the letter itself
        (half of mean over pairs keyed with the first letter minus mean over those keyed with the second), and
        `letter-balanced`, the mean over keys of the mean within each, in which the letter cancels.
    """
    if len(keys) < 2:
        return {}  # one pair's labels cannot be shuffled
    weights = {f"shuffled-{k}": row for k, row in enumerate(shuffled_signs(len(keys), n_shuffles, seed=seed))}
    counts = Counter(keys)
    if None in counts or len(counts) < 2:
        return weights
    first, second = sorted(key for key, _ in counts.most_common(2) if key is not None)
    sign = {first: 0.5, second: -0.5}
    letter = [sign.get(key or "", 0.0) * len(keys) / counts[key] for key in keys]
    balanced = [len(keys) / (len(counts) * counts[key]) for key in keys]
    return weights | {"letter": torch.tensor(letter), "letter-balanced": torch.tensor(balanced)}


def random_like(direction: Float[Tensor, " d_model"], *, seed: int) -> Float[Tensor, " d_model"]:
    """A random direction, uniform on the sphere of radius |direction|: the norm-matched control."""
    noise = torch.randn(direction.shape, generator=torch.Generator().manual_seed(seed))
    return noise * (direction.norm() / noise.norm())


def cosine(a: Float[Tensor, "*batch d_model"], b: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """Cosine similarity over the last axis; 0 where one of the two is zero."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1, eps=1e-30).float()


def rescale_to_mean_norm(directions: Float[Tensor, "behaviour d_model"]) -> Float[Tensor, "behaviour d_model"]:
    """v_b * mean_b'(|v_b'|) / |v_b|: every behaviour at the mean norm of all, as in the published evaluations."""
    norms = directions.double().norm(dim=-1, keepdim=True)
    return (directions * (norms.mean() / norms)).float()
