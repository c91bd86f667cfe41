"""Running a `TransformerBridge` (TransformerLens 3 and 4), which wraps a Hugging Face module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from caa_lens.models.base import (
    Basis,
    Branch,
    Inputs,
    Model,
    Prefix,
    frozen_cache,
    is_centred,
    select_positions,
    share_weights,
    whole_mask,
)
from caa_lens.models.hook_points import Hook, capture_hooks, hooks, resid_post
from caa_lens.models.readout import unembed_each

SEGMENTS = 512
"""Tokens of all branches that stand side by side in one row; attention among them grows with the square."""


def basis(model: Model) -> Basis:
    """For LayerNorm from the embedding's row means, and from compatibility mode, which folds the norms' weights."""
    if "RMS" not in str(model.cfg.normalization_type) and is_centred(model.W_E):
        return "centred"
    return "folded" if model.compatibility_mode else "raw"


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
    if past is not None and len(tokens) != len(past.mask):
        copies = len(tokens) // len(past.mask)
        past = past.rows(torch.arange(len(past.mask), device=tokens.device).repeat(copies))
    whole = whole_mask(mask, past)
    options: dict[str, Any] = {"use_cache": grow or past is not None}
    if past:
        options["past_key_values"] = past.cache if grow else frozen_cache(past.cache)
    if stop_at_layer is not None and stop_at_layer < model.cfg.n_layers:
        options["stop_at_layer"] = stop_at_layer
    out = model(
        tokens,
        attention_mask=whole,
        position_ids=_position_ids(whole, tokens.shape[1]),
        return_type="logits_and_cache",
        logits_to_keep=max(logits, 1),
        **options,
    )
    if "stop_at_layer" in options:
        return None, None
    return (out[0] if logits else None), (Prefix(out[1], whole) if grow else None)


def _position_ids(whole: Int[Tensor, "batch all"], length: int) -> Int[Tensor, "batch pos"]:
    """Each of the last tokens' position among the real ones of its row."""
    return (whole.long().cumsum(1) - 1).clamp(min=0)[:, -length:]


