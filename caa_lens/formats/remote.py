"""The `intervene` specification of TransformerLens 4's remote engines (vLLM, SGLang, Inspect); written only.

    {"blocks.<l>.hook_out": {"op": "add", "value": [d_model numbers], "pos": [positions]}}

`blocks.<l>.hook_out` is a bridge's own name of `blocks.<l>.hook_resid_post`. Without `pos` every position is steered; with it the
engine has to be started with position interventions on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caa_lens.errors import InputError
from caa_lens.files import write_json
from caa_lens.vector_set import VectorSet


def to_intervene(vectors: VectorSet, *, positions: Sequence[int] | None = None) -> dict[str, dict[str, Any]]:
    """The specification that adds every vector of a set.

    Args:
        vectors: what to add; scale it for other strengths.
        positions: 0-based positions of the prompt's tokens to steer at; all by default. Engines count from the beginning only.

    Raises:
        InputError: a negative position.

    Example:
        bridge.forward(tokens, intervene=caa.formats.to_intervene(1.5 * vectors))
    """
    if any(position < 0 for position in positions or ()):
        raise InputError(
            f"positions {list(positions or ())}: remote engines count from 0 at the first token; give those."
        )
    where = {} if positions is None else {"pos": list(positions)}
    return {f"blocks.{v.layer}.hook_out": {"op": "add", "value": v.tensor.tolist(), **where} for v in vectors.values()}


def save_remote(vectors: VectorSet, path: Path) -> None:
    """Writes the specification for all positions as JSON, whole or not at all; fp32 values come back exactly."""
    write_json(path, to_intervene(vectors), indent=None)
