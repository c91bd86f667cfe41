"""How vectors and activations lie: cosines, principal components, separability, norms. No model is run.

    cosine(v, w) = v . w / (|v| |w|)
    PCA          = right singular vectors of the pairs' positive and negative activations together, minus their mean (fp64)

A principal component is turned so that the positives' mean lies to its right. Cosines of vectors with many dimensions are small by
chance (about 1/sqrt(d_model)), but activations share large common directions, so two vectors of one model can be alike for
reasons that have nothing to do with behaviour: compare with the controls (`similarity({"v": v, **v.controls})`).

Source: Rimsky et al., arXiv:2312.06681, sections 4 and 6 (PCA by layer, cosines between layers and between models).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.activations import Activations, layers_of, sides_of
from caa_lens.errors import InputError
from caa_lens.vector_set import VectorSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Similarity:
    """Cosine of every vector with every other.

    Attributes:
        values: cosines; 0 where one of the two is a zero vector.
        names: each row's set.
        layers: each row's layer.
    """

    values: Float[Tensor, "vector vector"]
    names: tuple[str, ...]
    layers: tuple[int, ...]

    def to_pandas(self) -> pd.DataFrame:
        """A square table, rows and columns labelled (name, layer)."""
        index = pd.MultiIndex.from_arrays([self.names, self.layers], names=["name", "layer"])
        return pd.DataFrame(self.values.numpy(), index=index, columns=index)

    def at_layer(self, layer: int) -> pd.DataFrame:
        """Names by names, at one layer."""
        return self.to_pandas().xs(layer, level="layer").xs(layer, level="layer", axis=1)

    def between(self, a: str, b: str) -> pd.DataFrame:
        """Layers of one set (rows) by layers of another, or of itself."""
        table = self.to_pandas()
        return table.loc[a, b]

    def plot(self, ax: Axes | None = None, *, interactive: bool = False) -> Figure | Any:
        """Heat map of all cosines, the sets in blocks; `interactive`: a plotly figure that names both vectors of a cell."""
        if interactive:
            from caa_lens import plots_interactive

            plots_interactive.refuse_axis(ax)
            return plots_interactive.plot_similarity(self)
        from caa_lens.plots_geometry import plot_similarity

        return plot_similarity(self, ax=ax)


def similarity(sets: Mapping[str, VectorSet], *, layers: Sequence[int] | None = None) -> Similarity:
    """Cosine similarity between layers, behaviours, or models of equal width.

    Args:
        sets: vectors by name: behaviours, controls, base and chat models.
        layers: which layers; all that a set has by default.

    Raises:
        InputError: no set, sets of different width, or of different weight basis, whose cosines mean nothing.
        MissingError: a layer that a set does not have.

    Example:
        >>> caa.similarity({"formality": a, "sentiment": b}).between("formality", "sentiment")  # doctest: +SKIP
    """
    if not sets:
        raise InputError("no vectors to compare; give {'name': VectorSet, ...}.")
    first = next(iter(sets.values())).provenance
    for name, vectors in sets.items():
        mine = vectors.provenance
        if (mine.d_model, mine.basis) != (first.d_model, first.basis):
            raise InputError(
                f"{name!r} has width {mine.d_model} ({mine.basis} weights), others have {first.d_model} ({first.basis} "
                "weights); only directions of one width and basis can be compared (to_basis converts raw to centred)."
            )
    chosen = [
        (name, vectors[layer])
        for name, vectors in sets.items()
        for layer in (vectors.layers if layers is None else layers)
    ]
    stacked = torch.stack([vector.tensor.double() for _, vector in chosen])
    units = stacked / stacked.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    values = (units @ units.T).clamp(-1, 1).float()
    return Similarity(values, tuple(name for name, _ in chosen), tuple(vector.layer for _, vector in chosen))


@dataclass(frozen=True)
class PCA:
    """Principal components of both sides' activations together, one decomposition a layer.

    Attributes:
        layers: the layers.
        positive, negative: coordinates of the pairs' two sides.
        components: unit vectors, turned so that the positives' mean coordinate is the larger one.
        explained: share of the variance along each component.
    """

    layers: tuple[int, ...]
    positive: Float[Tensor, "layer pair component"]
    negative: Float[Tensor, "layer pair component"]
    components: Float[Tensor, "layer component d_model"]
    explained: Float[Tensor, "layer component"]

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer, pair and side: `layer`, `pair`, `side`, `pc1`, `pc2`, ..."""
        names = [f"pc{number + 1}" for number in range(self.explained.shape[1])]
        parts = [
            pd.DataFrame(points.numpy(), columns=names).assign(layer=layer, pair=range(len(points)), side=side)
            for row, layer in enumerate(self.layers)
            for side, points in (("positive", self.positive[row]), ("negative", self.negative[row]))
        ]
        return pd.concat(parts, ignore_index=True)[["layer", "pair", "side", *names]]

    def plot(self, layer: int | None = None, ax: Axes | None = None, *, interactive: bool = False) -> Figure | Any:
        """The pairs along the first two components: one layer, or small multiples of all.

        Args:
            layer: which; all by default.
            ax: where to draw one layer; a new figure by default.
            interactive: a plotly figure that names the pair of a point, with a slider over the layers.
        """
        if interactive:
            from caa_lens import plots_interactive

            plots_interactive.refuse_axis(ax)
            return plots_interactive.plot_pca(self, layer=layer)
        from caa_lens.plots_geometry import plot_pca

        return plot_pca(self, layer=layer, ax=ax)


