"""Which token positions are steered: one boolean per token, by absolute position in each row's own sequence.

    after_instruction   the template's last token and everything behind it, generated tokens included (the paper's)
    generated           everything behind the template's last token
    last                the prompt's last token only
    all                 every token
    slice               absolute positions; negative bounds count from the prompt's end, an open end includes generation
    mask                a boolean tensor over the prompt's columns; generated tokens are not steered
    function            token ids [pos] -> boolean [pos], called with all ids of a row so far

Padding is never counted, and never steered but where it makes no difference (`all`, without a mask). With a KV cache a forward pass
sees only new tokens; `PositionTracker` keeps what came before, so that a cached run, an uncached run and a padded batch are masked
alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from caa_lens.errors import InputError
from caa_lens.models import Inputs, Model, tokenizer_of
from caa_lens.prompts import Template

NamedPositions = Literal["after_instruction", "generated", "last", "all"]
Positions = NamedPositions | slice | Bool[Tensor, "*batch pos"] | Callable[[Int[Tensor, " pos"]], Bool[Tensor, " pos"]]

_PROMPTS: ContextVar[Sequence[int] | None] = ContextVar("caa_lens_prompts", default=None)
"""Per row, the index of the prompt's last token, while this package runs prompts that it wrote itself."""


@contextmanager
def known_prompts(instruction_ends: Sequence[int]) -> Iterator[None]:
    """Tells active steering where each row's prompt ends, in place of searching the tokens for the marker."""
    token = _PROMPTS.set(list(instruction_ends))
    try:
        yield
    finally:
        _PROMPTS.reset(token)


_STEERED: list[int] = []
"""Identities of the models inside a `steer` context, one entry a context."""


@contextmanager
def marked_as_steered(model: Model) -> Iterator[None]:
    """Lets the rest of the package know that the model is steered inside the block."""
    _STEERED.append(id(model))
    try:
        yield
    finally:
        _STEERED.remove(id(model))


def is_steered(model: Model) -> bool:
    """Whether a `steer` context of this model is open."""
    return id(model) in _STEERED


def check_positions(positions: Any) -> None:
    """Refuses anything that is not one of the choices in the module's docstring.

    Raises:
        InputError: says what is allowed.
    """
    named = isinstance(positions, str) and positions in get_args(NamedPositions)
    mask = isinstance(positions, Tensor) and positions.dtype == torch.bool and positions.ndim in (1, 2)
    step = isinstance(positions, slice) and positions.step not in (None, 1)
    if step or not (named or mask or isinstance(positions, slice) or callable(positions)):
        raise InputError(
            f"positions={positions!r}: allowed are {', '.join(map(repr, get_args(NamedPositions)))}, a slice of step 1, a "
            "boolean mask [pos] or [batch, pos], or a function from token ids [pos] to a boolean [pos]."
        )


def needs_marker(positions: Positions) -> bool:
    """Whether the choice depends on where the instruction ends."""
    return isinstance(positions, str) and positions in ("after_instruction", "generated")


def row_mask(
    positions: Positions, ids: Int[Tensor, " pos"], *, prompt_length: int, instruction_end: int | None
) -> Bool[Tensor, " pos"]:
    """The steered positions of one unpadded sequence.

    Args:
        positions: any choice but a mask.
        ids: the prompt's ids and those generated since.
        prompt_length: how many of them are the prompt.
        instruction_end: index of the template's last token, for the choices that need it.

    Raises:
        InputError: a function returned something that is not a boolean per token.
    """
    index = torch.arange(len(ids))
    if positions == "all":
        return torch.ones(len(ids), dtype=torch.bool)
    if positions == "last":
        return index == prompt_length - 1
    if needs_marker(positions):
        assert instruction_end is not None
        return index >= instruction_end + (positions == "generated")
    if isinstance(positions, slice):
        start, stop, _ = positions.indices(prompt_length)
        # A start behind the prompt's end means generated tokens, which slice.indices() would cut off.
        start = positions.start if positions.start is not None and positions.start > prompt_length else start
        if positions.stop is None:
            stop = len(ids)
        elif positions.stop > prompt_length:
            stop = positions.stop
        return (index >= start) & (index < stop)
    mask = torch.as_tensor(positions(ids)).cpu()  # type: ignore[operator]
    if mask.dtype != torch.bool or mask.shape != ids.shape:
        raise InputError(
            f"the positions function returned {mask.dtype} of shape {list(mask.shape)} for {len(ids)} token ids; it must "
            "return one boolean per id."
        )
    return mask


