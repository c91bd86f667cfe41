"""Whether a direction tells the two sides of contrast pairs apart, on pairs it was not fitted on.

    AUROC = P(positive x . v > negative x . v) + P(equal) / 2, over all held-out positives and negatives
    v     = mean difference of other pairs; beside it the same with the two sides of a random half of them exchanged

An AUROC near 1 says that the sides differ along v, not that v steers. Shuffled fits scatter widely on both sides of 0.5: any
direction of a few strong shared components separates a little, one way or the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.activations import Activations, layers_of, sides_of
from caa_lens.directions import shuffled_signs
from caa_lens.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def auroc(positive: Float[Tensor, " a"], negative: Float[Tensor, " b"]) -> float:
    """Probability that a positive is larger than a negative, ties counted half: the area under the ROC curve."""
    return float(_wins(positive, negative).mean())


def _wins(positive: Float[Tensor, " a"], negative: Float[Tensor, " b"]) -> Float[Tensor, "a b"]:
    return ((positive[:, None] - negative).sign().double() + 1) / 2


@dataclass(frozen=True)
class Separability:
    """How well the mean difference of one set of pairs tells the two sides of other pairs apart.

    Attributes:
        layers: the layers.
        auroc: of held-out pairs; 0.5 is chance.
        low, high: 95% bootstrap interval over held-out pairs.
        shuffled: AUROCs of fits to shuffled labels, evaluated with the true ones; they scatter on both sides of 0.5.
        n: held-out pairs.
    """

    layers: tuple[int, ...]
    auroc: Float[Tensor, " layer"]
    low: Float[Tensor, " layer"]
    high: Float[Tensor, " layer"]
    shuffled: Float[Tensor, "layer shuffle"]
    n: int

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer: `layer`, `auroc`, `low`, `high`, the shuffled fits' `shuffled_mean`, and `shuffled_low`, `shuffled_high`
        (their 2.5% and 97.5% quantiles), `n`."""
        quantiles = torch.tensor([0.025, 0.975], dtype=self.shuffled.dtype)
        low, high = self.shuffled.quantile(quantiles, dim=1)
        return pd.DataFrame(
            {
                "layer": self.layers,
                "auroc": self.auroc.numpy(),
                "low": self.low.numpy(),
                "high": self.high.numpy(),
                "shuffled_mean": self.shuffled.mean(1).numpy(),
                "shuffled_low": low.numpy(),
                "shuffled_high": high.numpy(),
                "n": self.n,
            }
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """AUROC by layer with its interval, over the band of the shuffled fits."""
        from caa_lens.plots_geometry import plot_separability

        return plot_separability(self, ax=ax)


def separability(
    train: Activations,
    held_out: Activations,
    *,
    layers: Sequence[int] | None = None,
    n_shuffles: int = 50,
    seed: int = 0,
) -> Separability:
    """AUROC of the projection on the mean difference, fitted on one set of pairs and evaluated on another, by layer.

    Args:
        train, held_out: stores written by `extract(..., store=...)` for the two parts of `pairs.split(...)`, or
            {layer: (positive, negative)}.
        layers: which layers; all of `train` by default.
        n_shuffles: fits with the two sides of a random half of the pairs exchanged.
        seed: of the shuffles and of the bootstrap.

    Raises:
        InputError: a layer that is not stored in both, or the same activations twice.
    """
    if train is held_out or (not isinstance(train, Mapping) and str(train) == str(held_out)):
        raise InputError(
            "train and held_out are the same activations, on which the fit would be judged by itself; extract the two parts "
            "of pairs.split(...) into two stores."
        )
    chosen = layers_of(held_out, layers_of(train, layers))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layer in chosen:
        positive, negative = (side.double() for side in sides_of(train, layer))
        differences = positive - negative
        signs = shuffled_signs(len(differences), n_shuffles, seed=seed).double()
        fits = torch.cat([torch.ones(1, len(differences), dtype=torch.float64), signs]) @ differences
        right, wrong = (side.double() @ fits.T for side in sides_of(held_out, layer))
        wins = _wins(right[:, 0], wrong[:, 0])
        n = len(wins)
        drawn = torch.randint(n, (1000, n), generator=generator)
        counts = torch.zeros(1000, n, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(1000, n, dtype=torch.float64)
        )
        resampled = ((counts @ wins) * counts).sum(1) / n**2
        bounds = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        shuffled = [auroc(right[:, i], wrong[:, i]) for i in range(1, n_shuffles + 1)]
        found.append((float(wins.mean()), *bounds.tolist(), shuffled))
    value, low, high, by_chance = zip(*found, strict=True)
    return Separability(
        tuple(chosen), torch.tensor(value), torch.tensor(low), torch.tensor(high), torch.tensor(by_chance), n
    )
