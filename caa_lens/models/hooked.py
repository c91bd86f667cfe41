"""Running a `HookedTransformer` (TransformerLens 2 and 3), which loops over its own blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import transformer_lens
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.models import shared_prefix
from caa_lens.models.base import (
    Basis,
    Branch,
    Inputs,
    Model,
    Prefix,
    is_centred,
    select_positions,
    share_weights,
    whole_mask,
)
from caa_lens.models.readout import unembed, unembed_each


def basis(model: Model) -> Basis:
    """For LayerNorm from the embedding's row means, and from the kind of norm layers, which changes where they are folded."""
    norm = str(model.cfg.normalization_type)
    if "RMS" not in norm and is_centred(model.W_E):
        return "centred"
    return "folded" if norm.endswith("Pre") else "raw"


def run(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    past: Prefix | None,
    grow: bool,
    logits: int,
    stop_at_layer: int | None,
) -> tuple[Float[Tensor, "batch kept d_vocab"] | None, Prefix | None]:
    """One forward pass; the mask given with a cache covers the new tokens only."""
    if past is not None and len(tokens) != len(past.mask):
        return _run_copies(model, tokens, mask, past, logits, stop_at_layer), None
    cache = past.cache if past else None
    if cache is None and grow:
        cache = transformer_lens.TransformerLensKeyValueCache.init_cache(model.cfg, tokens.device, tokens.shape[0])
    if cache is not None:
        (cache.unfreeze if grow else cache.freeze)()
    stop = model.cfg.n_layers if stop_at_layer is None else stop_at_layer
    residual = model(tokens, attention_mask=mask, past_kv_cache=cache, stop_at_layer=stop)
    grown = Prefix(cache, whole_mask(mask, past)) if grow else None
    return (unembed(model, residual[:, -logits:]) if logits else None), grown


