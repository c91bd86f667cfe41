"""From the residual stream to logits: the final norm and the unembedding of either class, called on any stream.

norm(x) = A x / scale(x) + b        A: gain (and centring, for LayerNorm);  scale(x) = sqrt(mean((centred) x^2) + eps)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.models.base import Model


def to_readout(model: Model, stream: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """The stream on the device and in the dtype of the unembedding."""
    weight = next(model.unembed.parameters())
    return stream.to(weight.device, weight.dtype)


def normed(
    model: Model, stream: Float[Tensor, "batch pos d_model"]
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos 1"]]:
    """The final norm's output, and the scale it divided by (1 where the model has no final norm)."""
    if model.cfg.normalization_type is None:
        return stream, torch.ones_like(stream[..., :1])
    scales: list[Tensor] = []
    name = "ln_final.hook_scale"
    with model.hooks(fwd_hooks=[(name, lambda scale, hook: scales.append(scale))]):
        out = model.ln_final(stream)
    return out, scales[-1].reshape(*stream.shape[:-1], 1)


def unembed(model: Model, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a stream as if it were the last block's output, soft cap and biases included."""
    return capped(model, model.unembed(normed(model, residual)[0]))


def capped(model: Model, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """What the model does to the unembedding's output."""
    adapter = getattr(model, "adapter", None)
    if adapter is not None:
        return adapter.apply_output_logits_transform(logits)
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0
    return cap * torch.tanh(logits / cap) if cap > 0 else logits
