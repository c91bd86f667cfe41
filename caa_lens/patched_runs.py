"""Running patches: each is a branch of the target run, and everything before the first patched position is run once.

Rows are padded on the left, so that the position read is the last column of every row, and tokens are counted from the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caa_lens.alignment import Case, Column
from caa_lens.chunks import Chunks
from caa_lens.models import (
    Branch,
    Model,
    Prefix,
    capture_hooks,
    device_of,
    has_hooks,
    hooks,
    pad,
    run,
    run_branches,
)

Mode = Literal["replace", "add"]


@dataclass(frozen=True)
class Patches:
    """What is done at every position.

    Attributes:
        windows: the layers that are patched together, one window after the other.
        mode: replace the target's activations or add to them.
        directions: a vector for each layer; None takes the source run's activations.
    """

    windows: Sequence[range]
    mode: Mode
    directions: Mapping[int, Float[Tensor, " d_model"]] | None

    @property
    def layers(self) -> list[int]:
        """All layers that are patched."""
        return sorted({layer for window in self.windows for layer in window})


@dataclass(frozen=True)
class _Place:
    """Where the running columns change (`on`), and which columns of the source run go there."""

    on: Bool[Tensor, "case pos"]
    source: Int[Tensor, "case pos"]


class PatchedRuns:
    """Cases that are run together.

    Attributes:
        target, source: logit differences of the runs as they are (NaN where there is no source run).
    """

    @torch.no_grad()
    def __init__(self, model: Model, cases: Sequence[Case], patches: Patches, chunks: Chunks) -> None:
        self.model, self.cases, self.patches, self.chunks = model, cases, patches, chunks
        self.device, self.whole = device_of(model), has_hooks(model)
        self.answers = torch.tensor([case.answers for case in cases], device=self.device)
        self.activations: dict[int, Float[Tensor, "case pos d_model"]] = {}  # of the source runs, by layer
        self.target = self._whole([case.target.ids for case in cases])
        self.source = torch.full((len(cases),), float("nan"))
        sources = [case.source.ids for case in cases if case.source is not None]
        if sources:
            with hooks(model, capture_hooks(patches.layers, self.activations.__setitem__)):
                self.source = self._whole(sources)

    def run(self, columns: Sequence[Column]) -> Iterator[tuple[int, Float[Tensor, "case window"]]]:
        """Yields (number of the column, logit differences of the patched runs), each when it is done."""
        todo = []
        for number, column in enumerate(columns):
            if self.patches.mode == "replace" and not self.whole and column.changes_nothing(self.cases):
                yield number, self.target[:, None].expand(-1, len(self.patches.windows))
            else:
                todo.append(number)
        todo.sort(key=lambda number: sum(span.start for span in columns[number].target))
        past, done = None, [0] * len(self.cases)
        while todo:
            # In every row the prefix ends before the first position that one of the columns left changes.
            starts = [
                0 if self.whole else min(columns[i].target[row].start for i in todo) for row in range(len(self.cases))
            ]
            past, done = self._grown(past, done, starts), starts
            tokens, mask = self._pad([case.target.ids[s:] for case, s in zip(self.cases, starts, strict=True)])
            together = max(1, self.chunks.budget // (tokens.numel() * len(self.patches.windows)))
            group, todo = todo[:together], todo[together:]
            variants = partial(self._variants, tokens, mask, past)
            places = [self._place(columns[i], tokens.shape) for i in group]
            asked = [(window, place) for place in places for window in self.patches.windows]
            found = torch.stack(self.chunks.map(variants, asked, size=tokens.numel()), 1)
            yield from zip(group, found.split(len(self.patches.windows), 1), strict=True)

    def change(
        self, layer: int, place: _Place, x: Float[Tensor, "case pos d_model"]
    ) -> Float[Tensor, "case pos d_model"]:
        """The target's activations of a layer, patched."""
        if self.patches.directions is not None:
            new = self.patches.directions[layer].to(x.device, x.dtype)
        else:
            index = place.source.to(x.device).unsqueeze(-1).expand(-1, -1, x.shape[-1])
            new = self.activations[layer].gather(1, index)
        return torch.where(place.on.to(x.device).unsqueeze(-1), x + new if self.patches.mode == "add" else new, x)

    def difference(self, logits: Float[Tensor, "case read d_vocab"]) -> Float[Tensor, " case"]:
        """Logit of the positive minus that of the negative answer token, at the last position."""
        positive, negative = logits[:, -1].gather(1, self.answers.to(logits.device)).float().unbind(1)
        return (positive - negative).cpu()

    def _whole(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, " case"]:
        logits, _ = run(self.model, *self._pad(rows), logits=1)
        assert logits is not None
        return self.difference(logits)

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "case pos"], Int[Tensor, "case pos"]]:
        return pad(rows, side="left", device=self.device)

    @torch.no_grad()
    def _grown(self, past: Prefix | None, done: Sequence[int], starts: Sequence[int]) -> Prefix | None:
        rows = [case.target.ids[a:b] for case, a, b in zip(self.cases, done, starts, strict=True)]
        return run(self.model, *self._pad(rows), past=past, grow=True)[1] if any(rows) else past

    @torch.no_grad()
    def _variants(
        self,
        tokens: Int[Tensor, "case pos"],
        mask: Int[Tensor, "case pos"],
        past: Prefix | None,
        asked: Sequence[tuple[range, _Place]],
    ) -> list[Float[Tensor, " case"]]:
        """The logit differences of continuations of one prefix, each with its (layers patched together, place)."""
        at = torch.full((len(tokens), 1), tokens.shape[1] - 1, device=tokens.device)
        branches = [Branch({layer: partial(self.change, layer, place) for layer in window}) for window, place in asked]
        return run_branches(self.model, tokens, mask, branches, self.difference, at=at, past=past)

    def _place(self, column: Column, shape: torch.Size) -> _Place:
        on, source = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.long)
        width = max((len(case.source.ids) for case in self.cases if case.source is not None), default=0)
        for row, (case, here, there) in enumerate(zip(self.cases, column.target, column.source, strict=True)):
            first = shape[1] - len(case.target.ids) + here.start
            on[row, first : first + len(here)] = True
            if case.source is not None:
                behind = width - len(case.source.ids)
                source[row, first : first + len(here)] = torch.arange(there.start, there.stop) + behind
        return _Place(on.to(self.device), source.to(self.device))