def _run_copies(
    model: Model,
    tokens: Int[Tensor, "row pos"],
    mask: Int[Tensor, "row pos"],
    past: Prefix,
    logits: int,
    stop_at_layer: int | None,
) -> Float[Tensor, "row kept d_vocab"] | None:
    """A pass of several continuations of every prefix, copy by copy: the prefixes are not copied."""
    batch, cache = len(past.mask), past.cache
    cache.freeze()
    stream = torch.cat(
        [
            model(ids, attention_mask=real, past_kv_cache=cache, stop_at_layer=0)
            for ids, real in zip(tokens.split(batch), mask.split(batch), strict=True)
        ]
    )
    whole = torch.cat([past.mask.repeat(len(tokens) // batch, 1), mask], 1)
    for block, entry in zip(model.blocks[:stop_at_layer], cache.entries, strict=False):
        stream = _continue(block, stream, entry, whole)
    return unembed(model, stream[:, -logits:]) if logits else None


def _continue(
    block: Any, stream: Float[Tensor, "row pos d_model"], entry: Any | None, whole: Int[Tensor, "row all"]
) -> Float[Tensor, "row pos d_model"]:
    """A block on copies of the batch behind one cache, which is repeated only where sharing it would not be the same."""
    stream = stream.to(next(block.parameters()).device)
    sharing = shared_prefix.block_for(block) if entry is not None else None
    if sharing is None and entry is not None:
        entry = _repeated(entry, len(stream) // len(entry.past_keys))
    return (sharing or block)(stream, past_kv_cache_entry=entry, attention_mask=whole.to(stream.device))


def run_branches(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    past: Prefix | None,
    branches: Sequence[Branch],
    readout: Callable[[Float[Tensor, "batch read d_vocab"]], Tensor],
    at: Int[Tensor, "batch read"],
) -> list[Tensor]:
    """Every branch in one pass over the blocks: a branch's rows join the batch behind its first layer.

    What lies below that layer is computed once for all, and every block runs once, on all rows that need it.
    """
    batch = tokens.shape[0]
    cache = past.cache if past else None
    if cache is not None:
        cache.freeze()
    stream = model(tokens, attention_mask=mask, past_kv_cache=cache, stop_at_layer=0)
    whole = whole_mask(mask, past)
    rows: list[int] = []  # branches in the batch, in order; the unsteered stream comes first
    for layer, block in enumerate(model.blocks):
        entry = cache[layer] if cache is not None else None
        stream = _continue(block, stream, entry, whole.repeat(len(rows) + 1, 1))
        unsteered, *steered = stream.split(batch)
        for place, number in enumerate(rows):
            if layer in branches[number].changes:
                steered[place] = branches[number].changes[layer](steered[place])
        joining = [number for number, branch in enumerate(branches) if layer == min(branch.changes, default=None)]
        steered += [branches[number].changes[layer](unsteered) for number in joining]
        stream = torch.cat([unsteered, *steered])
        rows += joining
    read = [select_positions(part, at) for part in stream.split(batch)]
    found = dict(zip([None, *rows], map(readout, unembed_each(model, read)), strict=True))
    return [found[number if branch.changes else None] for number, branch in enumerate(branches)]


def _repeated(entry: Any, copies: int) -> Any:
    repeated = type(entry)(
        past_keys=entry.past_keys.repeat(copies, 1, 1, 1), past_values=entry.past_values.repeat(copies, 1, 1, 1)
    )
    repeated.frozen = True
    return repeated


def watch(model: Model, watcher: Callable[[Inputs], None]) -> list[Any]:
    """PyTorch hooks on the embedding (tokens) and on every block (mask and cache): a pass may begin at any of them."""
    embedded: list[Tensor] = []  # `generate` embeds token by token, but may run them together
    reached = -1

    def embed_hook(module: Any, args: tuple[Any, ...]) -> None:
        embedded.append(args[0])

    def block_hook(layer: int, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal reached
        continues, reached = layer > 0 and layer == reached + 1, layer
        if continues:
            return
        batch, length = (args[0] if args else kwargs["resid_pre"]).shape[:2]
        entry = kwargs.get("past_kv_cache_entry")
        past = 0 if entry is None else entry.past_keys.shape[1]
        tokens = _joined(embedded, batch, length) if layer == 0 else None
        embedded[:] = [] if tokens is None else [tokens]
        watcher(Inputs(tokens, kwargs.get("attention_mask"), past, (batch, length)))

    return [
        model.embed.register_forward_pre_hook(embed_hook),
        *(
            block.register_forward_pre_hook(partial(block_hook, layer), with_kwargs=True)
            for layer, block in enumerate(model.blocks)
        ),
    ]


def _joined(embedded: Sequence[Tensor], batch: int, length: int) -> Tensor | None:
    """The last embedded tokens that make up `[batch, length]`; None if they do not."""
    parts: list[Tensor] = []
    for part in reversed(embedded):
        parts.insert(0, part.reshape(-1, part.shape[-1]))
        columns = sum(piece.shape[1] for piece in parts)
        if columns >= length or len(parts[0]) != batch:
            return torch.cat(parts, 1) if columns == length and all(len(p) == batch for p in parts) else None
    return None


def duplicate(model: Model) -> Model:
    """A model of its own over the same weights."""
    return share_weights(model, tokenizer=model.tokenizer)


def output_bias(model: Model, layer: int) -> Tensor | None:
    """`b_out`, which every dense MLP has here."""
    return getattr(getattr(model.blocks[layer], "mlp", None), "b_out", None)


def spread(model: Model, device: torch.device, n_devices: int) -> None:
    """Puts the blocks on consecutive devices from `device` on, as many on each, and what stands before and behind them with the
    first and the last: where TransformerLens' forward pass sends the stream. (Its own placement goes by free memory.)
    """
    model.cfg.device, model.cfg.n_devices = str(device), n_devices
    places = [
        torch.device(device.type, (device.index or 0) + layer * n_devices // model.cfg.n_layers)
        for layer in range(model.cfg.n_layers)
    ]
    for block, place in zip(model.blocks, places, strict=True):
        block.to(place)
    for name, module in model.named_children():
        if name != "blocks":
            module.to(places[-1] if name in ("ln_final", "unembed") else places[0])


def use_fast_layout(model: Model) -> None:
    """Stores the weights so that a matrix product needs no copy of them; values and shapes stay as they are.

    TransformerLens 3 copies every weight in every forward pass; with this layout generation is about 2.6 times faster and
    the logits are bitwise equal. `load_model` does it for the models it builds; on your own model it is your choice.
    """
    transposed = ("mlp.W_in", "mlp.W_out", "mlp.W_gate", "unembed.W_U")
    per_head = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn._W_K", "attn._W_V")
    for name, parameter in model.named_parameters():
        data = parameter.data
        if name.endswith(transposed) and data.ndim == 2:
            parameter.data = data.T.contiguous().T
        elif name.endswith(per_head) and data.ndim == 3:
            parameter.data = data.transpose(1, 2).contiguous().transpose(1, 2)
        elif name.endswith("attn.W_O") and data.ndim == 3:
            parameter.data = data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
