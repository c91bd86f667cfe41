"""The package's own vector file: one safetensors file with everything a vector knows of itself.

Tensors `layer.<l>` and `control.<name>.layer.<l>` (fp32, `[d_model]`, output of 0-based block l); metadata `caa_lens`:
format version, site, provenance, norms and a checksum of all this, as JSON. Nothing is unpickled. `pack` and `unpack` serve
every other format that has room for a text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from caa_lens.errors import InputError
from caa_lens.files import atomic_path, digest
from caa_lens.provenance import Provenance
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet

FORMAT = "caa_lens.vectors"
FORMAT_VERSION = 1


def save_vectors(vectors: VectorSet, path: str | os.PathLike[str]) -> None:
    """Writes a set and its controls, whole or not at all."""
    text, tensors = pack(vectors)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"caa_lens": text})


def load_vectors(path: str | os.PathLike[str]) -> VectorSet:
    """Reads a file written by `VectorSet.save`.

    Raises:
        InputError: the file cannot be read, is cut short or changed, is of another kind or of a newer version; the message
            names the file and what to do.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("caa_lens", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:  # the reader raises whatever the bytes lead it to
        raise InputError(
            f"{path} cannot be read as a vector file ({error}); it may be missing or cut short. Save it again with "
            "VectorSet.save()."
        ) from error
    return unpack(os.fspath(path), text, tensors)


def pack(vectors: VectorSet) -> tuple[str, dict[str, Tensor]]:
    """A set as (metadata in JSON, tensors by name)."""
    tensors = {f"layer.{v.layer}": v.tensor.contiguous() for v in vectors.values()}
    for name, control in vectors.controls.items():
        tensors |= {f"control.{name}.layer.{v.layer}": v.tensor.contiguous() for v in control.values()}
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "site": "resid_post",
        "provenance": asdict(vectors.provenance),
        "residual_norms": {str(v.layer): v.residual_norm for v in vectors.values()},
        "raw_norms": {str(v.layer): v.raw_norm for v in vectors.values()},
    }
    return json.dumps(metadata | {"checksum": _checksum(metadata, tensors)}), tensors


def unpack(where: str, text: str, tensors: Mapping[str, Tensor]) -> VectorSet:
    """The set that `pack` gave, exactly.

    Args:
        where: the file, for messages.

    Raises:
        InputError: not what `pack` wrote, or changed since.
    """
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where} cannot be read as a vector file (its metadata is no JSON: {error}); it was cut short or changed. Save "
            "it again with VectorSet.save()."
        ) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InputError(
            f"{where} is a file of tensors, but not one of steering vectors: its metadata has no 'caa_lens' entry of "
            f"format {FORMAT!r}. Save vectors with VectorSet.save()."
        )
    if metadata.get("version") != FORMAT_VERSION:
        raise InputError(
            f"{where} has format version {metadata.get('version')!r}; this caa_lens reads version {FORMAT_VERSION}. "
            "Install the caa_lens that wrote it, or extract the vectors again."
        )
    try:
        checksum = metadata.pop("checksum")
        if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
            raise ValueError("a tensor is not float32")
        if checksum != _checksum(metadata, tensors):
            raise ValueError("its checksum does not match: it was changed or damaged")
        return _unpacked(metadata, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{where} is not a whole vector file ({error}); save it again with VectorSet.save()."
        ) from error


def _checksum(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the metadata and of every tensor's name, shape and bytes."""
    contents = {
        name: [list(tensor.shape), hashlib.sha256(tensor.numpy().tobytes()).hexdigest()]
        for name, tensor in tensors.items()
    }
    return digest([metadata, contents])


def _unpacked(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VectorSet:
    provenance = _provenance(metadata["provenance"])
    by_group: dict[str, list[SteeringVector]] = {}
    for name, tensor in tensors.items():
        group, _, layer = name.rpartition("layer.")
        own = not group
        by_group.setdefault(group.removeprefix("control.").removesuffix("."), []).append(
            SteeringVector(
                tensor,
                int(layer),
                provenance if own else replace(provenance, expression=f"{provenance.expression}, control"),
                residual_norm=_norm(metadata["residual_norms"][layer]),
                raw_norm=_norm(metadata["raw_norms"][layer]) if own else None,
            )
        )
    vectors = by_group.pop("")
    return VectorSet(vectors, {name: VectorSet(group) for name, group in by_group.items()})


_IS: dict[str, Any] = {
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "tuple[str, ...]": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "Mapping[str, str]": lambda value: (
        isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    ),
}
"""Whether a value read from JSON is of an annotated type of `Provenance`."""


def _provenance(stored: Mapping[str, Any]) -> Provenance:
    for field in fields(Provenance):
        if not _IS[str(field.type)](stored[field.name]):
            raise TypeError(f"provenance: {field.name} is {stored[field.name]!r}, not {field.type}")
    if stored["basis"] not in ("raw", "folded", "centred"):
        raise ValueError(f"provenance: there is no basis {stored['basis']!r}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
    }
    return Provenance(**values)


def _norm(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise TypeError(f"a norm is {value!r}, not a number")
    return float(value)
