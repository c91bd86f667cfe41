"""From the residual stream to logits: the final norm and the unembedding of either class, called on any stream.

norm(x) = A x / scale(x) + b        A: gain (and centring, for LayerNorm);  scale(x) = sqrt(mean((centred) x^2) + eps)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from caa_lens.models.base import Model
from caa_lens.models.hook_points import hooks

LOGITS = 2**24
"""Numbers in the largest tensor of logits that is made for several streams together."""


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
    with hooks(model, [("ln_final.hook_scale", lambda scale, hook: scales.append(scale))]):
        out = model.ln_final(_beside(model.ln_final, stream))
    return out.to(stream.device), scales[-1].reshape(*stream.shape[:-1], 1).to(stream.device)


def unembed(model: Model, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a stream as if it were the last block's output, soft cap and biases included."""
    if model.cfg.normalization_type is not None:
        residual = model.ln_final(_beside(model.ln_final, residual))
    return capped(model, model.unembed(_beside(model.unembed, residual)))


def _beside(module: nn.Module, x: Tensor) -> Tensor:
    """The tensor on the module's device: in a model that is spread over several, the last ones may be on different ones."""
    weight = next(module.parameters(), None)
    return x if weight is None else x.to(weight.device)


def unembed_each(
    model: Model, streams: Sequence[Float[Tensor, "batch read d_model"]]
) -> Iterator[Float[Tensor, "batch read d_vocab"]]:
    """Logits of each stream: several at a time, but not of all, which would be the largest tensor by far."""
    batch, read = streams[0].shape[:2]
    together = max(1, LOGITS // (batch * read * model.cfg.d_vocab))
    for first in range(0, len(streams), together):
        yield from unembed(model, torch.cat(list(streams[first : first + together]))).split(batch)


def capped(model: Model, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """What the model does to the unembedding's output."""
    adapter = getattr(model, "adapter", None)
    if adapter is not None:
        return adapter.apply_output_logits_transform(logits)
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0
    return cap * torch.tanh(logits / cap) if cap > 0 else logits
