"""Running a `TransformerBridge` (TransformerLens 3 and 4), which wraps a Hugging Face module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.models.base import (
    Basis,
    Branch,
    Hook,
    Inputs,
    Model,
    Prefix,
    is_centred,
    resid_post,
    select_positions,
    whole_mask,
)


def basis(model: Model) -> Basis:
    """Raw unless compatibility mode processed the weights."""
    if not model.compatibility_mode:
        return "raw"
    rms = "RMS" in str(model.cfg.normalization_type)
    return "centred" if not rms and is_centred(model.W_E) else "folded"


def run(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    past: Prefix | None,
    grow: bool,
    logits: int,
    stop_at_layer: int | None,
) -> tuple[Float[Tensor, "batch kept d_vocab"] | None, Prefix | None]:
    """One forward pass; the mask given with a cache covers everything, and the cache grows in place."""
    whole = whole_mask(mask, past)
    options: dict[str, Any] = {"use_cache": grow or past is not None}
    if past:
        options["past_key_values"] = past.cache if grow else copy.deepcopy(past.cache)
    if stop_at_layer is not None and stop_at_layer < model.cfg.n_layers:
        options["stop_at_layer"] = stop_at_layer
    out = model(
        tokens,
        attention_mask=whole,
        position_ids=(whole.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
        return_type="logits_and_cache",
        logits_to_keep=max(logits, 1),
        **options,
    )
    if "stop_at_layer" in options:
        return None, None
    return (out[0] if logits else None), (Prefix(out[1], whole) if grow else None)


def run_branches(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    past: Prefix | None,
    branches: Sequence[Branch],
    readout: Callable[[Float[Tensor, "batch read d_vocab"]], Tensor],
    at: Int[Tensor, "batch read"],
) -> list[Tensor]:
    """Every branch as a copy of the batch's rows; a layer's hook changes the rows of its own branches."""
    batch, length = tokens.shape
    copies = len(branches)
    at_layer: dict[int, list[int]] = {}
    for number, branch in enumerate(branches):
        if branch.layer is not None:
            at_layer.setdefault(branch.layer, []).append(number)

    def branch_at(layer: int, numbers: Sequence[int]) -> Hook:
        def branch_hook(activations: Tensor, hook: Any) -> Tensor:
            parts = list(activations.split(batch))
            for number in numbers:
                parts[number] = branches[number].change(parts[number])
            return torch.cat(parts)

        return resid_post(layer), branch_hook

    index = torch.arange(batch, device=tokens.device).repeat(copies)
    with model.hooks(fwd_hooks=[branch_at(layer, numbers) for layer, numbers in at_layer.items()]):
        logits, _ = run(model, tokens[index], mask[index], past.rows(index) if past else None, False, length, None)
    assert logits is not None
    return [readout(select_positions(part, at)) for part in logits.split(batch)]


def watch(model: Model, watcher: Callable[[Inputs], None]) -> list[Any]:
    """A PyTorch hook on the wrapped module, which sees tokens, mask and cache."""

    def model_hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        given = tokens if tokens is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        watcher(Inputs(tokens, kwargs.get("attention_mask"), past, (given.shape[0], given.shape[1])))

    return [model.original_model.register_forward_pre_hook(model_hook, with_kwargs=True)]
