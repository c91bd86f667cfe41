"""How far each token's residual stream lies along a vector, in a plain pass, under steering, or while text is generated.

    dot        x . v                 the vector's units squared; grows with |v|
    cosine     x . v / (|x| |v|)     between -1 and 1
    component  x . v / |v|^2         in units of v: adding 1.5 v raises it by 1.5

x is `resid_post` of v's layer at one token, after every hook that was added before, so steered where the model is steered. The
products are taken inside the hook, in fp32; activations are not kept, so that memory grows by one number a token and layer.

A projection describes; it does not show that the model uses the direction. The first token's residual stream is often far larger
than all others (an attention sink): look at the cosine, or leave that token out of sums and means.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.errors import CaaLensWarning, InputError
from caa_lens.hooks import Vectors, flatten, template_for
from caa_lens.models import (
    Model,
    capture_hooks,
    check_layers,
    describe,
    device_of,
    has_hooks,
    hooks,
    pad,
    run,
    tokenizer_of,
    weight_basis,
)
from caa_lens.positions import Positions, is_steered, known_prompts
from caa_lens.projected import Measure, Projection, along
from caa_lens.prompts import Conversation, Template
from caa_lens.steering import generate_ids, steer
from caa_lens.token_text import token_texts
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet

Text = Conversation | Sequence[int] | Tensor | Projection
"""A user message, a conversation (which may end with the assistant's answer), token ids, or the tokens of a projection."""


PIECE = 512
"""Tokens of a long text that are run at once, behind the KV cache of those before: attention's memory is length x PIECE."""


def project(
    model: Model,
    vector: SteeringVector | VectorSet,
    text: Text | Sequence[Text],
    *,
    layers: Sequence[int] | None = None,
    measure: Measure = "dot",
    steering: Vectors | None = None,
    positions: Positions = "after_instruction",
    max_new_tokens: int = 0,
    batch_size: int = 8,
    template: Template | None = None,
    progress: bool = True,
) -> Projection | list[Projection]:
    """Projects every token's `resid_post` on a vector, at its layer or at several.

    Inside `with steer(...)` the steered residual stream is projected; `steering=` is short for that. Generated tokens are
    captured while they are generated, from the KV cache, and equal one pass over the same tokens. Texts longer than `PIECE` run
    piece by piece from the KV cache too, unless the model is steered or has hooks of yours, which may count on whole texts.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        vector: a `SteeringVector` (projected at its own layer) or a `VectorSet` (each vector at its own).
        text: a string (a user message, as in `generate`; `template=Plain()` takes it as it stands), a conversation, token ids
            `[token]`, or a `Projection`, whose tokens are run again; or a list of any of these.
        layers: 0-based layers of the set, or at which a single vector is projected; negative ones count from the end.
        measure: `"dot"`, `"cosine"`, or `"component"` (in units of the vector).
        steering, positions: steer meanwhile, as `steer` does.
        max_new_tokens: continue each text greedily by up to so many tokens and project these too.
        batch_size: texts run together; it never changes a result.
        template: how strings and conversations are written; the model's default otherwise.
        progress: show a bar where there are several batches.

    Returns:
        A `Projection`; a list of them for a list of texts.

    Raises:
        InputError, MissingError: a vector, layer or measure that does not fit, a text without tokens or longer than the context;
            before the model runs.

    Example:
        >>> caa.project(model, v, "Good day to you, sir.").show()  # doctest: +SKIP
        >>> steered = caa.project(model, v, "Hi!", max_new_tokens=40, steering=1.5 * v)  # doctest: +SKIP
        >>> (steered - caa.project(model, v, steered)).show()  # what steering changed, on the same tokens  # doctest: +SKIP
    """
    targets, several = _targets(model, vector, layers, measure)
    if batch_size < 1 or max_new_tokens < 0:
        raise InputError(f"batch_size={batch_size} must be at least 1, max_new_tokens={max_new_tokens} not negative.")
    tokenizer, chosen, info = tokenizer_of(model), template_for(model, template), describe(model)
    texts, single = _as_texts(text)
    rows = [_encode(model, chosen, one, max_new_tokens) for one in texts]
    added = flatten(model, steering) if steering is not None else []
    stop_ids = chosen.stop_ids(tokenizer) if max_new_tokens else frozenset()
    surrounded = is_steered(model)  # by a context whose strengths may belong to the rows as they are given
    # Steering and the user's own hooks may depend on seeing a whole text at once, the latter on seeing no other.
    batch_size = 1 if has_hooks(model) and not surrounded else batch_size
    reader = _Reader(model, targets, measure, stop_ids, in_pieces=not added and not has_hooks(model))
    specials = set(tokenizer.all_special_ids)
    words = _in_words(model, added, positions)
    found: dict[int, Projection] = {}
    with ExitStack() as stack:
        if added:
            stack.enter_context(steer(model, added, positions=positions, template=template))
        # Behind the steering hooks, so that what they make is what is read.
        stack.enter_context(hooks(model, capture_hooks(list(targets), reader.capture)))
        total = sum(len(row.ids) for row in rows)
        bar = stack.enter_context(
            tqdm(total=total, desc="project", unit="token", disable=not progress or total <= 4 * PIECE)
        )
        for batch in _batches(rows, batch_size, in_order=surrounded):
            read = reader.read([rows[i] for i in batch], max_new_tokens, bar.update)
            for index, (ids, values) in zip(batch, read, strict=True):
                found[index] = Projection(
                    values=values if several else values[0],
                    tokens=token_texts(tokenizer, ids),
                    token_ids=tuple(ids),
                    special=tuple(token in specials for token in ids),
                    layers=tuple(targets),
                    measure=measure,
                    vector=vector.provenance.expression,
                    steering=words,
                    instruction_end=rows[index].end,
                    provenance={"model": info.name, "revision": info.revision, "template": repr(chosen)},
                )
    results = [found[index] for index in range(len(rows))]
    return results[0] if single else results


def _targets(
    model: Model, vector: Any, layers: Sequence[int] | None, measure: Any
) -> tuple[dict[int, SteeringVector], bool]:
    """The vector of each layer, ascending, and whether the values have a layer axis."""
    if not isinstance(vector, (SteeringVector, VectorSet)):
        raise InputError(f"project takes a SteeringVector or a VectorSet; got {type(vector).__name__}.")
    if measure not in get_args(Measure):
        raise InputError(f"measure={measure!r}: allowed are {', '.join(map(repr, get_args(Measure)))}.")
    flat = flatten(model, vector)
    several = isinstance(vector, VectorSet) or layers is not None
    if layers is not None:
        wanted = check_layers(model, list(layers))
        flat = [vector[n] if isinstance(vector, VectorSet) else vector.at_layer(n) for n in wanted]
    for v in flat:
        if measure != "dot" and not v.tensor.any():
            raise InputError(f"{v!r} is zero, which has no direction; use measure='dot', or a vector that is not zero.")
    mine, theirs = weight_basis(model), flat[0].provenance.basis
    if (mine == "centred") != (theirs == "centred"):
        warnings.warn(
            f"the vector was made with {theirs} weights, this model's are {mine}: centring takes each position's mean out of the "
            "residual stream, so projections differ from those where the vector was made; extract it from this model.",
            CaaLensWarning,
            stacklevel=3,
        )
    return {v.layer: v for v in flat}, several


@dataclass(frozen=True)
class _Row:
    ids: tuple[int, ...]
    end: int | None


def _as_texts(text: Any) -> tuple[list[Any], bool]:
    if not isinstance(text, (Sequence, Tensor, Projection)):
        raise InputError(
            f"project takes a text, a conversation, token ids, or a list of them; got {type(text).__name__}."
        )
    if isinstance(text, (str, Projection)) or (isinstance(text, Tensor) and text.ndim < 2):
        return [text], True
    items = list(text)
    if not items:
        raise InputError("no text to project; give a string, a conversation, token ids, or a list of them.")
    if all(isinstance(item, (int, Mapping)) for item in items):
        return [items], True
    return items, False


def _encode(model: Model, template: Template, text: Any, max_new_tokens: int) -> _Row:
    """Token ids of a text and the index of its prompt's last token, after checking that the model can run them."""
    info = describe(model)
    if isinstance(text, Projection):
        row = _Row(text.token_ids, text.instruction_end)
    elif isinstance(text, Tensor) or (not isinstance(text, str) and all(isinstance(item, int) for item in text)):
        row = _Row(tuple(int(token) for token in text), None)
    elif isinstance(text, str) and not text:
        row = _Row((), None)
    else:
        answer = None
        if not isinstance(text, str) and isinstance(text[-1], Mapping) and text[-1].get("role") == "assistant":
            *text, last = text
            answer = last["content"]
        prompt = template.encode(tokenizer_of(model), text, answer)
        row = _Row(prompt.ids, prompt.instruction_end)
    if not row.ids:
        raise InputError("a text without tokens has nothing to project; give at least one token.")
    outside = [token for token in row.ids if not 0 <= token < model.cfg.d_vocab]
    if outside:
        raise InputError(f"token id {outside[0]} is outside the {model.cfg.d_vocab} tokens of {info.name}.")
    info.require_room("a text", len(row.ids), max_new_tokens=max_new_tokens)
    return row


def _batches(rows: Sequence[_Row], batch_size: int, *, in_order: bool) -> list[list[int]]:
    """Rows whose prompt's end steering has to search in the tokens apart from the others; unless the order counts, rows of like
    length together and long ones alone."""
    order, batches = list(range(len(rows))), []
    if not in_order:
        order.sort(key=lambda i: len(rows[i].ids))
        batches = [[i] for i in order if len(rows[i].ids) > PIECE]
        order = order[: len(order) - len(batches)]
    for known in (True, False):
        group = [i for i in order if (rows[i].end is not None) == known]
        batches += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return batches


class _Reader:
    """Runs batches and collects the measure of each layer, pass by pass."""

    def __init__(
        self,
        model: Model,
        targets: Mapping[int, SteeringVector],
        measure: Measure,
        stop_ids: frozenset[int],
        *,
        in_pieces: bool,
    ) -> None:
        self.model, self.measure, self.stop_ids, self.in_pieces = model, measure, stop_ids, in_pieces
        self.directions = {layer: v.tensor for layer, v in targets.items()}
        self.passes: dict[int, list[Tensor]] = {}

    def capture(self, layer: int, activations: Tensor) -> None:
        direction = self.directions[layer] = self.directions[layer].to(activations.device)
        self.passes[layer].append(along(activations, direction, self.measure))

    @torch.no_grad()
    def read(
        self, rows: Sequence[_Row], max_new_tokens: int, advance: Callable[[int], Any]
    ) -> list[tuple[list[int], Float[Tensor, "layer token"]]]:
        """Each row's ids, generated ones included, and their values."""
        self.passes = {layer: [] for layer in self.directions}
        ids: list[list[int]] = [list(row.ids) for row in rows]
        new: list[list[int]] = [[] for _ in rows]
        ends = [row.end for row in rows if row.end is not None]
        with known_prompts(ends) if ends else nullcontext():
            if max_new_tokens:
                new = generate_ids(
                    self.model, ids, max_new_tokens=max_new_tokens, stop_ids=self.stop_ids, run_last=True
                )
                advance(sum(map(len, ids)))
            else:
                self._run(ids, advance)
        width = max(map(len, ids))
        values = torch.stack([torch.cat(self.passes[layer], 1).cpu() for layer in self.directions])
        return [
            (old + more, values[:, row, width - len(old) : width + len(more)].clone())
            for row, (old, more) in enumerate(zip(ids, new, strict=True))
        ]

    def _run(self, ids: Sequence[Sequence[int]], advance: Callable[[int], Any]) -> None:
        tokens, mask = pad(ids, side="left", device=device_of(self.model))
        if not self.in_pieces or tokens.shape[1] <= PIECE:
            run(self.model, tokens, mask, stop_at_layer=max(self.directions) + 1)
            advance(int(mask.sum()))
            return
        past = None
        for part, real in zip(tokens.split(PIECE, 1), mask.split(PIECE, 1), strict=True):
            _, past = run(self.model, part, real, past=past, grow=True)
            advance(int(real.sum()))


def _in_words(model: Model, added: Sequence[SteeringVector], positions: Positions) -> str | None:
    """What steering is on: that of `steering=` by name, that of surrounding contexts as such."""
    parts = ["by a surrounding steer()"] if is_steered(model) else []
    if added:
        names = ", ".join(dict.fromkeys(v.provenance.expression for v in added))
        first, last = min(v.layer for v in added), max(v.layer for v in added)
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        where = positions if isinstance(positions, (str, slice)) else type(positions).__name__
        parts.append(f"{names} at {layers}, {where}")
    return "; ".join(parts) or None
