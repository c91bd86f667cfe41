"""What tells a model's weights from others of the same name, in a few numbers.

    [sum of b, sum of b^2] mod 2^64        b = the 16-bit words of a parameter, as integers

Integers add up to the same in every order: the numbers depend neither on the device nor on the number of threads, nor on how a
parameter is laid out in memory. A parameter of zeros counts for nothing and equal ones count once, so that a `HookedTransformer`
and a `TransformerBridge` of one Llama checkpoint agree.

Caveat: parameters are told apart by these sums only, and buffers are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from caa_lens.files import digest
from caa_lens.models.base import Model
from caa_lens.models.hook_points import hooked_points

WORDS = {"cpu": 1 << 15}
"""Words that are summed together, by device: a copy of them fits into a processor's cache."""


@torch.no_grad()
def fingerprint(model: Model) -> str:
    """SHA-256 (hex) of the weights' sums by block, and of all that stands outside the blocks. Every weight is read once: in half
    precision about three seconds for a thousand million of them on one processor core, and far less on a GPU."""
    blocks = [list(_weights(block)) for block in model.blocks]
    inside = {id(weight) for block in blocks for weight in block}
    outside = (weight for weight in _weights(model) if id(weight) not in inside)
    return digest([_sums(outside), *map(_sums, blocks)])


def model_state(model: Model) -> str:
    """Digest of what a forward pass depends on beyond the model's name: its weights, and at which points it has hooks now (not
    what these do)."""
    return digest([fingerprint(model), hooked_points(model)])


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, and the tensors that a bridge in compatibility mode computes with in their place."""
    seen: set[int] = set()
    for part in module.modules():
        processed = (value for name, value in vars(part).items() if name.startswith("_processed"))
        for weight in (*part._parameters.values(), *processed):
            if isinstance(weight, Tensor) and id(weight) not in seen:
                seen.add(id(weight))
                yield weight


def _sums(weights: Iterable[Tensor]) -> list[list[int]]:
    found = {tuple(_sums_of(weight)) for weight in weights}
    return sorted(map(list, found - {(0, 0)}))


def _sums_of(weight: Tensor) -> list[int]:
    flat = weight.detach().reshape(-1)
    words = flat.view(torch.int16 if flat.element_size() % 2 == 0 else torch.uint8)
    sums = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for part in words.split(WORDS.get(flat.device.type, 1 << 22)):
        whole = part.int()  # the square of 16 bits fits in 32
        sums += torch.stack([whole.sum(dtype=torch.int64), (whole * whole).sum(dtype=torch.int64)])
    return sums.tolist()
