"""What the formats have in common: what a caller says of a file that does not say it itself, and what a format cannot carry.

Every format means the same place: `resid_post`, the output of 0-based block l. Tensors become fp32, which holds fp16 and bf16
exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caa_lens.errors import InputError
from caa_lens.models import describe, weight_basis
from caa_lens.provenance import Provenance, bare_name, same_model
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet

LLAMA_2_LAYERS = {"7b": 32, "13b": 40, "70b": 80}
"""Layers of the authors' models, whose files name the model and not its depth."""


@dataclass(frozen=True)
class Given:
    """What the caller says of the vectors in a file; None where the file is to say it.

    Attributes:
        model: name of the model.
        n_layers, d_model, basis: its shape and weight basis.
        layer: the only layer to load; of a file with one unnamed vector, its layer.
        shift: added to the layer numbers in the file.
        behaviour: what the vectors are called.
        feature: index of an SAE feature.
    """

    model: str | None = None
    n_layers: int | None = None
    d_model: int | None = None
    basis: str = "raw"
    layer: int | None = None
    shift: int = 0
    behaviour: str | None = None
    feature: int | None = None

    @classmethod
    def by(cls, model: Any, n_layers: int | None, **others: Any) -> Given:
        """From `model=`: None, a name, or a TransformerLens model, which says the rest of itself."""
        if model is None or isinstance(model, str):
            return cls(model, n_layers, **others)
        info = describe(model)
        return cls(info.name, info.n_layers, info.d_model, weight_basis(model), **others)

    def provenance(self, where: object, d_model: int, *, model: str | None = None, **known: Any) -> Provenance:
        """Of a file that carries no provenance.

        Args:
            where: the file, for messages.
            d_model: width of its vectors.
            model: name of the model, as the file has it.
            known: further fields of `Provenance`.

        Raises:
            InputError: the model's name or depth is not known, or another model was given.
        """
        if model is not None and self.model is not None and not same_model(model, self.model):
            raise _other_model(where, model, self.model)
        name = self.model or model
        if name is None:
            raise InputError(
                f"{where} does not say which model its vectors belong to; pass model= (a TransformerLens model, or its name "
                "together with n_layers=)."
            )
        n_layers = self.n_layers or _known_layers(name)
        if n_layers is None:
            raise InputError(
                f"{where} does not say how many layers {name} has; pass n_layers=, or the TransformerLens model itself as model=."
            )
        if self.d_model not in (None, d_model):
            raise InputError(
                f"{where} holds vectors of width {d_model}, {name} has d_model {self.d_model}; load them for their own model."
            )
        known["expression"] = self.behaviour or known.get("expression") or "vector"
        return Provenance(name, n_layers, d_model, self.basis, **known)

    def checked(self, where: object, vectors: VectorSet) -> VectorSet:
        """The layer asked for, of vectors that came with their provenance.

        Raises:
            InputError: they belong to another model than the one given.
            MissingError: they lack the layer.
        """
        model = vectors.provenance.model
        if self.model is not None and not same_model(model, self.model):
            raise _other_model(where, model, self.model)
        return self.chosen(vectors)

    def chosen(self, vectors: VectorSet) -> VectorSet:
        """The layer asked for, or all.

        Raises:
            MissingError: no such layer.
        """
        return vectors if self.layer is None else VectorSet([vectors[self.layer]])


class Format(NamedTuple):
    """How vectors are read from and written to one kind of file; None where they are not.

    `carries` names the parts of a set (see `parts`) that the format has room for besides tensors, layers and model.
    """

    load: Callable[[Path, Given], VectorSet] | None
    save: Callable[[VectorSet, Path], None] | None
    carries: frozenset[str] = frozenset()


def parts(vectors: VectorSet) -> dict[str, str]:
    """What a set holds beyond tensors and layers, in words, by part."""
    made = vectors.provenance
    found = {
        "model": made.model,
        "name": f"the name {made.expression!r}",
        "provenance": "how they were made (pairs, template, position read)" if made.pairs_hash or made.template else "",
        "basis": f"their weight basis ({made.basis})" if made.basis != "raw" else "",
        "normalization": "the names of the behaviours that their norms are averaged over"
        if made.normalized_across
        else "",
        "norms": "the residual norms" if any(v.residual_norm is not None for v in vectors.values()) else "",
        "controls": f"the controls ({', '.join(vectors.controls)})" if vectors.controls else "",
    }
    return {part: text for part, text in found.items() if text}


def safe_name(text: str) -> str:
    """`text` as one component of a path: `ab/refusal` becomes `ab-refusal`."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")[:100] or "vector"


def plain_vector(where: object, value: Any, *, dimensions: int = 1) -> Tensor:
    """A tensor of a file in fp32.

    Raises:
        InputError: not a plain floating-point tensor of that many dimensions.
    """
    if not isinstance(value, Tensor) or value.ndim != dimensions or not value.is_floating_point() or not value.numel():
        kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        shape = "[d_model]" if dimensions == 1 else "[n, d_model]"
        raise InputError(f"{where}: expected a floating-point tensor {shape}, found {kind}; give a file of vectors.")
    return value.detach().to(torch.float32)


def one_set(where: object, tensors: Sequence[tuple[int, Tensor]], made: Provenance) -> VectorSet:
    """Vectors of one origin.

    Raises:
        InputError: widths that differ, a layer that the model does not have, values that are not finite.
    """
    try:
        return VectorSet([SteeringVector(tensor, layer, made) for layer, tensor in tensors])
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _other_model(where: object, theirs: str, given: str) -> InputError:
    return InputError(
        f"{where} holds vectors of {theirs}, not of {given}; load them without model= and retarget() them if this is on purpose."
    )


def _known_layers(model: str) -> int | None:
    found = re.match(r"llama-2-(\d+b)(-|$)", bare_name(model))
    return LLAMA_2_LAYERS.get(found[1]) if found else None
