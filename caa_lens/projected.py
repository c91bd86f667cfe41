"""What `project` returns: one number a token, or a layer and token, with the tokens, as a table, a figure or coloured text."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from caa_lens.errors import InputError, MissingError
from caa_lens.files import atomic_path
from caa_lens.token_text import TokenLine, check_limit, fragment, number, page

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measure = Literal["dot", "cosine", "component"]
UNITS: Mapping[str, str] = {"dot": "x · v", "cosine": "cosine of x and v", "component": "x · v / |v|²"}


def along(
    activations: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"], measure: Measure
) -> Float[Tensor, "*batch"]:
    """The measure of each activation against the direction, in fp32; see `caa_lens.projection`."""
    x, v = activations.float(), direction.to(activations.device, torch.float32)
    dot = x @ v
    if measure == "dot":
        return dot
    if measure == "component":
        return dot / v.dot(v)
    return dot / (x.norm(dim=-1) * v.norm()).clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, eq=False, repr=False)
class Projection:
    """One number a token, or a layer and token.

    Attributes:
        values: `[token]` for one vector, `[layer, token]` for a `VectorSet` or where layers were asked for.
        tokens: the tokens' texts; joined, they are the text.
        token_ids: their ids.
        special: whether each is one of the tokenizer's special tokens.
        layers: 0-based, ascending.
        measure: `"dot"`, `"cosine"` or `"component"`.
        vector: what was projected on, in words.
        steering: what steering was on, in words; None for none.
        instruction_end: index of the prompt's last token, behind which the answer begins; None where it is not known (plain ids).
        provenance: model, revision, template.
    """

    values: Float[Tensor, "*layer token"]
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    special: tuple[bool, ...]
    layers: tuple[int, ...]
    measure: Measure
    vector: str
    steering: str | None
    instruction_end: int | None
    provenance: Mapping[str, Any]

    @property
    def title(self) -> str:
        """What is shown, in words."""
        steering = f", steered: {self.steering}" if self.steering else ""
        where = f"layer {self.layers[0]}" if len(self.layers) == 1 else f"layers {self.layers[0]} to {self.layers[-1]}"
        return f"{self.vector}, {where}, {UNITS[self.measure]}{steering}"

    def __repr__(self) -> str:
        return f"Projection({self.title!r}, {len(self.tokens)} tokens)"

    def __sub__(self, other: Projection) -> Projection:
        """What changed, token by token: `steered - unsteered`.

        Raises:
            InputError: other tokens, layers, measure or vector; `project(model, v, p)` projects the tokens of projection `p`.
        """
        if not isinstance(other, Projection):
            return NotImplemented
        for name in ("token_ids", "layers", "measure", "vector"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                given = "" if name == "token_ids" else f" ({mine!r} and {theirs!r})"
                raise InputError(
                    f"projections of different {name}{given} cannot be subtracted; project(model, vector, projection) runs "
                    "the same tokens again, with or without steering."
                )
        steering = f"{self.steering or 'none'} minus {other.steering or 'none'}"
        return replace(self, values=self.values - other.values, steering=steering)

    def at_layer(self, layer: int) -> Projection:
        """The values `[token]` of one layer.

        Raises:
            MissingError: the layer was not projected.
        """
        if layer not in self.layers:
            raise MissingError(f"no projection for layer {layer}; this one has the layers {list(self.layers)}.")
        values = torch.atleast_2d(self.values)[self.layers.index(layer)]
        return replace(self, values=values, layers=(layer,))

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer and token: `layer`, `position`, `token`, `token_id`, `value`."""
        import pandas as pd

        n_layers, n_tokens = len(self.layers), len(self.tokens)
        return pd.DataFrame(
            {
                "layer": [layer for layer in self.layers for _ in range(n_tokens)],
                "position": [*range(n_tokens)] * n_layers,
                "token": self.tokens * n_layers,
                "token_id": self.token_ids * n_layers,
                "value": self.values.flatten().tolist(),
            }
        )

    def plot(self, ax: Axes | None = None, *, interactive: bool = False) -> Figure | Any:
        """A figure: the values over the tokens, or a heat map of layer x token; see `caa_lens.plots.plot_projection`.

        Args:
            ax: where to draw; a new figure by default.
            interactive: a plotly figure, with every token's text and number where the mouse is, and a slider along a long text.
        """
        if interactive:
            from caa_lens import plots_interactive

            plots_interactive.refuse_axis(ax)
            return plots_interactive.plot_projection(self)
        from caa_lens.plots import plot_projection

        return plot_projection(self, ax=ax)

    def lines(self, *, limit: float | None = None) -> list[TokenLine]:
        """The tokens coloured by value, one text a layer.

        Args:
            limit: value of full colour; left out, each layer's own, that of `plot` for this layer alone.

        Raises:
            InputError: the limit is not above zero.
        """
        check_limit(limit)
        each = [self.at_layer(layer) for layer in self.layers]
        return [TokenLine(p.title, p.tokens, p.values.tolist(), p.special, limit) for p in each]

    def show(self, *, limit: float | None = None) -> None:
        """Shows the tokens coloured by value, orange above zero and blue below: in a notebook's output, else in the terminal.

        Several layers are texts that open and close, the middle one open; a terminal shows them one below the other.

        Args:
            limit: as in `lines`.
        """
        lines = self.lines(limit=limit)
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        if hasattr(shell, "kernel"):
            from IPython.display import display

            display({"text/html": fragment(lines, opened=self._middle), "text/plain": repr(self)}, raw=True)
            return
        console = Console(highlight=False)
        for line in lines:
            scale = f"blue -{number(line.scale)}, orange +{number(line.scale)}"
            console.print("; ".join(filter(None, [line.title, scale, line.outside])), markup=False, soft_wrap=True)
            console.print(line.rich, soft_wrap=True)

    def _repr_html_(self) -> str:
        return fragment(self.lines(), opened=self._middle)

    @property
    def _middle(self) -> int:
        return (len(self.layers) - 1) // 2

    def save_html(self, path: str | os.PathLike[str], *, limit: float | None = None) -> None:
        """Writes the coloured tokens as an HTML page that needs nothing else, whole or not at all.

        Args:
            path: the file.
            limit: as in `lines`.
        """
        text = page(self.lines(limit=limit), opened=self._middle)
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
