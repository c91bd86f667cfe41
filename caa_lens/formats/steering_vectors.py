"""The object of the steering-vectors library, which has no file of its own.

    SteeringVector(layer_activations={l: [d_model]}, layer_type="decoder_block")

Layer l is the output of 0-based block l, `blocks.<l>.hook_resid_post`; its `apply` steers at every position, or from
`min_token_index` on.
"""

from __future__ import annotations

from typing import Any

from caa_lens.errors import InputError
from caa_lens.formats.base import Given, one_set, plain_vector
from caa_lens.vector_set import VectorSet


def to_steering_vectors(vectors: VectorSet) -> Any:
    """A `steering_vectors.SteeringVector` with the same tensors; provenance, norms and controls stay behind.

    Raises:
        InputError: the library is not installed.

    Example:
        with caa.formats.to_steering_vectors(vectors).apply(hf_model, multiplier=1.5):
            hf_model.generate(...)
    """
    try:
        from steering_vectors import SteeringVector
    except ImportError as error:
        raise InputError("to_steering_vectors needs the library: pip install steering-vectors.") from error
    return SteeringVector({v.layer: v.tensor.clone() for v in vectors.values()}, layer_type="decoder_block")


def from_steering_vectors(
    vector: Any, *, model: Any, n_layers: int | None = None, behaviour: str = "vector"
) -> VectorSet:
    """The vectors of a `steering_vectors.SteeringVector`.

    Args:
        vector: the object.
        model: the TransformerLens model that they belong to, or its name together with `n_layers`.
        behaviour: what they are called.

    Raises:
        InputError: they are not of whole blocks, or the model's depth is not known.
    """
    where = f"the steering-vectors object {behaviour!r}"
    if vector.layer_type != "decoder_block":
        raise InputError(
            f"{where} is of layer type {vector.layer_type!r}; only 'decoder_block', the output of whole blocks, is `resid_post`."
        )
    if not vector.layer_activations:
        raise InputError(f"{where} holds no layer; train it with at least one.")
    tensors = {layer: plain_vector(where, tensor.cpu()) for layer, tensor in vector.layer_activations.items()}
    made = Given.by(model, n_layers).provenance(where, len(next(iter(tensors.values()))), expression=behaviour)
    # The library counts negative layers from the end.
    return one_set(
        where, [(layer + made.n_layers if layer < 0 else layer, tensor) for layer, tensor in tensors.items()], made
    )
