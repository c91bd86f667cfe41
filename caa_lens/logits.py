"""What vectors and intermediate streams say in the vocabulary: direct logit attribution and the logit lens.

    logits(x)   = W_U^T norm(x) + b_U            norm(x) = A x / scale(x) + b,   A: the norm's gain (LayerNorm: and centring)
    frozen      = W_U^T A v / scale(x)           the norm's scale held at that of the stream x
    first_order = d/ds logits(x + s v) at s = 0  the scale's own change included
    exact       = logits(x + v) - logits(x)
    lens        = logits(x_l)                    x_l: resid_post of block l, read as if no block followed

Direct means through the residual stream alone: what later blocks make of the vector is not in it, and is usually most of a
steering vector's effect. The frozen form is linear in v and the convention of TransformerLens' `logit_attrs`, which leaves the gain
out unless it is folded into the weights; here it is always in, so processed and unprocessed weights agree (up to a constant over
the vocabulary where the unembedding was centred). The lens assumes that intermediate streams use the basis of the last one; in
early layers they often do not.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); Elhage et al., "A mathematical framework for transformer
circuits" (2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.errors import InputError
from caa_lens.hooks import flatten, template_for
from caa_lens.models import Model, capture_hooks, check_layers, describe, device_of, hooks, readout, run, tokenizer_of
from caa_lens.positions import known_prompts
from caa_lens.prompts import Conversation, Template
from caa_lens.vector import SteeringVector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Norm = Literal["frozen", "first_order", "exact"]


@dataclass(frozen=True)
class LogitAttribution:
    """The direct effect of a vector on every token's logit.

    Attributes:
        effect: in logits, for the vector at its given length.
        norm: how the final norm was treated.
        scale: the norm's scale that it was divided by.
    """

    effect: Float[Tensor, " d_vocab"]
    norm: Norm
    scale: float
    _tokenizer: Any = field(repr=False)

    def top_tokens(self, k: int = 10) -> pd.DataFrame:
        """The k tokens pushed up most and the k pushed down most: `token`, `id`, `effect`, largest effect first."""
        order = self.effect.argsort(descending=True)
        chosen = torch.cat([order[:k], order[-k:]]) if 2 * k < len(order) else order
        ids = chosen.tolist()
        return pd.DataFrame(
            {
                "token": [self._tokenizer.decode([token]) for token in ids],
                "id": ids,
                "effect": self.effect[chosen].tolist(),
            }
        )

    def to_pandas(self) -> pd.DataFrame:
        """Every token of the vocabulary, largest effect first."""
        return self.top_tokens(len(self.effect))


def logit_attribution(
    model: Model,
    vector: SteeringVector,
    text: Conversation | None = None,
    *,
    norm: Norm = "frozen",
    template: Template | None = None,
) -> LogitAttribution:
    """Which tokens the vector makes likelier through the residual stream alone, as if it were added behind the last block.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        vector: at the length it is used with (`1.5 * v`); its layer does not matter here.
        text: a prompt or conversation; x is the last block's output at its last token, under whatever hooks or `steer` contexts
            are open. Without it the vector is its own stream, x = v: the order of the tokens is the same, the size of the
            effects is that of a stream which holds nothing else.
        norm: `"frozen"`, `"first_order"` or `"exact"`; see the module's equations.
        template: how the prompt is written; the model's default otherwise.

    Raises:
        InputError: a vector of another model or width, an unknown norm, or `text` left out where the stream matters.

    Example:
        >>> caa.logit_attribution(model, v).top_tokens(5)  # doctest: +SKIP
    """
    flatten(model, vector)
    if norm not in get_args(Norm):
        raise InputError(f"norm={norm!r}: allowed are {', '.join(map(repr, get_args(Norm)))}.")
    if text is None and norm != "frozen":
        raise InputError(f"norm={norm!r} is the change of a stream; give the text= it belongs to.")
    v = readout.to_readout(model, vector.tensor).reshape(1, 1, -1)
    x = v if text is None else _last_stream(model, text, template)
    with torch.no_grad():
        scale = readout.normed(model, x)[1]
        if norm == "exact":
            effect = readout.unembed(model, x + v) - readout.unembed(model, x)
        elif norm == "frozen":
            out, own = readout.normed(model, v)
            still = readout.normed(model, torch.zeros_like(v))[0]  # the norm's bias
            # norm(v) - b = A v / scale(v) holds A whatever the class calls it and wherever it was folded to.
            # The scale is a float32 in half precision too, and makes the product one.
            direct = readout.to_readout(model, (out - still) * (own / scale))
            effect = model.unembed(direct) - model.unembed(torch.zeros_like(direct))
    if norm == "first_order":
        _, effect = torch.autograd.functional.jvp(lambda stream: readout.unembed(model, stream), x, v)
    return LogitAttribution(effect.detach()[0, 0].float().cpu(), norm, float(scale), tokenizer_of(model))


@torch.no_grad()
def _last_stream(model: Model, text: Conversation, template: Template | None) -> Float[Tensor, "1 1 d_model"]:
    last = describe(model).n_layers - 1
    found = _streams(model, text, None, [last], template)[1]
    return readout.to_readout(model, found[last][:, -1:])


def _streams(
    model: Model, text: Conversation, completion: str | None, layers: Sequence[int], template: Template | None
) -> tuple[tuple[int, ...], dict[int, Float[Tensor, "1 pos d_model"]]]:
    """Token ids and resid_post of each layer, under the hooks that are on the model."""
    prompt = template_for(model, template).encode(tokenizer_of(model), text, completion)
    info = describe(model)
    if len(prompt.ids) > info.n_ctx:
        raise InputError(f"the text has {len(prompt.ids)} tokens, {info.name} a context of {info.n_ctx}; shorten it.")
    found: dict[int, Tensor] = {}
    tokens = torch.tensor([prompt.ids], device=device_of(model))
    with (
        torch.no_grad(),
        known_prompts([prompt.instruction_end]),
        hooks(model, capture_hooks(layers, found.__setitem__)),
    ):
        run(model, tokens, torch.ones_like(tokens))
    return prompt.ids, found


@dataclass(frozen=True)
class LogitLens:
    """What every layer would predict next, at every position.

    Attributes:
        layers: the rows; the last layer of the model is the model's own prediction.
        positions: the columns: indices into the tokens of the text.
        tokens: the text's tokens at these positions.
        top_ids: the likeliest next tokens, likeliest first.
        top_probabilities: their probabilities.
        watched: the tokens asked for.
        probabilities: theirs.
    """

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    top_ids: Int[Tensor, "layer position rank"]
    top_probabilities: Float[Tensor, "layer position rank"]
    watched: tuple[str, ...]
    probabilities: Float[Tensor, "layer position watched"]
    _tokenizer: Any = field(repr=False)

    def top_tokens(self, layer: int, position: int = -1) -> list[str]:
        """The likeliest next tokens of one layer, at a column of the result (the last one by default)."""
        if layer not in self.layers:
            raise InputError(f"layer {layer} was not read; there are {', '.join(map(str, self.layers))}.")
        ids = self.top_ids[self.layers.index(layer), position]
        return [self._tokenizer.decode([token]) for token in ids.tolist()]

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer, position and rank: `layer`, `position`, `token`, `rank`, `predicted`, `probability`; and for the watched
        tokens the same with rank 0."""
        rows = []
        for row, layer in enumerate(self.layers):
            for column, (position, token) in enumerate(zip(self.positions, self.tokens, strict=True)):
                where = {"layer": layer, "position": position, "token": token}
                ids, sizes = (x[row, column].tolist() for x in (self.top_ids, self.top_probabilities))
                named = [
                    (0, name, p) for name, p in zip(self.watched, self.probabilities[row, column].tolist(), strict=True)
                ]
                ranked = [
                    (rank, self._tokenizer.decode([i]), p)
                    for rank, (i, p) in enumerate(zip(ids, sizes, strict=True), 1)
                ]
                rows += [{**where, "rank": r, "predicted": text, "probability": p} for r, text, p in named + ranked]
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None, *, interactive: bool = False) -> Figure | Any:
        """Table of the likeliest next token, layers by positions, coloured by its probability.

        Args:
            ax: where to draw; a new figure by default.
            interactive: a plotly figure, with all the tokens that were kept and their probabilities where the mouse is.
        """
        if interactive:
            from caa_lens import plots_interactive

            plots_interactive.refuse_axis(ax)
            return plots_interactive.plot_lens(self)
        from caa_lens.plots_geometry import plot_lens

        words = [[self._tokenizer.decode([int(i)]) for i in row] for row in self.top_ids[..., 0]]
        return plot_lens(self.top_probabilities[..., 0], words, self.layers, self.tokens, ax=ax)


