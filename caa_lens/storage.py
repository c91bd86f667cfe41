"""The package's own vector file: one safetensors file with everything a vector knows of itself.

Tensors `layer.<l>` and `control.<name>.layer.<l>` (fp32, `[d_model]`, output of 0-based block l); metadata `caa_lens`:
format version, site, provenance and norms, as JSON. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from caa_lens.errors import InputError
from caa_lens.files import atomic_path
from caa_lens.provenance import Provenance
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet

FORMAT = "caa_lens.vectors"
FORMAT_VERSION = 1


def save_vectors(vectors: VectorSet, path: str | os.PathLike[str]) -> None:
    """Writes a set and its controls, whole or not at all."""
    tensors = {f"layer.{v.layer}": v.tensor.contiguous() for v in vectors.values()}
    for name, control in vectors.controls.items():
        tensors |= {f"control.{name}.layer.{v.layer}": v.tensor.contiguous() for v in control.values()}
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "site": "resid_post",
        "provenance": asdict(vectors.provenance),
        "residual_norms": {v.layer: v.residual_norm for v in vectors.values()},
        "raw_norms": {v.layer: v.raw_norm for v in vectors.values()},
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"caa_lens": json.dumps(metadata)})


def load_vectors(path: str | os.PathLike[str]) -> VectorSet:
    """Reads a file written by `VectorSet.save`.

    Raises:
        InputError: the file cannot be read, is cut short, is of another kind or of a newer version; the message
            names the file and what to do.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("caa_lens", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as a vector file ({error}); it may be missing or cut short. Save it again with "
            "VectorSet.save()."
        ) from error
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} is a safetensors file, but not one of steering vectors: its metadata has no 'caa_lens' entry of "
            f"format {FORMAT!r}. Save vectors with VectorSet.save()."
        )
    if metadata.get("version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {metadata.get('version')!r}; this caa_lens reads version {FORMAT_VERSION}. "
            "Install the caa_lens that wrote it, or extract the vectors again."
        )
    return _from_file(os.fspath(path), metadata, tensors)


def _from_file(path: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VectorSet:
    try:
        stored = dict(metadata["provenance"])
        for key in ("prompt_digests", "normalized_across"):
            stored[key] = tuple(stored[key])
        provenance = Provenance(**stored)
        by_group: dict[str, list[SteeringVector]] = {}
        for name, tensor in tensors.items():
            group, _, layer = name.rpartition("layer.")
            own = not group
            by_group.setdefault(group.removeprefix("control.").removesuffix("."), []).append(
                SteeringVector(
                    tensor,
                    int(layer),
                    provenance if own else replace(provenance, expression=f"{provenance.expression}, control"),
                    residual_norm=metadata["residual_norms"][layer],
                    raw_norm=metadata["raw_norms"][layer] if own else None,
                )
            )
        vectors = by_group.pop("")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is not a whole vector file ({error}); save it again with VectorSet.save()."
        ) from error
    return VectorSet(vectors, {name: VectorSet(group) for name, group in by_group.items()})
