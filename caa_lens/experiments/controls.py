"""Directions that a claimed effect must exceed, at the same norm and layer; and how many pairs a direction needs.

random-<k>        a random direction: what any push of this size does
shuffled-<k>      mean difference with half of the labels swapped: what these activations give without the behaviour
letter            mean over A-keyed minus mean over B-keyed pairs, halved: the answer letter itself
letter-balanced   mean over keys of the mean within each: the vector with the letter cancelled (not a null)
<your name>       another behaviour's vector

split-half cosine at n pairs = cos(mean difference of n/2 pairs, mean difference of n/2 others)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import torch

from caa_lens.arguments import as_integers, require_options, require_pairs
from caa_lens.directions import Moments, cosine
from caa_lens.errors import InputError
from caa_lens.extraction import iterate_activations
from caa_lens.extraction_plan import plan_extraction
from caa_lens.models import Model
from caa_lens.pairs import PairSet
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet


def norm_matched(control: SteeringVector, vector: SteeringVector) -> SteeringVector:
    """The control at the vector's norm; a zero control stays zero."""
    return control.with_norm(vector.norm) if control.norm else control


def with_controls(
    vectors: VectorSet, *, n_random: int, seed: int = 0, others: Mapping[str, VectorSet] | None = None
) -> dict[str, VectorSet]:
    """The vectors under the name `vector`, and their norm-matched controls by name.

    Args:
        vectors: the vectors in question.
        n_random: number of random directions; 0 leaves out these and the controls that the vectors carry.
        seed: of the random directions, which differ between layers.
        others: further vectors to compare with, such as another behaviour's, by name.

    Raises:
        InputError: a name is taken.
        MissingError: another behaviour's set lacks a layer.
    """
    named = {"vector": vectors}
    if n_random:
        for k in range(n_random):
            first = seed + 1000 * k
            named[f"random-{k}"] = VectorSet([v.random_control(seed=first + v.layer) for v in vectors.values()])
        for name, group in vectors.controls.items():
            named[name] = VectorSet([norm_matched(group[v.layer], v) for v in vectors.values()])
    for name, group in (others or {}).items():
        if name in named:
            raise InputError(
                f"others={{{name!r}: ...}}: this name is taken; rename it ({', '.join(named)} are in use)."
            )
        named[name] = VectorSet([norm_matched(group[v.layer], v) for v in vectors.values()])
    return named


def learning_curve(
    model: Model,
    pairs: PairSet,
    *,
    sizes: int | Iterable[int] | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Whether there are enough pairs: agreement of vectors from two halves, and their norm, against the number of pairs.

    One extraction pass serves all sizes: the sums of every half are kept, not the activations.

    Args:
        model, pairs: as in `extract`.
        sizes: numbers of pairs (even; nested random subsets); by default doublings from 4, and all of them.
        seed: of the subsets.
        progress: show a progress bar.
        **options: `layers`, `read`, `template`, `batch_size`, as in `extract`.

    Returns:
        One row a (layer, size): `layer`, `n_pairs`, `split_half_cosine`, `norm` (of the mean difference of all `n_pairs`).

    Raises:
        InputError: a size that is odd, below 2 or above the number of pairs; as in `extract` otherwise.
    """
    require_options("learning_curve", options, plan_extraction)
    largest = len(require_pairs("learning_curve", pairs)) // 2 * 2
    if sizes is not None and not (sizes := as_integers("sizes", sizes)):
        raise InputError("sizes=[] is empty; give at least one number of pairs, or leave it out.")
    if sizes is None:
        sizes = [n for n in (4 * 2**k for k in range(20)) if n < largest] + [largest]
    for n in sizes:
        if n < 2 or n % 2 or n > len(pairs):
            raise InputError(
                f"sizes={list(sizes)}: {n} is not an even number from 2 to {largest}; halves have equal size."
            )
    plan = plan_extraction(model, pairs, **options)
    rank = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    # Two rows a size: the pairs of even and of odd rank below n, each weighted to a mean.
    halves = [(rank < n) & (rank % 2 == half) for n in sizes for half in (0, 1)]
    weights = torch.stack([half.float() / half.sum() for half in halves])
    moments = Moments.zeros(len(plan.layers), plan.info.d_model, len(weights))
    for batch in iterate_activations(model, plan, progress=progress):
        moments.update(batch.positive, batch.negative, weights[:, list(batch.index)])
    first, second = moments.controls[0::2], moments.controls[1::2]
    agreement, norm = cosine(first, second), ((first + second) / 2).norm(dim=-1)
    return pd.DataFrame(
        [
            {
                "layer": layer,
                "n_pairs": n,
                "split_half_cosine": float(agreement[row, column]),
                "norm": float(norm[row, column]),
            }
            for column, layer in enumerate(plan.layers)
            for row, n in enumerate(sizes)
        ]
    )