def logit_lens(
    model: Model,
    text: Conversation,
    *,
    completion: str | None = None,
    layers: Sequence[int] | None = None,
    positions: slice = slice(-1, None),
    top: int = 5,
    watch: Sequence[str] = (),
    template: Template | None = None,
) -> LogitLens:
    """The next-token prediction read off the residual stream of every layer, through the final norm and the unembedding.

    Steered streams are read inside a `steer` context: `with caa.steer(model, v): caa.logit_lens(model, text)`.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, with whatever hooks are on it.
        text: a prompt or conversation.
        completion: an answer behind it.
        layers: which layers; all by default.
        positions: which tokens of the text, as a slice; the last by default.
        top: how many of the likeliest tokens are kept.
        watch: further tokens to follow, each a text whose first token is taken (`" yes"`).
        template: how the prompt is written; the model's default otherwise.

    Raises:
        InputError: no token in `positions`, an impossible `top`, a watched text without a token, or a text longer than the context.
        MissingError: a layer out of range.

    Example:
        >>> caa.logit_lens(model, "The capital of France is", watch=[" Paris"]).to_pandas()  # doctest: +SKIP
    """
    tokenizer = tokenizer_of(model)
    rows = check_layers(model, list(range(describe(model).n_layers) if layers is None else layers))
    if not 1 <= top <= model.cfg.d_vocab:
        raise InputError(f"top={top}: allowed are 1 to {model.cfg.d_vocab}, the size of the vocabulary.")
    encoded = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in watch]
    if not all(encoded):
        raise InputError(f"watch={list(watch)!r}: every text needs at least one token.")
    ids, streams = _streams(model, text, completion, rows, template)
    columns = range(len(ids))[positions]
    if not columns:
        raise InputError(f"positions={positions!r} holds none of the text's {len(ids)} tokens.")
    watched = torch.tensor([word[0] for word in encoded], dtype=torch.long)
    best, likely, asked = [], [], []
    for layer in rows:  # one layer's logits at a time: all of them would be the largest tensor by far
        with torch.no_grad():
            logits = readout.unembed(
                model, readout.to_readout(model, streams[layer][:, columns.start : columns.stop : columns.step])
            )
        probabilities = logits[0].float().softmax(-1).cpu()
        top_probabilities, top_ids = probabilities.topk(top, -1)
        best.append(top_ids)
        likely.append(top_probabilities)
        asked.append(probabilities[:, watched])
    return LogitLens(
        tuple(rows),
        tuple(columns),
        tuple(tokenizer.decode([ids[column]]) for column in columns),
        torch.stack(best),
        torch.stack(likely),
        tuple(watch),
        torch.stack(asked),
        tokenizer,
    )