def pca(activations: Activations, *, layers: Sequence[int] | None = None, n_components: int = 2) -> PCA:
    """Principal components of the positive and negative activations of each layer.

    Args:
        activations: a store written by `extract(..., store=...)`, or {layer: (positive, negative)}, `[pair, d_model]` each.
        layers: which layers; all by default.
        n_components: how many components.

    Raises:
        InputError: a layer that is not stored, or more components than the activations have.
    """
    chosen = layers_of(activations, layers)
    found = []
    for layer in chosen:
        positive, negative = (side.double() for side in sides_of(activations, layer))
        both = torch.cat([positive, negative])
        if not 1 <= n_components <= min(both.shape):
            raise InputError(
                f"n_components={n_components}: {len(both)} activations of width {both.shape[1]} have 1 to {min(both.shape)}."
            )
        centred = both - both.mean(0)
        _, sizes, components = torch.linalg.svd(centred, full_matrices=False)
        components = components[:n_components]
        turned = torch.where((positive - negative).mean(0) @ components.T < 0, -1.0, 1.0)
        components = components * turned[:, None]
        variances = sizes**2
        # Activations that are all alike have no variance to share out.
        explained = variances[:n_components] / variances.sum().clamp(min=1e-300)
        found.append((centred @ components.T, components, explained))
    points, directions, shares = (torch.stack(part).float() for part in zip(*found, strict=True))
    half = points.shape[1] // 2
    return PCA(tuple(chosen), points[:, :half], points[:, half:], directions, shares)


@dataclass(frozen=True)
class Norms:
    """Lengths of vectors and of the residual stream they are added to.

    Attributes:
        table: one row a set and layer: `name`, `layer`, `norm`, `residual_norm`, `relative_norm`.
    """

    table: pd.DataFrame

    def to_pandas(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def plot(self, ax: Axes | None = None) -> Figure:
        """|v| / |residual| by layer, over the range in which steering is usable."""
        from caa_lens.plots_geometry import plot_norms

        return plot_norms(self, ax=ax)


def norms(sets: Mapping[str, VectorSet]) -> Norms:
    """|v|, mean |resid_post| at the positions read, and their ratio, by layer; the ratio is at multiplier 1.

    Usable steering is about 0.1 to 0.4 of the residual norm; text degenerates from about 0.35 to 0.5.

    Raises:
        InputError: no set.
    """
    if not sets:
        raise InputError("no vectors to measure; give {'name': VectorSet, ...}.")
    parts = [vectors.to_pandas().assign(name=name) for name, vectors in sets.items()]
    return Norms(pd.concat(parts, ignore_index=True)[["name", "layer", "norm", "residual_norm", "relative_norm"]])
