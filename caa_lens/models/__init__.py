"""The host: TransformerLens models of either class, run in one way on token ids with an explicit attention mask.

This package is the only place that names TransformerLens' classes or asks which one a model is: `hooked` runs a
`HookedTransformer` (TransformerLens 2 and 3), `bridge` a `TransformerBridge` (3 and 4), `loading` builds either. With an
explicit mask, padding on either side, gaps and KV caches give the same numbers in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.arguments import Layers, as_integers
from caa_lens.errors import InputError, MissingError
from caa_lens.models import bridge, hooked
from caa_lens.models.base import Basis, Branch, Host, Inputs, Model, Prefix, select_positions
from caa_lens.models.fingerprint import model_state
from caa_lens.models.hook_points import Hook, capture_hooks, has_hooks, hooks, resid_post
from caa_lens.models.hooked import use_fast_layout
from caa_lens.models.loading import identity, load_model
from caa_lens.provenance import same_model

__all__ = [
    "Branch",
    "Hook",
    "Inputs",
    "Model",
    "ModelInfo",
    "Prefix",
    "capture_hooks",
    "check_layers",
    "describe",
    "device_of",
    "has_hooks",
    "hooks",
    "load_model",
    "model_state",
    "pad",
    "resid_post",
    "run",
    "run_branches",
    "tokenizer_of",
    "use_fast_layout",
    "watch_inputs",
    "weight_basis",
]


def host(model: Model) -> Host:
    """The module that runs this model's class.

    Raises:
        InputError: it is neither class; a plain Hugging Face model has no hook points.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if not names & {"HookedTransformer", "TransformerBridge"}:
        raise InputError(
            f"{type(model).__name__} is not a TransformerLens model; use caa_lens.load_model(), HookedTransformer or "
            "TransformerBridge.boot_transformers()."
        )
    return cast(Host, hooked if "HookedTransformer" in names else bridge)


@dataclass(frozen=True)
class ModelInfo:
    """What the method needs to know of a model; `base` is the one it was tuned from, whose prompts it takes, or itself."""

    name: str
    revision: str | None
    n_layers: int
    d_model: int
    n_ctx: int
    base: str

    def same_model(self, name: str) -> bool:
        """Whether a vector made on `name` belongs here."""
        return same_model(self.name, name)

    def require_room(self, what: str, n_tokens: int, *, max_new_tokens: int = 0) -> None:
        """Refuses a text that the context cannot hold.

        Args:
            what: the text, for the message.
            n_tokens: its tokens.
            max_new_tokens: those that are generated behind it.

        Raises:
            InputError: names the text, its length and the context's.
        """
        if n_tokens + max_new_tokens > self.n_ctx:
            more = f" and max_new_tokens={max_new_tokens}" if max_new_tokens else ""
            raise InputError(
                f"{what}: {n_tokens} tokens{more} exceed the context of {self.n_ctx} tokens of {self.name}; shorten it."
            )


def describe(model: Model) -> ModelInfo:
    """Name and shape of a model."""
    host(model)  # refuses what is no TransformerLens model
    name, revision, base = identity(model)
    return ModelInfo(name, revision, model.cfg.n_layers, model.cfg.d_model, model.cfg.n_ctx, base)


def weight_basis(model: Model) -> Basis:
    """`"centred"` where each position's mean was removed from the residual stream (TransformerLens' centring of LayerNorm
    models), `"folded"` where only norm weights were folded, which leaves the residual stream unchanged, else `"raw"`.
    """
    return host(model).basis(model)


def tokenizer_of(model: Model) -> Any:
    """The model's tokenizer.

    Raises:
        InputError: the model has none.
    """
    if model.tokenizer is None:
        raise InputError(
            "the model has no tokenizer; set one with model.set_tokenizer(...) or build it with tokenizer=."
        )
    return model.tokenizer


def device_of(model: Model) -> torch.device:
    """Device of the embedding, where token ids go (a config's own entry can be wrong); further layers may be on others."""
    return cast(torch.device, next(model.embed.parameters()).device)