class PositionTracker:
    """Follows forward passes and says which columns of the current one are steered.

    Args:
        model: for its tokenizer, where the marker has to be found.
        positions: the choice.
        template: how prompts are written, for choices that depend on the end of the instruction.
    """

    def __init__(self, model: Model, positions: Positions, template: Template) -> None:
        check_positions(positions)
        self.model, self.positions, self.template = model, positions, template
        self.current: Bool[Tensor, "batch pos"] | None = None
        self._rows: list[list[int]] | None = None
        self._columns = 0
        self._prompt_lengths: list[int] = []
        self._ends: list[int | None] = []

    def see(self, inputs: Inputs) -> None:
        """Takes note of a forward pass about to run and sets `current`, `[batch, pos]` over its columns.

        Raises:
            InputError: the positions depend on tokens that this pass does not show (embeddings, a cache filled elsewhere),
                or the marker is missing or ambiguous.
        """
        batch, length = inputs.shape
        real = torch.ones(batch, length, dtype=torch.bool)
        if inputs.mask is not None and inputs.mask.ndim == 2:
            real = inputs.mask[:, -length:].bool().cpu().expand(batch, length)
        if self.positions == "all":
            self.current = real
            return
        if inputs.tokens is None:
            raise InputError(
                f"positions={self.positions!r} depends on the tokens, which this forward pass does not show: it was given "
                "embeddings, or began at a later block; use positions='all', or give the model token ids."
            )
        continues = inputs.past > 0
        if continues and (self._rows is None or self._columns != inputs.past or len(self._rows) != batch):
            raise InputError(
                f"positions={self.positions!r} depends on the whole prompt, but this forward pass continues a cache of "
                f"{inputs.past} positions that was not filled inside steer(); run the prompt inside the context, or use "
                "positions='all'."
            )
        tokens = inputs.tokens.cpu().expand(batch, length)
        if inputs.mask is None and not continues:
            real &= ~self._right_padding(tokens)
        new = [row[keep].tolist() for row, keep in zip(tokens, real, strict=True)]
        if continues:
            assert self._rows is not None
            self._rows = [old + row for old, row in zip(self._rows, new, strict=True)]
        else:
            self._start(new, inputs, length)
        self._columns = inputs.past + length
        self.current = self._mask(real, [len(row) for row in new], continues)

    def _right_padding(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Pad tokens that end some rows of a batch: TransformerLens makes no mask for these, since no real token sees them. What
        every row ends in is text."""
        pad_id = getattr(self.model.tokenizer, "pad_token_id", None)
        if pad_id is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        ending = (tokens == pad_id).long().flip(1).cumprod(1).sum(1, keepdim=True)
        return torch.arange(tokens.shape[1]) >= tokens.shape[1] - (ending - ending.min())

    def _start(self, rows: list[list[int]], inputs: Inputs, length: int) -> None:
        self._rows = rows
        known = _PROMPTS.get()
        if known is not None and len(known) == len(rows):
            self._ends = list(known)
            self._prompt_lengths = [end + 1 for end in known]
        else:
            self._ends = [None] * len(rows)
            self._prompt_lengths = [len(row) for row in rows]
            if needs_marker(self.positions):
                tokenizer = tokenizer_of(self.model)
                self._ends = [self.template.find_instruction_end(tokenizer, row) for row in rows]
        if isinstance(self.positions, Tensor) and (
            self.positions.shape[-1] != length or self.positions.shape[:-1] not in ((), (1,), (len(rows),))
        ):
            raise InputError(
                f"the position mask has shape {list(self.positions.shape)}, the prompt {list(inputs.shape)}; give one "
                "boolean for each column of the tokens, padding included."
            )

    def _mask(self, real: Tensor, new_counts: list[int], continues: bool) -> Tensor:
        assert self._rows is not None
        mask = torch.zeros_like(real)
        if isinstance(self.positions, Tensor):
            return mask if continues else real & self.positions.cpu()
        for index, row in enumerate(self._rows):
            whole = row_mask(
                self.positions,
                torch.tensor(row, dtype=torch.long),
                prompt_length=self._prompt_lengths[index],
                instruction_end=self._ends[index],
            )
            mask[index, real[index]] = whole[len(row) - new_counts[index] :]
        return mask
