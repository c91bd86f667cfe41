"""Where a scale around zero ends: alike on both sides, and not set by a few outlying tokens.

    limit = max |x|, or, where max |x| > 3 q, 1.5 q             q: the 98th percentile of |x|

The residual streams of a few tokens, the first one above all, are often many times larger than all others (attention sinks). A
scale up to the largest would leave every other token pale. What lies beyond the limit has the last colour, or ends at the axis;
`beyond` says in words how much that is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def largest_size(values: ArrayLike) -> float:
    """The largest |x|, whatever is not finite left out; 1 where that leaves nothing but zeros, which have no scale."""
    sizes = _sizes(values)
    return float(sizes.max(initial=0)) or 1.0


def diverging_limit(values: ArrayLike) -> float:
    """The value of the last colour on either side of zero; above 0."""
    sizes, largest = _sizes(values), largest_size(values)
    most = float(np.quantile(sizes, 0.98, method="lower")) if len(sizes) else 0.0
    return 1.5 * most if 0 < 3 * most < largest else largest


def beyond(values: ArrayLike, limit: float) -> str:
    """How many values lie beyond the limit, and the most distant one, in words; empty where there are none."""
    numbers = np.asarray(values, dtype=float).ravel()
    outside = numbers[np.abs(numbers) > limit]
    if not len(outside):
        return ""
    return f"beyond the scale: {len(outside):,} of {numbers.size:,}, up to {outside[np.abs(outside).argmax()]:+.3g}"


def _sizes(values: ArrayLike) -> np.ndarray:
    sizes = np.abs(np.asarray(values, dtype=float).ravel())
    return sizes[np.isfinite(sizes)]
