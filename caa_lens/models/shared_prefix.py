"""Attention of many rows that continue a few cached prefixes, without a copy of the prefix for every row.

Row r of `copies * batch` rows continues prefix r mod batch:

    softmax([q_r K_prefix^T, q_r K_r^T] / scale) [V_prefix; V_r]

The queries of all copies form one matrix per prefix, so its keys are rotated and its values read once. Equal to TransformerLens'
own attention on repeated caches to rounding. What TransformerLens computes there beyond softmax attention (soft caps, windows,
sinks, a user's hooks inside) is left to it: `block_for` then gives None.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

BEYOND_SOFTMAX = (
    "use_attention_sinks",
    "use_logn_attn",
    "use_dynamic_ntk_rope",
    "use_attn_result",
    "use_split_qkv_input",
    "use_attn_in",
    "load_in_4bit",
    "clip_qkv",
    "_attention_dir_override",
)
"""Settings of TransformerLens 3 under which attention does more than the equation above."""


def block_for(block: nn.Module) -> nn.Module | None:
    """A twin of a HookedTransformer block that shares everything with it but the way attention is computed.

    Its `past_kv_cache_entry` is that of one copy of the batch. The block itself is not changed.

    Returns:
        None where attention is anything but causal softmax attention with rotary or no rotation, or has hooks inside.
    """
    attn: Any = block.attn
    cfg = attn.cfg
    plain = (
        type(attn).__name__ in ("Attention", "GroupedQueryAttention")
        and cfg.positional_embedding_type in ("rotary", "standard")
        and cfg.attention_dir == "causal"
        and attn.attn_type == "global"
        and getattr(cfg, "attn_scores_soft_cap", -1.0) <= 0
        and not str(cfg.original_architecture).startswith("Olmo")
        and not any(getattr(cfg, name, None) or getattr(attn, name, None) for name in BEYOND_SOFTMAX)
    )
    if not plain or any(_is_hooked(module) for module in attn.modules()):
        return None
    twin = copy.copy(block)
    twin._modules = {**block._modules, "attn": SharedPrefixAttention(attn)}
    return twin


def _is_hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class SharedPrefixAttention(nn.Module):
    """Computes what the given attention layer would on `copies` repetitions of its cache, with its weights."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.attn = attn

    def forward(
        self,
        query_input: Float[Tensor, "row pos d_model"],
        key_input: Float[Tensor, "row pos d_model"],
        value_input: Float[Tensor, "row pos d_model"],
        past_kv_cache_entry: Any,
        attention_mask: Int[Tensor, "row all"],
    ) -> Float[Tensor, "row pos d_model"]:
        """Rows are copy-major: `row = copy * batch + text`.

        Args:
            query_input, key_input, value_input: normalised `resid_pre` of the new tokens.
            past_kv_cache_entry: this layer's cached keys (not rotated) and values, `[batch, past, kv_head, d_head]`.
            attention_mask: of the prefix, which is the same in all copies, and the new tokens.
        """
        attn = self.attn
        attention_mask = attention_mask.to(query_input.device)
        batch, past = past_kv_cache_entry.past_keys.shape[:2]
        prefix_mask = attention_mask[:batch, :past]
        copies, length = query_input.shape[0] // batch, query_input.shape[1]
        q, k, v = attn.calculate_qkv_matrices(query_input, key_input, value_input)
        prefix_k, prefix_v = past_kv_cache_entry.past_keys, past_kv_cache_entry.past_values
        if attn.cfg.positional_embedding_type == "rotary":
            q, k = attn.apply_rotary(q, past, attention_mask), attn.apply_rotary(k, past, attention_mask)
            prefix_k = attn.apply_rotary(prefix_k, 0, prefix_mask)
        heads = k.shape[2]
        # Query heads that share a key head stand together, as in TransformerLens' repeat_interleave.
        q = rearrange(q / attn.attn_scale, "(c b) s (g r) d -> b g (c r s) d", b=batch, g=heads)
        own_q = rearrange(q, "b g (c r s) d -> (c b) g (r s) d", c=copies, s=length)
        own_k, own_v = k.transpose(1, 2), v.transpose(1, 2)
        lowest = torch.finfo(q.dtype).min
        to_prefix = q @ rearrange(prefix_k, "b p g d -> b g d p")
        to_prefix = to_prefix.masked_fill(prefix_mask[:, None, None, :] == 0, lowest)
        to_own = rearrange(own_q @ own_k.mT, "(c b) g (r s) t -> b g c r s t", c=copies, s=length)
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        own_mask = rearrange(attention_mask[:, past:].bool(), "(c b) t -> b 1 c 1 1 t", c=copies)
        allowed = causal & own_mask
        to_own = rearrange(to_own.masked_fill(~allowed, lowest), "b g c r s t -> b g (c r s) t")
        pattern = torch.cat([to_prefix, to_own], -1).softmax(-1)
        own_pattern = rearrange(pattern[..., past:], "b g (c r s) t -> (c b) g (r s) t", c=copies, s=length)
        z = rearrange(
            pattern[..., :past] @ rearrange(prefix_v, "b p g d -> b g p d"),
            "b g (c r s) d -> (c b) g (r s) d",
            c=copies,
            s=length,
        )
        z = rearrange(z + own_pattern @ own_v, "n g (r s) d -> n s (g r d)", s=length)
        weight = rearrange(attn.W_O, "head d_head d_model -> d_model (head d_head)")
        return nn.functional.linear(z, weight, attn.b_O)
