"""Activation patching: what a run becomes when its activations at some places are those of another run, or a vector.

    replace:  x_l[p] <- s_l[p]           add:  x_l[p] <- x_l[p] + s_l[p]         x: target run, s: source run or v_l
    effect     = d(patched) - d(target)                     d = logit(positive answer) - logit(negative answer)
    normalized = effect / (d(source) - d(target))           0 = target, 1 = source

x_l is `resid_post` of block l; with `window=w` the blocks l to l + w - 1 are patched together. A patch at position p acts on the
logits at p and behind it only, so every run ends where it is read; and everything before the first patched position is run once.
Equal to one forward pass for each layer and position, with hooks; nothing is approximated.

An effect says that the place carries what distinguishes these two runs, not that it is the only place, nor that effects add up:
one position of several redundant ones can show none.

Source: Vig et al., arXiv:2004.12265; Meng et al., arXiv:2202.05262 (windows); Zhang and Nanda, arXiv:2309.16042 (practice).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.alignment import Answers, Case, Column, Position, cases_of, columns_of
from caa_lens.chunks import Chunks
from caa_lens.errors import InputError
from caa_lens.hooks import flatten, template_for
from caa_lens.models import Model, check_layers, describe, has_hooks, tokenizer_of
from caa_lens.pairs import ContrastPair, PairSet
from caa_lens.patched_runs import Mode, PatchedRuns, Patches
from caa_lens.positions import is_steered
from caa_lens.prompts import Conversation, Template
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PatchResult:
    """Logit differences (positive minus negative answer) of the patched runs, in logits.

    Attributes:
        patched: with the activations of one layer (or window of layers) and position patched.
        target: of the target runs as they are.
        source: of the source runs; None where a vector was the source.
        layers: the rows: the layer, or the lowest of the window.
        positions: the columns, as they were asked for.
        tokens: the columns' token, or their name where they are spans or differ between pairs.
        provenance: model, source, mode, window, template, pairs.
    """

    patched: Float[Tensor, "pair layer position"]
    target: Float[Tensor, " pair"]
    source: Float[Tensor, " pair"] | None
    layers: tuple[int, ...]
    positions: tuple[int | str, ...]
    tokens: tuple[str, ...]
    provenance: Mapping[str, Any]

    @property
    def effect(self) -> Float[Tensor, "layer position"]:
        """d(patched) - d(target), mean over pairs."""
        return self._effects.mean(0)

    @property
    def normalized(self) -> Float[Tensor, "layer position"]:
        """Mean effect over the mean of d(source) - d(target): 0 is the target run, 1 the source run.

        Raises:
            InputError: the source is a vector, or source and target do not differ.
        """
        if self.source is None:
            raise InputError("a vector has no run of its own to be measured by; read .effect, in logits.")
        distance = (self.source - self.target).mean()
        if distance == 0:
            raise InputError("source and target have the same logit difference; compare other answers.")
        return self.effect / distance

    @property
    def _effects(self) -> Float[Tensor, "pair layer position"]:
        return self.patched - self.target[:, None, None]

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer and position: `layer`, `position`, `token`, `effect`, its standard error over pairs `se` (NaN for one
        pair), and `normalized` where there is a source run."""
        rows = [
            {"layer": layer, "position": position, "token": token}
            for layer in self.layers
            for position, token in zip(self.positions, self.tokens, strict=True)
        ]
        table = pd.DataFrame(rows)
        n = len(self.patched)
        table["effect"] = self.effect.flatten().numpy()
        table["se"] = (self._effects.std(0) / n**0.5).flatten().numpy() if n > 1 else float("nan")
        if self.source is not None:
            table["normalized"] = self.normalized.flatten().numpy()
        return table

    @property
    def shown(self) -> tuple[Float[Tensor, "layer position"], str]:
        """What figures show, and its unit: the normalised effect, or the effect in logits where a vector was the source."""
        if self.source is None:
            return self.effect, "effect on the logit difference (logits)"
        return self.normalized, "effect (0 = target, 1 = source)"

    def plot(self, ax: Axes | None = None, *, interactive: bool = False) -> Figure | Any:
        """Heat map of layers and positions: the normalised effect, or the effect in logits where a vector was the source.

        Args:
            ax: where to draw; a new figure by default.
            interactive: a plotly figure, with the effect and its standard error where the mouse is.
        """
        if interactive:
            from caa_lens import plots_interactive

            plots_interactive.refuse_axis(ax)
            return plots_interactive.plot_patch(self)
        from caa_lens.plots import plot_heatmap

        values, unit = self.shown
        return plot_heatmap(
            values, self.layers, self.tokens, row_name="layer", column_name="position patched", unit=unit, ax=ax
        )


