"""Vectors from and to other programs' files. Every format means the output of 0-based block l, `blocks.<l>.hook_resid_post`.

| format | file | read, written | carries, besides tensors and layers | strength and positions in its own program |
|---|---|---|---|---|
| `own` | one `.safetensors` | both | everything; a checksum | as in `steer` |
| `hub` | folder or repository: `vectors.safetensors`, `README.md` | both | everything; a checksum | as in `steer` |
| `gguf` | `.gguf`, `direction.<k>`, k >= 1 | both | model, provenance, norms, checksum; not block 0, not controls | option; all |
| `lm_eval` | `.pt`, `{"layers.<l>": {...}}` | both | model, provenance, norms, checksum; not controls | coefficient; all |
| `caa` | folder of `vec_layer_<l>_<model>.pt` | both | name, model; whether normalised | option; from the end of the instruction |
| `sae` | SAELens folder, `W_dec[feature]` | read | model, hook name | - |
| `remote` | `.json`, TransformerLens 4's `intervene` | written | nothing | fixed; all, or those given to `to_intervene` |
| object of `steering_vectors` | none: `to_`, `from_steering_vectors` | both | nothing | option; all, or from a token on |

Numbers become fp32, which holds fp16 and bf16 exactly, and are written as fp32. What a format cannot carry is lost with a
warning that names it. What a file does not say (a foreign GGUF names no model, no file but ours a depth) has to be given as
`model=`, `n_layers=`, `layer=`; a file that lacks it is refused.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from caa_lens.errors import CaaLensWarning, InputError
from caa_lens.formats.base import Format, Given, parts
from caa_lens.formats.caa_directory import load_caa, load_caa_activations, save_caa
from caa_lens.formats.gguf import load_gguf, save_gguf
from caa_lens.formats.gguf_file import MAGIC
from caa_lens.formats.hub import WEIGHTS, load_hub, pull_from_hub, push_to_hub, save_hub
from caa_lens.formats.lm_eval import load_lm_eval, save_lm_eval
from caa_lens.formats.remote import save_remote, to_intervene
from caa_lens.formats.sae import from_sae, load_sae
from caa_lens.formats.steering_vectors import from_steering_vectors, to_steering_vectors
from caa_lens.formats.torch_files import read_torch
from caa_lens.storage import load_vectors as load_own
from caa_lens.storage import save_vectors as save_own
from caa_lens.vector_set import VectorSet

__all__ = [
    "FORMATS",
    "load_vectors",
    "save_vectors",
    "load_caa_activations",
    "push_to_hub",
    "save_lm_eval",
    "to_intervene",
    "from_sae",
    "to_steering_vectors",
    "from_steering_vectors",
]

ALL = frozenset({"model", "name", "provenance", "basis", "normalization", "norms", "controls"})
FORMATS = {
    "own": Format(lambda path, given: given.checked(path, load_own(path)), save_own, ALL),
    "hub": Format(load_hub, save_hub, ALL),
    "gguf": Format(load_gguf, save_gguf, ALL - {"controls"}),
    "lm_eval": Format(load_lm_eval, save_lm_eval, ALL - {"controls"}),
    "caa": Format(load_caa, save_caa, frozenset({"model", "name"})),
    "sae": Format(load_sae, None),
    "remote": Format(None, save_remote),
}
"""How each format is read and written, and what it carries."""

SUFFIXES = {".gguf": "gguf", ".pt": "lm_eval", ".pth": "lm_eval", ".json": "remote"}
"""The format that a file is written in, by the end of its name; the own one otherwise."""

HUB = "hub:"


def load_vectors(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    model: Any = None,
    n_layers: int | None = None,
    layer: int | None = None,
    shift: int = 0,
    behaviour: str | None = None,
    feature: int | None = None,
) -> VectorSet:
    """Reads steering vectors, from this package or another program. Nothing is unpickled.

    Args:
        path: a file or folder, or `"hub:OWNER/NAME[@REVISION]"`.
        format: a name in `formats.FORMATS`; by default what the file shows itself to be.
        model: the TransformerLens model that the vectors belong to, or its name: for files that do not say. Vectors of another
            model are refused.
        n_layers: depth of that model, where only its name is known.
        layer: load this layer only; of a bare tensor in a file without a telling name, its layer (0-based).
        shift: added to the layers that a GGUF file states; -1 for files of llama.cpp's own generator.
        behaviour: what the vectors are called, for files that do not say.
        feature: index of the feature of an SAE.

    Raises:
        InputError: no such format, a file that cannot be read, is damaged, or does not say what it has to.
        MissingError: no such layer; a repository that cannot be reached.

    Example:
        caa.load_vectors("formality.safetensors")
        caa.load_vectors("CAA/vectors/refusal")                          # the authors' folder, all layers of the one model in it
        caa.load_vectors("happy.gguf", model=model)                      # repeng
        caa.load_vectors("llama-cpp.gguf", model=model, shift=-1)        # llama.cpp's generator
    """
    given = Given.by(model, n_layers, layer=layer, shift=shift, behaviour=behaviour, feature=feature)
    if os.fspath(path).startswith(HUB):
        return pull_from_hub(os.fspath(path).removeprefix(HUB), given)
    name = _recognise(Path(path)) if format is None else format
    load = _format(name).load
    if load is None:
        raise InputError(f"{path}: format {name!r} is written only; read {_names(readable=True)}.")
    if shift and name != "gguf":
        raise InputError(f"{path}: shift= is for GGUF control vectors; {name!r} files state the block itself.")
    return load(Path(path), given)


def save_vectors(vectors: VectorSet, path: str | os.PathLike[str], *, format: str | None = None) -> None:
    """Writes a set, whole or not at all; a warning names what the format has no room for.

    Other programs steer at all layers of a file at once: for one layer save a set of one, `VectorSet([vectors[14]])`.

    Args:
        vectors: what to write.
        path: a file, a folder for `"caa"` and `"hub"`, or `"hub:OWNER/NAME"` to upload.
        format: a name in `formats.FORMATS`; by default by the end of the path (`.gguf`, `.pt` for lm-eval, `.json` for remote
            engines), otherwise the package's own.

    Raises:
        InputError: no such format, or nothing that it could carry.
    """
    if os.fspath(path).startswith(HUB):
        push_to_hub(vectors, os.fspath(path).removeprefix(HUB))
        return
    target = Path(path)
    name = SUFFIXES.get(target.suffix, "own") if format is None else format
    entry = _format(name)
    if entry.save is None:
        raise InputError(f"{path}: format {name!r} is read only; written are {_names(readable=False)}.")
    if target.is_dir() and name not in ("caa", "hub"):
        raise InputError(f"{path} is a folder, and {name!r} is a file; name a file, or choose format='caa' or 'hub'.")
    lost = [text for part, text in parts(vectors).items() if part not in entry.carries]
    if lost:
        warnings.warn(
            f"{path}: format {name!r} does not carry {'; '.join(lost)}. Keep a .safetensors beside it.",
            CaaLensWarning,
            stacklevel=3,
        )
    entry.save(vectors, target)


def _recognise(path: Path) -> str:
    """The format of a file or folder, by what it holds."""
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return "hub"
        return "sae" if (path / "cfg.json").is_file() else "caa"
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError:
        return "own"  # whose reader says what is wrong with the path
    if head == MAGIC:
        return "gguf"
    if head[:2] == b"PK":
        return "caa" if isinstance(read_torch(path), Tensor) else "lm_eval"
    return "own"


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise InputError(f"no format {name!r}; there are {', '.join(FORMATS)}.")
    return FORMATS[name]


def _names(*, readable: bool) -> str:
    return ", ".join(name for name, entry in FORMATS.items() if (entry.load if readable else entry.save) is not None)
