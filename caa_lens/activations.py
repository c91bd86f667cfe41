"""Activations of contrast pairs, in memory and on disk: memory-mapped safetensors shards, one a batch.

A store belongs to one extraction (model, pairs, template, layers, position read) and is how an interrupted one goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from caa_lens.errors import InputError
from caa_lens.files import atomic_path, claim_folder, is_claimed


@dataclass(frozen=True)
class PairActivations:
    """Residual streams of a batch of pairs at the position read, fp32 on the CPU.

    Attributes:
        index: which pairs of the set these are.
        positive, negative: `[pair, layer, d_model]`, layers in the order asked for.
    """

    index: tuple[int, ...]
    positive: Float[Tensor, "pair layer d_model"]
    negative: Float[Tensor, "pair layer d_model"]


Activations = str | os.PathLike[str] | Mapping[int, tuple[Float[Tensor, "_ d_model"], Float[Tensor, "_ d_model"]]]
"""A store written by `extract(..., store=...)`, or {layer: (positive, negative)}."""


def open_store(folder: Path, signature: str, about: Mapping[str, Any]) -> Path:
    """Makes a folder the store of an extraction, or recognises it as such.

    Raises:
        InputError: it holds something else.
    """
    file = folder / "about.json"
    if not is_claimed(file, signature, "extraction"):
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no stored activations; give a new folder.")
        claim_folder(file, signature, about)
    return folder


def write_shard(path: Path, batch: PairActivations) -> None:
    """Writes one batch, whole or not at all."""
    tensors = {
        "index": torch.tensor(batch.index),
        "positive": batch.positive.contiguous(),
        "negative": batch.negative.contiguous(),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def read_shard(path: Path) -> PairActivations:
    """Reads one batch.

    Raises:
        InputError: the file cannot be read; it names the shard to delete.
    """
    try:
        with safe_open(path, framework="pt") as file:
            index = tuple(file.get_tensor("index").tolist())
            return PairActivations(index, file.get_tensor("positive"), file.get_tensor("negative"))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete this shard and extract again.") from error


def load_activations(
    store: str | os.PathLike[str], layer: int
) -> tuple[Float[Tensor, "pair d_model"], Float[Tensor, "pair d_model"]]:
    """Positive and negative activations of one layer, in the order of the pairs, from a store written by `extract`.

    Only this layer is read from the files.

    Raises:
        InputError: there is no store, it is incomplete, or it has no such layer.
    """
    folder = Path(store)
    about = _read_about(folder)
    if layer not in about["layers"]:
        raise InputError(f"{folder} has the layers {about['layers']}, not {layer}.")
    row = about["layers"].index(layer)
    shards = sorted(folder.glob("shard-*.safetensors"))
    if len(shards) != about["n_shards"]:
        raise InputError(
            f"{folder} holds {len(shards)} of {about['n_shards']} shards; run extract(..., store=...) again to finish it."
        )
    sides: dict[str, dict[int, Tensor]] = {"positive": {}, "negative": {}}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for side, found in sides.items():
                found |= zip(file.get_tensor("index").tolist(), file.get_slice(side)[:, row], strict=True)
    positive, negative = (torch.stack([found[i] for i in range(about["n_pairs"])]) for found in sides.values())
    return positive, negative


def layers_of(activations: Activations, layers: Sequence[int] | None = None) -> list[int]:
    """The layers asked for, all that are there by default.

    Raises:
        InputError: there is no store, or no such layer in it.
    """
    there = tuple(activations) if isinstance(activations, Mapping) else tuple(_read_about(Path(activations))["layers"])
    chosen = list(there if layers is None else layers)
    missing = [layer for layer in chosen if layer not in there]
    if missing or not chosen:
        raise InputError(
            f"no activations of layer {', '.join(map(str, missing)) or '(none asked for)'}; there are "
            f"{', '.join(map(str, there))}."
        )
    return chosen


def sides_of(
    activations: Activations, layer: int
) -> tuple[Float[Tensor, "pair d_model"], Float[Tensor, "pair d_model"]]:
    """Positive and negative activations of one layer, on the CPU."""
    both = activations[layer] if isinstance(activations, Mapping) else load_activations(activations, layer)
    positive, negative = (side.cpu() for side in both)
    return positive, negative


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{folder} holds no stored activations ({error}); make them with extract(..., store=...)."
        ) from error
