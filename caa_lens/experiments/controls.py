"""Directions that a claimed effect must exceed, at the same norm and layer.

random-<k>        a random direction: what any push of this size does
shuffled-<k>      mean difference with half of the labels swapped: what these activations give without the behaviour
letter            mean over A-keyed minus mean over B-keyed pairs, halved: the answer letter itself
letter-balanced   mean over keys of the mean within each: the vector with the letter cancelled (not a null)
"""

from __future__ import annotations

from caa_lens.vector import SteeringVector, VectorSet


def norm_matched(control: SteeringVector, vector: SteeringVector) -> SteeringVector:
    """The control at the vector's norm; a zero control stays zero."""
    return control.with_norm(vector.norm) if control.norm else control


def with_controls(vectors: VectorSet, *, n_random: int, seed: int = 0) -> dict[str, VectorSet]:
    """The vectors under the name `vector`, and if `n_random` is not 0 their norm-matched controls by name."""
    named = {"vector": vectors}
    if n_random:
        for k in range(n_random):
            named[f"random-{k}"] = vectors.map(lambda v, k=k: v.random_control(seed=seed + 1000 * k + v.layer))  # type: ignore[misc]
        for name, group in vectors.controls.items():
            named[name] = VectorSet([norm_matched(group[v.layer], v) for v in vectors.values()])
    return named
