"""A feature of a sparse autoencoder as a steering vector: row i of its decoder, `W_dec[i]`, as SAELens has it.

`hook_name` says where: `blocks.<l>.hook_resid_post` (a bridge's `hook_out`) is layer l, and `blocks.<l>.hook_resid_pre`
(`hook_in`) the same stream as the output of block l - 1. The row is taken as it stands; where decoders have unit rows, a
multiplier is a length in the residual stream.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from caa_lens.errors import CaaLensWarning, InputError
from caa_lens.formats.base import Given, one_set, plain_vector
from caa_lens.vector_set import VectorSet

SITE = re.compile(r"blocks\.([0-9]{1,5})\.hook_(resid_post|out|resid_pre|in)")


def from_sae(sae: Any, feature: int, *, model: Any = None, n_layers: int | None = None) -> VectorSet:
    """One feature of an SAELens `SAE` (anything with `W_dec` and `cfg`) as a set of one vector.

    Args:
        sae: the autoencoder.
        feature: index of the feature.
        model: the TransformerLens model, or its name; by default the name that the SAE's configuration has.
        n_layers: depth of the model, where `model` is a name.

    Raises:
        InputError: no such feature, not an SAE of the residual stream, or the model's depth is not known.

    Example:
        with caa.steer(model, 8 * caa.formats.from_sae(sae, 12082, model=model)[20]):
            ...
    """
    given = Given.by(model, n_layers, feature=feature)
    # Newer versions of SAELens keep what does not matter to the computation in cfg.metadata.
    described = {
        key: getattr(part, key, None)
        for part in (getattr(sae.cfg, "metadata", None), sae.cfg)
        for key in ("model_name", "hook_name", "normalize_activations")
        if getattr(part, key, None) is not None
    }
    return _feature("the SAE", described, len(sae.W_dec), lambda index: sae.W_dec[index].detach().cpu(), given)


def load_sae(path: Path, given: Given) -> VectorSet:
    """One feature of an SAE saved by SAELens: a folder with `cfg.json` and `sae_weights.safetensors`; only its row is read.

    Raises:
        InputError: no such files, no `feature=`, or as `from_sae`.
    """
    try:
        cfg = json.loads((path / "cfg.json").read_text(encoding="utf-8"))
        described = {**cfg, **(cfg.get("metadata") or {})}
        with safe_open(path / "sae_weights.safetensors", framework="pt") as file:
            decoder = file.get_slice("W_dec")
            return _feature(str(path), described, decoder.get_shape()[0], lambda index: decoder[index], given)
    except InputError:
        raise
    except Exception as error:  # json and safetensors raise whatever the bytes lead them to
        raise InputError(
            f"{path} cannot be read as an SAE of SAELens ({error}); give the folder with cfg.json and sae_weights.safetensors."
        ) from error


def _feature(where: str, described: Mapping[str, Any], n_features: int, row: Any, given: Given) -> VectorSet:
    site = SITE.fullmatch(str(described.get("hook_name")))
    if site is None or (layer := int(site[1]) - (site[2] in ("resid_pre", "in"))) < 0:
        raise InputError(
            f"{where} reads {described.get('hook_name')!r}, which is not the output of a block; only SAEs of "
            "blocks.<l>.hook_resid_post, or hook_resid_pre from block 1 on, give steering vectors."
        )
    if given.feature is None or not 0 <= given.feature < n_features:
        raise InputError(f"{where} has the features 0 to {n_features - 1}, not {given.feature}; pass one as feature=.")
    if described.get("normalize_activations") not in (None, "none"):
        warnings.warn(
            f"{where} normalises activations ({described['normalize_activations']}); the length of W_dec[{given.feature}] is in "
            "its units, not in those of the residual stream. Its direction holds.",
            CaaLensWarning,
            stacklevel=4,
        )
    tensor = plain_vector(where, row(given.feature))
    name = described.get("model_name")
    made = given.provenance(
        where,
        len(tensor),
        model=name if isinstance(name, str) else None,
        expression=f"SAE feature {given.feature} at {site[0]}",
    )
    return given.chosen(one_set(where, [(layer, tensor)], made))