def check_layers(model: Model, layers: Layers) -> list[int]:
    """Layers as 0-based indices, ascending and unique; negative ones count from the end.

    Raises:
        MissingError: a layer is out of range.
        InputError: no layer, or something that is no whole number.
    """
    n_layers, layers = model.cfg.n_layers, as_integers("layers", layers)
    out_of_range = [layer for layer in layers if not -n_layers <= layer < n_layers]
    if out_of_range:
        raise MissingError(
            f"layer {out_of_range[0]} is out of range: {describe(model).name} has layers 0 to {n_layers - 1} "
            f"(or {-n_layers} to -1, counted from the end)."
        )
    if not layers:
        raise InputError("no layer given; leave layers= out for all of them.")
    return sorted({layer % n_layers for layer in layers})


def run(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    *,
    past: Prefix | None = None,
    grow: bool = False,
    logits: int = 0,
    stop_at_layer: int | None = None,
) -> tuple[Float[Tensor, "batch kept d_vocab"] | None, Prefix | None]:
    """One forward pass over new tokens, behind an optional prefix; the model's hooks act as in any forward pass.

    Args:
        tokens: new token ids, padded on either side.
        mask: 1 for real tokens, 0 for padding, of the new tokens only.
        past: the prefixes they continue. Rows of tokens may be several copies of the prefixes' rows, copy by copy: row r then
            continues prefix r mod `len(past.mask)`; such a pass cannot grow them.
        grow: return the prefix extended by these tokens (`past` itself is consumed then).
        logits: number of last positions whose logits are computed; 0 computes no more of the unembedding than it must.
        stop_at_layer: run only the blocks below this one (no logits).

    Returns:
        (logits or None, extended prefix or None).
    """
    return host(model).run(model, tokens, mask, past, grow, logits, stop_at_layer)


def run_branches(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    branches: Sequence[Branch],
    readout: Callable[[Float[Tensor, "batch read d_vocab"]], Tensor],
    *,
    at: Int[Tensor, "batch read"],
    past: Prefix | None = None,
) -> list[Tensor]:
    """Many variants of one forward pass at once, each changing `resid_post` of its own layer; equal to running each alone, which is
    what is done where a user's hooks are on the model: they may depend on what a pass looks like.

    Args:
        tokens, mask, past: as in `run`; `past` holds what no branch changes, and is left as it is.
        branches: the variants.
        readout: what to keep of one branch's logits `[batch, read, d_vocab]`.
        at: each row's positions (columns of `tokens`) whose logits `readout` gets.

    Returns:
        One readout a branch, in their order.
    """
    if not has_hooks(model):
        return host(model).run_branches(model, tokens, mask, past, branches, readout, at)
    found = []
    for branch in branches:
        with hooks(model, [_change_hook(layer, change) for layer, change in branch.changes.items()]):
            logits, _ = run(model, tokens, mask, past=past, logits=tokens.shape[1])
        assert logits is not None
        found.append(readout(select_positions(logits, at)))
    return found


def _change_hook(layer: int, change: Callable[[Tensor], Tensor]) -> Hook:
    return resid_post(layer), lambda activations, hook: change(activations)


@contextmanager
def watch_inputs(model: Model, watcher: Callable[[Inputs], None]) -> Iterator[None]:
    """Calls `watcher` at the start of every forward pass, however it is made (`model(...)`, `run_with_cache`, `generate`).

    These are PyTorch hooks, not TransformerLens ones: `reset_hooks()` leaves them, the end of the block removes them.
    """
    handles = host(model).watch(model, watcher)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pad(
    rows: Sequence[Sequence[int]], *, side: Literal["left", "right"], device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids and 0/1 mask of rows of different length. Padding is token 0: the mask hides it, and not every tokenizer has a pad
    token, nor every model a row of its embedding for it."""
    width = max(len(row) for row in rows)
    tokens = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[index, span] = torch.tensor(row, dtype=torch.long)
        mask[index, span] = 1
    return tokens.to(device), mask.to(device)
