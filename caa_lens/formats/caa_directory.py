"""The CAA authors' files: `{vectors,normalized_vectors}/<behaviour>/vec_layer_<l>_<model>.pt`, a bare tensor each.

Layer l is the output of 0-based block l, `blocks.<l>.hook_resid_post`. 7B vectors are fp32, 13B ones fp16; both become fp32
exactly, and fp32 is written (the authors' code halves 13B vectors itself). The name of the model, without its organisation, is
in the file's name; its depth is in none, and known here for Llama-2 only. Nothing else is carried. Also read:
`activations/<behaviour>/activations_{pos,neg}_<l>_<model>.pt`, `[n, d_model]`.
"""

from __future__ import annotations

import os
import re
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.errors import CaaLensWarning, InputError
from caa_lens.files import atomic_path
from caa_lens.formats.base import Given, one_set, plain_vector, safe_name
from caa_lens.formats.torch_files import read_torch
from caa_lens.provenance import same_model
from caa_lens.vector_set import VectorSet

VECTOR = re.compile(r"vec_layer_([0-9]{1,5})_(.+)\.pt")
ACTIVATIONS = re.compile(r"activations_(pos|neg)_([0-9]{1,5})_(.+)\.pt")
FOLDERS = ("vectors", "normalized_vectors")


def load_caa(path: Path, given: Given) -> VectorSet:
    """One behaviour's vectors: a file, its folder, or a folder above that holds one behaviour only.

    Raises:
        InputError: no vector, several behaviours or models to choose from, or what `Given` was to say is missing.
    """
    if path.is_dir():
        folder = _behaviour_folder(path)
        files = _of_model(folder, given)
    else:
        folder = path.absolute().parent
        files = [path]
    named = [VECTOR.fullmatch(file.name) for file in files]
    if None in named and given.layer is None:
        raise InputError(
            f"{path} does not say which layer it belongs to (vec_layer_<l>_<model>.pt would); pass layer=, 0-based."
        )
    tensors = [
        (int(name[1]) if name else given.layer or 0, plain_vector(file, read_torch(file)))
        for file, name in zip(files, named, strict=True)
    ]
    made = given.provenance(
        path,
        len(tensors[0][1]),
        model=named[0][2] if named[0] else None,
        expression=folder.name if named[0] else path.stem,
        normalized_across=_normalized_across(folder, files[0].name),
    )
    return given.chosen(one_set(path, tensors, made))


def save_caa(vectors: VectorSet, path: Path) -> None:
    """Writes `path/{vectors,normalized_vectors}/<behaviour>/vec_layer_<l>_<model>.pt`, all layers or none; other files stay.

    Raises:
        InputError: `path` is a file.
    """
    if path.suffix == ".pt" or path.is_file():
        raise InputError(f"{path}: the CAA layout is a folder with a file for every layer; give the folder.")
    made = vectors.provenance
    behaviour = safe_name(made.expression)
    if behaviour != made.expression:
        warnings.warn(
            f"{path}: {made.expression!r} cannot name a folder; written as {behaviour!r}.", CaaLensWarning, stacklevel=4
        )
    folder = path / FOLDERS[bool(made.normalized_across)] / behaviour
    with ExitStack() as stack:
        for v in vectors.values():
            name = f"vec_layer_{v.layer}_{safe_name(made.model.rsplit('/', 1)[-1])}.pt"
            torch.save(v.tensor.clone(), stack.enter_context(atomic_path(folder / name)))


def load_caa_activations(
    folder: str | os.PathLike[str], *, model: str | None = None
) -> dict[int, tuple[Float[Tensor, "pair d_model"], Float[Tensor, "pair d_model"]]]:
    """The authors' stored activations of one behaviour as {layer: (positive, negative)}, which `pca`, `separability` and
    the like take as they take a store of `extract`.

    Args:
        folder: `activations/<behaviour>`.
        model: whose activations, where the folder holds several models'.

    Raises:
        InputError: no activations there, one side without the other, or several models.

    Example:
        activations = caa.formats.load_caa_activations("CAA/activations/refusal")
        caa.separability(activations)
    """
    found = {
        (name[3], int(name[2]), name[1]): file
        for file in sorted(Path(folder).glob("activations_*.pt"))
        if (name := ACTIVATIONS.fullmatch(file.name))
    }
    models = sorted({key[0] for key in found if model is None or same_model(key[0], model)})
    if len(models) != 1:
        raise InputError(
            f"{folder} holds activations_<pos|neg>_<layer>_<model>.pt of {', '.join(models) or 'no such model'}; give the folder "
            "of a behaviour, and model= where there are several."
        )

    def side(layer: int, name: str) -> Tensor:
        file = found.get((models[0], layer, name))
        if file is None:
            raise InputError(f"{folder} has no {name} activations of layer {layer}; both sides are needed.")
        return plain_vector(file, read_torch(file), dimensions=2)

    layers = sorted({layer for name, layer, _ in found if name == models[0]})
    return {layer: (side(layer, "pos"), side(layer, "neg")) for layer in layers}


def _behaviour_folder(path: Path) -> Path:
    """The folder with the vector files: this one, or the only one below."""

    def holds_vectors(folder: Path) -> bool:
        return folder.is_dir() and any(VECTOR.fullmatch(file.name) for file in folder.iterdir())

    if holds_vectors(path):
        return path
    below = [folder for pattern in ("*", *(f"{name}/*" for name in FOLDERS)) for folder in sorted(path.glob(pattern))]
    found = [folder for folder in below if holds_vectors(folder)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(
            f"{path} holds no steering vectors: neither vec_layer_<l>_<model>.pt of the CAA authors, nor vectors.safetensors, "
            "nor an SAELens cfg.json; give the folder of a behaviour, or a file."
        )
    raise InputError(
        f"{path} holds several behaviours' vectors; give the folder of one: "
        f"{', '.join(str(folder.relative_to(path)) for folder in found)}."
    )


def _of_model(folder: Path, given: Given) -> list[Path]:
    """The vector files of one model, by layer."""
    found: dict[str, dict[int, Path]] = {}
    for file in sorted(folder.iterdir()):
        if name := VECTOR.fullmatch(file.name):
            found.setdefault(name[2], {})[int(name[1])] = file
    models = [model for model in found if given.model is None or same_model(model, given.model)]
    if len(models) != 1:
        raise InputError(
            f"{folder} holds vectors of {', '.join(found)}{f', not of {given.model}' if given.model else ''}; name one of them as "
            "model=."
        )
    return [found[models[0]][layer] for layer in sorted(found[models[0]])]


def _normalized_across(folder: Path, file: str) -> tuple[str, ...]:
    """The behaviours that lie beside in `normalized_vectors`: those whose norms the authors' script averages."""
    if folder.parent.name != FOLDERS[1]:
        return ()
    return tuple(sorted(other.name for other in folder.parent.iterdir() if (other / file).is_file()))
