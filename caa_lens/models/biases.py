"""Biases on MLP outputs: in a copy of a model that shares its weights, and in a Hugging Face checkpoint.

A checkpoint is loaded once: a bridge over its weights finds the projections and is baked, and the plain model, which no
TransformerLens component has entered, gets the biases and is saved.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from caa_lens.errors import InputError
from caa_lens.files import atomic_path
from caa_lens.models import Model, describe, host
from caa_lens.models.base import share_weights
from caa_lens.models.bridge import projection_path
from caa_lens.models.checkpoints import Checkpoint, as_dtype, load_checkpoint, quiet
from caa_lens.models.loading import Identity, from_checkpoint, identify, identity


def duplicate(model: Model) -> Model:
    """A model of the same class and name with modules of its own over the same weights, which are frozen in it."""
    twin = host(model).duplicate(model)
    identify(twin, identity(model))
    return twin


def output_bias(model: Model, layer: int) -> Tensor:
    """The bias that block `layer` adds to its MLP's output, made of zeros where there is none: assign to its `.data`.

    Raises:
        InputError: the block has no MLP, or several experts in its place.
    """
    bias = host(model).output_bias(model, layer)
    if bias is None:
        raise InputError(
            f"block {layer} of {describe(model).name} has no MLP with one output projection (it has none, or a mixture of "
            "experts), so there is no bias to put a vector in; steer with hooks: `with steer(...)`."
        )
    return bias


def open_checkpoint(
    name: str | os.PathLike[str], *, dtype: torch.dtype | str | None, revision: str | None
) -> tuple[Checkpoint, Model]:
    """A checkpoint on the CPU, and a bridge over its weights that leaves the checkpoint's own modules alone."""
    checkpoint = load_checkpoint(name, dtype=as_dtype(dtype), device=torch.device("cpu"), revision=revision)
    # TransformerLens may change the tokenizer that it is given.
    beside = replace(checkpoint, model=share_weights(checkpoint.model), tokenizer=copy.deepcopy(checkpoint.tokenizer))
    model = from_checkpoint(beside, "bridge")
    identify(model, Identity(checkpoint.name, checkpoint.revision, checkpoint.base))
    return checkpoint, model


def save_checkpoint(
    checkpoint: Checkpoint,
    baked: Model,
    layers: Sequence[int],
    folder: Path,
    *,
    record: Sequence[Mapping[str, Any]],
) -> None:
    """Gives the checkpoint's model the baked one's biases and writes it with its tokenizer, whole or not at all.

    Args:
        checkpoint: as `open_checkpoint` returned it; its model is changed.
        baked: the bridge that came with it, baked.
        layers: the blocks whose biases were baked.
        folder: a directory that does not exist, or an empty one.
        record: what was baked, for `config.json`.

    Raises:
        InputError: `transformers` builds the architecture without such biases.
    """
    model = checkpoint.model
    projections = {layer: projection_path(baked, layer) for layer in layers}
    if any(model.get_submodule(path).bias is None for path in projections.values()):
        _switch_on_mlp_biases(model, checkpoint.name)
    for layer, path in projections.items():
        model.get_submodule(path).bias = nn.Parameter(output_bias(baked, layer), requires_grad=False)
    model.config.caa_lens = list(record)
    with atomic_path(folder) as temporary, quiet():
        model.save_pretrained(temporary)
        checkpoint.tokenizer.save_pretrained(temporary)


def _switch_on_mlp_biases(model: Any, name: str) -> None:
    """Adds zero biases to a model that `transformers` builds with them when its configuration says `mlp_bias`."""
    model.config.mlp_bias = True
    with torch.device("meta"):
        expected = type(model)(model.config).state_dict()
    added = expected.keys() - model.state_dict().keys()
    if not added:
        raise InputError(
            f"transformers builds {type(model).__name__} ({name}) without a bias on the MLP's output, so no checkpoint of it can "
            "hold a vector; architectures that can are Llama's and its like (mlp_bias), and those that have such biases anyway "
            "(GPT-2, GPT-NeoX, Phi, ...). caa_lens.bake() works in memory."
        )
    dtype = next(model.parameters()).dtype
    for key in added:
        path, _, parameter = key.rpartition(".")
        zeros = torch.zeros(expected[key].shape, dtype=dtype)
        setattr(model.get_submodule(path), parameter, nn.Parameter(zeros, requires_grad=False))
