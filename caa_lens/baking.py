"""Steering without hooks: a vector added at all positions is a bias of the block's output.

    x_l + v  =  resid_mid + MLP(...) + (b_out + v)        at every position

So a copy of the model whose MLP output projection of block l has the bias `b_out + v` is the steered model: it runs at the cost
of the unsteered one, in any engine that knows the architecture. Exact for adding at all positions only: where a bias acts cannot
depend on the position, nor its size on the activations. The paper steers from the end of the instruction on, which is
another model.

That the bias arrives in `resid_post` as it is (no norm or scale stands behind the MLP) is measured on the copy, not
looked up by architecture.

Source: Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", arXiv:2312.06681; the post of January 2024 notes
that such a vector can be added to a bias once and for all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.directions import Operator, add, random_like
from caa_lens.errors import InputError
from caa_lens.hooks import Vectors, flatten
from caa_lens.models import Hook, Model, capture_hooks, describe, device_of, has_hooks, hooks, resid_post, run
from caa_lens.models.biases import duplicate, open_checkpoint, output_bias, save_checkpoint
from caa_lens.vector import SteeringVector

PROBE_TOKENS = 4
TOLERANCE = 0.1
"""Of a probe as long as the residual stream: far above rounding in half precision, far below what a norm does to it."""


def bake(model: Model, vectors: Vectors, *, operator: Operator = add) -> Model:
    """A copy of the model that is steered for good: m v is part of the bias of block l's MLP output.

    The copy needs no hooks and costs what the model costs. It equals `steer(model, vectors, positions="all")`, padding and
    cached generation included, and no other choice of positions. Several vectors and layers add up.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; it is not changed.
        vectors: a `SteeringVector`, a `VectorSet` (all its layers), or a list of them; `1.5 * v` sets the strength.
        operator: only `add` is a bias.

    Returns:
        A model of the same class, without hooks. Its parameters are its own objects, frozen, over the memory of the
        model's weights, so that it takes no room: moving or casting it leaves the model alone, writing into its
        weights in place does not (`copy.deepcopy` makes it independent).

    Raises:
        InputError: vectors that do not fit; another operator; hooks on the model, which a copy would lose; an MLP whose
            output does not reach `resid_post` unchanged (a norm behind it as in Gemma-2, mixtures of experts).
        MissingError: a layer that the model does not have.

    Example:
        >>> formal = caa.bake(model, 1.5 * vectors[14])  # doctest: +SKIP
        >>> caa.generate(formal, "How was your weekend?")  # doctest: +SKIP
    """
    if operator is not add:
        raise InputError(
            "only caa_lens.add can be baked: a bias is the same whatever the activations are, and what ablate, clamp and gates "
            "change depends on them. Use `with steer(model, vectors, operator=...)`."
        )
    changes = _sums(flatten(model, vectors))
    if has_hooks(model):
        raise InputError(
            "the model has hooks on it now, which a baked copy would not have; leave steer() and model.hooks() first, or call "
            "model.reset_hooks()."
        )
    baked = duplicate(model)
    biases = {layer: output_bias(baked, layer) for layer in changes}
    _check_arrival(baked, biases)
    for layer, bias in biases.items():
        bias.data = bias.data + changes[layer].to(bias)
    return baked


def export_checkpoint(
    name: str | os.PathLike[str],
    vectors: Vectors,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
) -> Path:
    """Writes a Hugging Face checkpoint that runs steered in plain `transformers`, and in engines that read such checkpoints.

    Weights and tokenizer are the checkpoint's own; biases are added. A Llama checkpoint without MLP biases gets
    `mlp_bias=true`, which llama.cpp can run too, and biases of zero but for the steered outputs. Equal to
    `steer(..., positions="all")`, as `bake` is.

    Args:
        name: what `load_model` takes: a hub id, a local directory, a `.gguf` file, or the embedded model's name. The files are
            read anew: save a model that you changed in memory first.
        vectors: as in `bake`.
        folder: a new or empty directory; it is there whole or not at all.
        dtype: of the weights written; as `load_model` loads them by default (float32 on the CPU).
        revision: branch, tag or commit of a hub model.

    Returns:
        The folder. Its `config.json` says under `caa_lens` what was baked in.

    Raises:
        MissingError: there is no such model.
        InputError: as in `bake`; the folder holds something; or `transformers` builds this architecture without a bias on
            the MLP's output (Mistral, Qwen2, ...), so that no checkpoint can carry one.

    Example:
        >>> caa.export_checkpoint("smollm2-135m-instruct", 1.5 * vectors[14], "formal-smollm2")  # doctest: +SKIP
        >>> AutoModelForCausalLM.from_pretrained("formal-smollm2")  # doctest: +SKIP
    """
    target = Path(folder).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists already; give the path of a new directory, or remove it first.")
    checkpoint, model = open_checkpoint(name, dtype=dtype, revision=revision)
    flat = flatten(model, vectors)
    baked = bake(model, flat)
    save_checkpoint(checkpoint, baked, sorted(_sums(flat)), target, record=[_record(vector) for vector in flat])
    return target


def _record(vector: SteeringVector) -> dict[str, Any]:
    made = vector.provenance
    return {"vector": made.expression, "layer": vector.layer, "norm": vector.norm, "pairs_hash": made.pairs_hash}


def _sums(vectors: Iterable[SteeringVector]) -> dict[int, Float[Tensor, " d_model"]]:
    """What all vectors add to each layer."""
    sums: dict[int, Tensor] = {}
    for vector in vectors:
        sums[vector.layer] = sums[vector.layer] + vector.tensor if vector.layer in sums else vector.tensor
    return sums


@torch.no_grad()
def _check_arrival(model: Model, biases: Mapping[int, Tensor]) -> None:
    """Puts a random probe into each bias and looks for it in `resid_post` of its block; every block gets the same input twice."""
    tokens = torch.arange(PROBE_TOKENS, device=device_of(model)).unsqueeze(0)
    mask = torch.ones_like(tokens)
    before: dict[int, Tensor] = {}
    with hooks(model, capture_hooks(list(biases), lambda layer, x: before.update({layer: x.clone()}))):
        run(model, tokens, mask)
    probes = {layer: random_like(max(x[0].float().cpu(), key=torch.norm), seed=layer) for layer, x in before.items()}

    def at(layer: int) -> Hook:
        def probe_hook(activations: Tensor, hook: Any) -> Tensor:
            arrived = (activations - before[layer]).float().cpu()
            if float((arrived - probes[layer]).norm(dim=-1).max()) > TOLERANCE * float(probes[layer].norm()):
                raise InputError(
                    f"what is added to the MLP's output in block {layer} of {describe(model).name} does not reach resid_post "
                    "as it is (a norm or a factor stands behind the MLP), so a vector there is no bias; steer with hooks: "
                    "`with steer(model, vectors, positions='all')`."
                )
            return before[layer]

        return resid_post(layer), probe_hook

    plain = {layer: bias.data for layer, bias in biases.items()}
    for layer, bias in biases.items():
        bias.data = plain[layer] + probes[layer].to(bias)
    with hooks(model, [at(layer) for layer in biases]):
        run(model, tokens, mask)
    for layer, bias in biases.items():
        bias.data = plain[layer]