def run_branches(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    past: Prefix | None,
    branches: Sequence[Branch],
    readout: Callable[[Float[Tensor, "batch read d_vocab"]], Tensor],
    at: Int[Tensor, "batch read"],
) -> list[Tensor]:
    """Every branch as a segment of its row behind the shared cache, or as a copy of the rows where that cannot be.

    Segments stand side by side along the positions; each has the positions of the first and sees the prefix and itself only, so
    that the cache is not copied. A layer's hook changes the segments (or rows) of its own branches.
    """
    if past is not None and _takes_segments(model):
        together = max(1, SEGMENTS // tokens.shape[1])
        return [
            found
            for first in range(0, len(branches), together)
            for found in _run_apart(model, tokens, mask, past, branches[first : first + together], readout, at)
        ]
    index = torch.arange(tokens.shape[0], device=tokens.device).repeat(len(branches))
    with _branching(model, branches, tokens.shape[0], 0) as read:
        run(model, tokens[index], mask[index], past.rows(index) if past else None, False, 0, None)
    return list(map(readout, unembed_each(model, read(at))))


def _takes_segments(model: Model) -> bool:
    """Whether attention depends on positions and mask as given, over the whole context."""
    config = model.original_model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    whole = all(k == "full_attention" for k in kinds) if kinds else not getattr(config, "sliding_window", None)
    positions = str(getattr(model.cfg, "positional_embedding_type", None))
    return whole and positions in ("rotary", "standard")


def _run_apart(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    past: Prefix,
    branches: Sequence[Branch],
    readout: Callable[[Float[Tensor, "batch read d_vocab"]], Tensor],
    at: Int[Tensor, "batch read"],
) -> list[Tensor]:
    """Segments none of which spoils another. One that overflows reaches its neighbours through the mask (0 * NaN = NaN), so that
    what is not finite is run again in halves, until it is by itself."""
    found = _run_segments(model, tokens, mask, past, branches, readout, at)
    if len(branches) == 1 or all(bool(each.isfinite().all()) for each in found):
        return found
    middle = len(branches) // 2
    return [
        each
        for half in (branches[:middle], branches[middle:])
        for each in _run_apart(model, tokens, mask, past, half, readout, at)
    ]


def _run_segments(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    past: Prefix,
    branches: Sequence[Branch],
    readout: Callable[[Float[Tensor, "batch read d_vocab"]], Tensor],
    at: Int[Tensor, "batch read"],
) -> list[Tensor]:
    copies, length = len(branches), tokens.shape[1]
    own = torch.block_diag(*[mask.new_ones(length, length).tril()] * copies).bool()
    allowed = torch.cat(
        [
            past.mask.bool().unsqueeze(1).expand(-1, copies * length, -1),
            own & mask.bool().repeat(1, copies).unsqueeze(1),
        ],
        -1,
    )
    dtype = next(model.parameters()).dtype
    additive = torch.zeros(allowed.shape, dtype=dtype, device=tokens.device)
    additive.masked_fill_(~allowed, torch.finfo(dtype).min)
    with _branching(model, branches, length, 1) as read:
        model(
            tokens.repeat(1, copies),
            attention_mask=additive.unsqueeze(1),
            position_ids=_position_ids(whole_mask(mask, past), length).repeat(1, copies),
            past_key_values=frozen_cache(past.cache),
            use_cache=True,
            logits_to_keep=1,
        )
    return list(map(readout, unembed_each(model, read(at))))


@contextmanager
def _branching(
    model: Model, branches: Sequence[Branch], size: int, axis: int
) -> Iterator[Callable[[Int[Tensor, "batch read"]], list[Float[Tensor, "batch read d_model"]]]]:
    """Hooks that change each branch's part, of `size` along `axis`; yields what reads the parts' last `resid_post`."""
    at_layer: dict[int, list[int]] = {}
    for number, branch in enumerate(branches):
        for layer in branch.changes:
            at_layer.setdefault(layer, []).append(number)

    def branch_at(layer: int, numbers: Sequence[int]) -> Hook:
        def branch_hook(activations: Tensor, hook: Any) -> Tensor:
            parts = list(activations.split(size, axis))
            for number in numbers:
                parts[number] = branches[number].changes[layer](parts[number])
            return torch.cat(parts, axis)

        return resid_post(layer), branch_hook

    final: list[Tensor] = []
    added: list[Hook] = [branch_at(layer, numbers) for layer, numbers in at_layer.items()]
    added += capture_hooks([model.cfg.n_layers - 1], lambda layer, activations: final.append(activations))
    with hooks(model, added):
        yield lambda at: [select_positions(part, at) for part in final[0].split(size, axis)]


def watch(model: Model, watcher: Callable[[Inputs], None]) -> list[Any]:
    """PyTorch hooks on the wrapped module, which sees tokens, mask and cache, and on every block: a user may call one by itself."""
    reached = -2

    def model_hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal reached
        reached = -1
        tokens = args[0] if args else kwargs.get("input_ids")
        given = tokens if tokens is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        watcher(Inputs(tokens, kwargs.get("attention_mask"), past, (given.shape[0], given.shape[1])))

    def block_hook(layer: int, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal reached
        continues, reached = layer == reached + 1, layer
        if not continues:
            batch, length = (args[0] if args else kwargs["hidden_states"]).shape[:2]
            watcher(Inputs(None, None, 0, (batch, length)))

    return [
        model.original_model.register_forward_pre_hook(model_hook, with_kwargs=True),
        *(
            block.register_forward_pre_hook(partial(block_hook, layer), with_kwargs=True)
            for layer, block in enumerate(model.blocks)
        ),
    ]


def duplicate(model: Model) -> Model:
    """A bridge of its own over the same weights."""
    twin = share_weights(model, tokenizer=model.tokenizer)
    for block in twin.blocks:
        # TransformerLens' own hooks on a block, once it has run, hold on to the block that they were made for; without them
        # the copy makes its own.
        block._teardown_capture_hooks()
    return twin


def output_bias(model: Model, layer: int) -> Tensor | None:
    """The bias of the projection that the bridge calls `mlp.out`; one of zeros is made where there is none."""
    mlp: Any = getattr(model.blocks[layer], "mlp", None)
    projection = _projection(model, layer)
    like = next(p for p in model.blocks[layer].parameters() if p.is_floating_point())  # quantised weights are integers
    zeros = like.new_zeros(model.cfg.d_model)
    if hasattr(mlp, "_processed_b_out"):  # in compatibility mode gated MLPs compute with tensors of their own
        mlp._processed_b_out = zeros if mlp._processed_b_out is None else mlp._processed_b_out
        return mlp._processed_b_out
    if projection is not None and projection.bias is None:
        projection.bias = nn.Parameter(zeros, requires_grad=False)
    return None if projection is None else projection.bias


def projection_path(model: Model, layer: int) -> str:
    """Where `transformers` has the projection whose bias is `output_bias`, such as `model.layers.3.mlp.down_proj`."""
    found = _projection(model, layer)
    path = next(path for path, module in model.original_model.named_modules() if module is found)
    return path.replace("._original_component", "")


def _projection(model: Model, layer: int) -> Any | None:
    """The wrapped module that writes the MLP's output; None where there is no single one."""
    mlp = getattr(model.blocks[layer], "mlp", None)
    projection = getattr(getattr(mlp, "out", None), "original_component", None)
    return projection if hasattr(projection, "bias") else None
