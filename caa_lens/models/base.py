"""What the two TransformerLens model classes have in common here: names, records, and the shape of a host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

Model = Any
"""A `HookedTransformer` or a `TransformerBridge`."""

Basis = Literal["raw", "folded", "centred"]


@dataclass
class Prefix:
    """A KV cache and the attention mask of the tokens it holds. `run` never changes one unless asked to grow it."""

    cache: Any
    mask: Int[Tensor, "batch past"]

    def select(self, index: Int[Tensor, " rows"]) -> None:
        """Row i becomes what row `index[i]` was; rows may repeat. Layer by layer: old and new are never both whole in memory."""
        self.mask = self.mask.index_select(0, index)
        if hasattr(self.cache, "batch_select_indices"):
            for layer in self.cache.layers:  # each on its own device
                layer.batch_select_indices(index if layer.keys is None else index.to(layer.keys.device))
            return
        self.cache.previous_attention_mask = self.mask
        for entry in self.cache.entries:
            entry.past_keys = entry.past_keys.index_select(0, index.to(entry.past_keys.device))
            entry.past_values = entry.past_values.index_select(0, index.to(entry.past_values.device))

    def rows(self, index: Int[Tensor, " rows"]) -> Prefix:
        """A new prefix with the rows that `select` would leave; this one stays as it is."""
        cache = copy.copy(self.cache)
        if hasattr(cache, "entries"):
            cache.entries = list(map(copy.copy, cache.entries))
        else:
            cache.layers = list(map(_own_layer, cache.layers))
        rows = Prefix(cache, self.mask)
        rows.select(index)
        return rows


def frozen_cache(cache: Any) -> Any:
    """A Hugging Face cache that a forward pass continues and leaves as it is; a dynamic layer's longer keys and values do not
    outlive their turn. It is what TransformerLens' own cache does when it is told to freeze.
    """
    frozen = copy.copy(cache)
    frozen.layers = list(map(_frozen_layer, cache.layers))
    return frozen


def _frozen_layer(layer: Any) -> Any:
    frozen = _own_layer(layer)
    if isinstance(layer, DynamicLayer):
        frozen.update = lambda *args, **kwargs: _own_layer(layer).update(*args, **kwargs)
    return frozen


def _own_layer(layer: Any) -> Any:
    """A copy that can change by itself. A dynamic layer gets new tensors when it grows or selects rows, and leaves the old ones
    alone, so that these are shared; a layer of another kind (a state that is updated in place) is copied whole.
    """
    return (copy.copy if isinstance(layer, DynamicLayer) else copy.deepcopy)(layer)


@dataclass(frozen=True)
class Branch:
    """One variant of a forward pass: what happens to `resid_post` of which layers. Without changes it is the unsteered pass."""

    changes: Mapping[int, Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]]


@dataclass(frozen=True)
class Inputs:
    """What one forward pass was given: `tokens` is None where it got embeddings or began at a later block; `mask` covers past and
    new."""

    tokens: Int[Tensor, "batch pos"] | None
    mask: Int[Tensor, "batch all"] | None
    past: int
    shape: tuple[int, int]


@runtime_checkable
class Host(Protocol):
    """How one of the classes is run; `hooked` and `bridge` are the two modules that do it."""

    def run(
        self,
        model: Model,
        tokens: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        past: Prefix | None,
        grow: bool,
        logits: int,
        stop_at_layer: int | None,
    ) -> tuple[Float[Tensor, "batch kept d_vocab"] | None, Prefix | None]: ...

    def run_branches(
        self,
        model: Model,
        tokens: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        past: Prefix | None,
        branches: Sequence[Branch],
        readout: Callable[[Float[Tensor, "batch read d_vocab"]], Tensor],
        at: Int[Tensor, "batch read"],
    ) -> list[Tensor]: ...

    def basis(self, model: Model) -> Basis: ...

    def watch(self, model: Model, watcher: Callable[[Inputs], None]) -> list[Any]: ...

    def duplicate(self, model: Model) -> Model: ...

    def output_bias(self, model: Model, layer: int) -> Tensor | None: ...


def share_weights(module: Any, **kept: Any) -> Any:
    """A copy of a module whose parameters and buffers are new objects over the same memory; parameters are frozen.

    Args:
        kept: what the copy has in common with the original.
    """
    memo = {id(value): value for value in kept.values()}
    for parameter in module.parameters():
        # Quantised parameters are of classes of their own, which carry more than their numbers.
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    memo.update({id(buffer): buffer.detach() for buffer in module.buffers()})
    return copy.deepcopy(module, memo)


def is_centred(embedding: Float[Tensor, "d_vocab d_model"]) -> bool:
    """Whether every row's mean was removed, as TransformerLens does for LayerNorm models."""
    rows = embedding.detach().float()
    return float(rows.mean(-1).abs().max()) < 1e-3 * float(rows.std())


def select_positions(x: Float[Tensor, "batch pos d"], at: Int[Tensor, "batch read"]) -> Float[Tensor, "batch read d"]:
    """Each row's own positions."""
    return x.gather(1, at.to(x.device).unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def whole_mask(mask: Int[Tensor, "batch pos"], past: Prefix | None) -> Int[Tensor, "batch all"]:
    """The mask over the prefix and the new tokens."""
    return torch.cat([past.mask, mask], 1) if past else mask