def patch(
    model: Model,
    source: SteeringVector | VectorSet | Conversation,
    target: Conversation | ContrastPair | PairSet,
    layers: Sequence[int] | None = None,
    *,
    positions: Position | Sequence[Position] | None = None,
    answers: Answers | None = None,
    mode: Mode | None = None,
    window: int = 1,
    template: Template | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> PatchResult:
    """Puts activations of a source run, or a vector, into a target run, at every layer and position by itself.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        source: a prompt or conversation; for contrast pairs the side `"positive"` or `"negative"`, the other side being the
            target; or a vector: a `SteeringVector` (the same direction at every layer asked for) or a `VectorSet` (each
            layer's own).
        target: a prompt or conversation, a `ContrastPair`, or a `PairSet` (means over its pairs).
        layers: which layers, 0-based, negative from the end; all by default, for a vector its own.
        positions: the columns of the result: indices into the tokens that are run (negative from the position read, which is
            -1), slices, or names of the template's spans (`"prefix"`, `"instruction_end"`, `"completion"`), each patched
            as a whole. By default every token by itself, for runs of equal length.
        answers: the two continuations whose first differing tokens are compared, positive first; or a function of a pair that
            returns them. Needed for texts. By default a vector is read where the pair's completions begin to differ; two sides
            at the last token that differs while both go on, so that what differs before it is what can be patched.
        mode: `"replace"` or `"add"`; by default a run's activations replace, a vector is added.
        window: how many layers are patched together, from each layer upwards.
        template: how prompts are written; the model's default otherwise.
        batch_size: pairs run together; it changes the speed only. With hooks of yours on the model, every run is made whole and
            by itself, so that they act as in a pass of your own.
        progress: show a progress bar.

    Returns:
        The effect for each layer and position.

    Raises:
        InputError: source, target, positions and answers that do not go together; before the model is run.
        MissingError: a layer that the model or the `VectorSet` does not have.

    Example:
        >>> caa.patch(model, "positive", pairs[0]).plot()  # doctest: +SKIP
        >>> texts = "The Eiffel Tower is in", "The Colosseum is in"  # doctest: +SKIP
        >>> caa.patch(model, *texts, answers=(" Paris", " Rome"), positions=-1, template=caa.Plain())  # doctest: +SKIP
    """
    info, tokenizer, chosen = describe(model), tokenizer_of(model), template_for(model, template)
    if is_steered(model):
        raise InputError("patch() runs the model's own activations; leave the steer() context.")
    vector = source if isinstance(source, (SteeringVector, VectorSet)) else None
    mode = mode or ("replace" if vector is None else "add")
    if mode not in ("replace", "add"):
        raise InputError(f"mode={mode!r}: allowed are 'replace' and 'add'.")
    if window < 1 or batch_size < 1:
        raise InputError(f"window={window} and batch_size={batch_size} must be at least 1.")
    if vector is not None:
        flatten(model, vector)
        layers = layers or ([vector.layer] if isinstance(vector, SteeringVector) else vector.layers)
    rows = tuple(check_layers(model, list(range(info.n_layers) if layers is None else layers)))
    windows = [range(row, min(row + window, info.n_layers)) for row in rows]
    patches = Patches(windows, mode, None)
    if vector is not None:
        by_layer = vector if isinstance(vector, VectorSet) else dict.fromkeys(patches.layers, vector)
        patches = replace(patches, directions={layer: by_layer[layer].tensor for layer in patches.layers})
    cases = cases_of(tokenizer, chosen, None if vector is not None else source, target, answers)
    columns = columns_of(cases, positions)
    for case in cases:
        longest = max(len(each.ids) for each in (case.target, case.source) if each is not None)
        info.require_room(case.name, longest)

    n, chunks = len(cases), Chunks()
    batch_size = 1 if has_hooks(model) else batch_size
    patched = torch.zeros(n, len(rows), len(columns))
    baseline, reference = torch.zeros(n), torch.zeros(n)
    order = sorted(range(n), key=lambda i: len(cases[i].target.ids))
    with tqdm(total=n * len(columns), desc="patch", unit="position", disable=not progress) as bar:

        def fill(index: Sequence[int]) -> Sequence[int]:
            before = bar.n
            try:
                runs = PatchedRuns(model, [cases[i] for i in index], patches, chunks)
                baseline[index], reference[index] = runs.target, runs.source
                for number, values in runs.run([column.of(index) for column in columns]):
                    patched[index, :, number] = values
                    bar.update(len(index))
            except Exception:  # out of memory, and begun again with fewer cases
                bar.update(before - bar.n)
                raise
            return index

        Chunks(batch_size).map(fill, order, size=1)
    return PatchResult(
        patched,
        baseline,
        None if vector is not None else reference,
        rows,
        tuple(column.label for column in columns),
        tuple(_token(tokenizer, cases, column) for column in columns),
        {
            "model": info.name,
            "source": vector.provenance.expression if isinstance(vector, VectorSet) else repr(source),
            "target": target.hash if isinstance(target, PairSet) else repr(target),
            "mode": mode,
            "window": window,
            "template": repr(chosen),
        },
    )


def _token(tokenizer: Any, cases: Sequence[Case], column: Column) -> str:
    tokens = {
        case.target.ids[span.start] if len(span) == 1 else None for case, span in zip(cases, column.target, strict=True)
    }
    token = tokens.pop() if len(tokens) == 1 and isinstance(column.label, int) else None
    return str(column.label) if token is None else tokenizer.decode([token])
