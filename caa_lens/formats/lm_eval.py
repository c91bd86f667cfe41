"""The `.pt` file of lm-evaluation-harness's `steered` model: a dict of hook points.

    {"layers.13": {"steering_vector": [d_model], "steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}}

`layers.<l>` names the module under the base model (`model.base_model.named_modules()`) whose output the vector is added to, at
every position: block l, 0-based, `blocks.<l>.hook_resid_post`. An entry `caa_lens`, which the harness passes over, holds what
`storage.pack` gives.

    lm_eval --model steered --model_args pretrained=...,steer_path=vectors.pt --tasks ...
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from caa_lens.errors import InputError
from caa_lens.files import atomic_path
from caa_lens.formats.base import Given, one_set, plain_vector
from caa_lens.formats.torch_files import read_torch
from caa_lens.storage import pack, unpack
from caa_lens.vector_set import VectorSet

BLOCK = re.compile(r"(?:[A-Za-z_]+\.)*(?:layers|h|blocks)\.([0-9]{1,5})")
"""Names of blocks in Hugging Face models: `layers.3`, `h.3`, `decoder.layers.3`."""


def load_lm_eval(path: Path, given: Given) -> VectorSet:
    """A steering file; each vector times its coefficient.

    Raises:
        InputError: not such a file, not added to the output of whole blocks, or what `Given` was to say is missing.
    """
    entries = read_torch(path)
    if not isinstance(entries, dict) or not entries:
        raise InputError(
            f"{path} is no steering file of lm-eval: expected a dict {{hook point: {{'steering_vector': ...}}}}."
        )
    vectors = {_layer(path, point): _vector(path, point, entry) for point, entry in entries.items()}
    if len(vectors) != len(entries):
        raise InputError(f"{path} names one block twice: {', '.join(map(str, entries))}.")
    first = next(iter(entries.values()))
    if isinstance(first.get("caa_lens"), str):
        tensors = {f"layer.{layer}": tensor for layer, (tensor, _) in vectors.items()}
        loaded = given.checked(path, unpack(str(path), first["caa_lens"], tensors))
    else:
        ordered = [(layer, vectors[layer][0]) for layer in sorted(vectors)]
        made = given.provenance(path, len(ordered[0][1]), expression=path.stem)
        loaded = given.chosen(one_set(path, ordered, made))
    return loaded.map(lambda v: v if vectors[v.layer][1] == 1 else v * vectors[v.layer][1])


def save_lm_eval(vectors: VectorSet, path: str | os.PathLike[str], *, hook_point: str = "layers.{layer}") -> None:
    """Writes a steering file with coefficient 1, whole or not at all; the harness steers at all its layers at once.

    Args:
        hook_point: name of a block under the base model; `"h.{layer}"` for GPT-2.
    """
    text, _ = pack(VectorSet(list(vectors.values()), controls={}))
    entries = {
        hook_point.format(layer=v.layer): {
            "steering_vector": v.tensor.clone(),
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
            "caa_lens": text,
        }
        for v in vectors.values()
    }
    with atomic_path(path) as temporary:
        torch.save(entries, temporary)


def _layer(path: Path, point: Any) -> int:
    block = BLOCK.fullmatch(point) if isinstance(point, str) else None
    if block is None:
        raise InputError(
            f"{path} steers at {point!r}, which is not the output of a block (layers.<l>, h.<l>); caa_lens vectors "
            "belong to those only."
        )
    return int(block[1])


def _vector(path: Path, point: str, entry: Any) -> tuple[torch.Tensor, float]:
    where = f"{path}, {point!r}"
    if not isinstance(entry, dict) or "steering_vector" not in entry:
        raise InputError(f"{where}: expected a dict with 'steering_vector', 'steering_coefficient' and 'action'.")
    for key, allowed in (("action", "add"), ("bias", None), ("head_index", None)):
        if entry.get(key) != allowed:
            raise InputError(
                f"{where}: {key} {entry.get(key)!r} is no vector that is added; only {key} {allowed!r} is read."
            )
    coefficient = entry.get("steering_coefficient", 1.0)
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float):
        raise InputError(f"{where}: steering_coefficient is {coefficient!r}, not a number.")
    return plain_vector(where, entry["steering_vector"]), float(coefficient)
