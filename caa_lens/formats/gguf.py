"""GGUF control vectors, as llama.cpp, repeng and others read them: tensors `direction.<k>`, F32 `[d_model]`.

`direction.<k>` is added to the output of 0-based block k = `blocks.<k>.hook_resid_post` at every position, k >= 1: the loaders of
llama.cpp and repeng agree. llama.cpp's own generator writes the output of block i as `direction.<i+1>`; its files are loaded with
`shift=-1`.

Keys: `general.architecture` = "controlvector", `controlvector.model_hint` (without it repeng refuses a file),
`controlvector.layer_count` (number of tensors), and one that other readers pass over: `caa_lens`, what `storage.pack` gives, so
that a file of ours comes back with its provenance, and is known to be whole.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from caa_lens.errors import CaaLensWarning, InputError
from caa_lens.formats.base import Given, one_set, plain_vector
from caa_lens.formats.gguf_file import read_gguf, write_gguf
from caa_lens.storage import pack, unpack
from caa_lens.vector_set import VectorSet

ARCHITECTURE = "controlvector"
PREFIX = "direction."


def load_gguf(path: Path, given: Given) -> VectorSet:
    """A control vector; layer = k + shift.

    Raises:
        InputError: not a control vector, cut short, quantised, or what `Given` was to say is missing.
    """
    keys, tensors = read_gguf(path, architecture=ARCHITECTURE, prefix=PREFIX)
    numbers = {name: re.fullmatch(r"direction\.(0|[1-9][0-9]{0,4})", name) for name in tensors}
    odd = [name for name, number in numbers.items() if number is None]
    if odd or not tensors:
        raise InputError(
            f"{path} is no control vector: it holds {repr(odd[0]) if odd else 'no tensor'} instead of direction.<k> for every "
            "layer."
        )
    directions = {int(number[1]): tensors[name] for name, number in numbers.items() if number}
    if isinstance(keys.get("caa_lens"), str):
        if given.shift:
            raise InputError(
                f"{path} was written by caa_lens and says its layers itself; load it without shift=, which is for files of "
                "llama.cpp's generator."
            )
        return given.checked(
            path, unpack(str(path), keys["caa_lens"], {f"layer.{k}": tensor for k, tensor in directions.items()})
        )
    shifted = [(k + given.shift, plain_vector(path, directions[k])) for k in sorted(directions)]
    made = given.provenance(path, len(shifted[0][1]), expression=path.stem)
    return given.chosen(one_set(path, shifted, made))


def save_gguf(vectors: VectorSet, path: Path) -> None:
    """Writes a control vector of all layers but block 0, which no reader can reach.

    Raises:
        InputError: there is no other layer.
    """
    reached = [v for v in vectors.values() if v.layer > 0]
    if not reached:
        raise InputError(
            f"{path}: a GGUF control vector cannot reach block 0; choose another layer, or bake this one in."
        )
    if len(reached) < len(vectors):
        warnings.warn(
            f"{path}: a GGUF control vector cannot reach block 0; its vector was left out.",
            CaaLensWarning,
            stacklevel=4,
        )
    chosen = VectorSet(reached, controls={})
    keys: dict[str, str | int] = {
        "general.architecture": ARCHITECTURE,
        f"{ARCHITECTURE}.model_hint": chosen.provenance.model,
        f"{ARCHITECTURE}.layer_count": len(chosen),
        "caa_lens": pack(chosen)[0],
    }
    write_gguf(path, keys, {f"{PREFIX}{v.layer}": v.tensor for v in chosen.values()})
