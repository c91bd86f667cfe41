"""Supervised fine-tuning on the pairs that a vector is made of: what steering is compared with, and a model to steer on top of.

    loss of lettered pairs: on the answer token alone, the first at which the two completions differ; of free text: on all of it

The texts are those of `extract`, token for token. A tuned model is a plain Hugging Face directory with a name of its own, which
`load_model` loads as either class. It has the shape of its base, so the vectors of either can be applied to the other, on purpose:

    tuned = caa.load_model(result.path)
    caa.sweep(tuned, vectors.retarget(result.name), held_out)                            # the base's vectors on the tuned model
    caa.sweep(model, caa.extract(tuned, train).retarget("smollm2-135m-instruct"), held_out)      # the tuned model's on the base

Source: Rimsky et al., arXiv:2312.06681, who compare steering with fine-tuning on the same pairs. Their code trains all weights
for one epoch by plain SGD on the answer token; here it is AdamW, and on LoRA adapters unless asked otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from caa_lens.errors import InputError
from caa_lens.experiments.grid import Text
from caa_lens.experiments.scoring import MetricName, metric_for
from caa_lens.experiments.training import LossName, Meter, Side, seeded, text_to_learn, train, with_lora
from caa_lens.experiments.tuned import SUMMARY, FinetuneResult
from caa_lens.files import claim_folder, digest, is_claimed, write_json
from caa_lens.models import ModelInfo
from caa_lens.models.checkpoints import Checkpoint, as_device, as_dtype, load_checkpoint
from caa_lens.pairs import PairSet
from caa_lens.prompts import Template
from caa_lens.templates import default_template

Method = Literal["lora", "full"]
LEARNING_RATES: dict[str, float] = {"lora": 2e-4, "full": 2e-5}
_PACKAGES = {"lora": ("caa-lens", "transformers", "torch", "peft"), "full": ("caa-lens", "transformers", "torch")}
CHOICES = {"side": ("positive", "negative"), "method": ("lora", "full"), "loss": ("answer", "completion")}


def finetune(
    model: str | os.PathLike[str],
    pairs: PairSet,
    *,
    folder: str | os.PathLike[str],
    side: Side = "positive",
    method: Method = "lora",
    held_out: PairSet | None = None,
    loss: LossName | None = None,
    metric: MetricName | None = None,
    epochs: int = 3,
    learning_rate: float | None = None,
    batch_size: int = 8,
    rank: int = 8,
    seed: int = 0,
    template: Template | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    save_every: int = 50,
    progress: bool = True,
) -> FinetuneResult:
    """Trains a model to give one side of contrast pairs, and measures what it gives before and after.

    Args:
        model: a name or a path as in `load_model`. A copy of its own is loaded; no open model is touched.
        pairs: the training pairs.
        folder: for the checkpoint, the tuned model and the summary. A run that was interrupted continues there; a finished
            one is read.
        side: which completions to learn.
        method: `"lora"`, low-rank adapters by the `peft` package, merged into the weights at the end; or `"full"`, all weights.
        held_out: pairs to measure on beside the training pairs; a prompt that is trained on is refused.
        loss: `"answer"`, the first token at which a pair's completions differ; `"completion"`, all of the completion's tokens.
            By default by the kind of the pairs: the answer where all have letters.
        metric: what is measured, as in `score`.
        epochs: passes over the pairs.
        learning_rate: of AdamW; by default 2e-4 for LoRA and 2e-5 for all weights.
        batch_size: pairs a step.
        rank: of the adapters.
        seed: of the order of the pairs, the adapters' first weights and dropout.
        template: how prompts are written; the model's default otherwise.
        dtype: of the tuned model and, with LoRA, of the weights under the adapters, as a torch dtype or its name; by default
            float32 on the CPU; on an accelerator the checkpoint's own with LoRA, else float32. What is trained is float32 in
            any case.
        device: default CUDA where there is one, else the CPU.
        save_every: steps between checkpoints.
        progress: show progress bars, with the loss.

    Returns:
        A `FinetuneResult`; `load_model(result.path)` is the tuned model.

    Raises:
        InputError: no pairs, a pair that does not fit the context or the metric, an unknown option, a training prompt among
            the held-out ones, a folder of another run, `peft` missing, all before anything is trained; or a loss that does not
            stay finite.
        MissingError: there is no such model.

    Example:
        >>> result = caa.finetune("smollm2-135m-instruct", train, folder="formal", held_out=held_out)  # doctest: +SKIP
        >>> result.held_out_accuracy, result.verdict()  # doctest: +SKIP
        >>> tuned = caa.load_model(result.path)  # doctest: +SKIP
    """
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(
            f"finetune takes the name or the path of a model, got {type(model).__name__}: it trains a copy of its own, and "
            "touches no open model."
        )
    if len(pairs) == 0 or save_every < 1:
        raise InputError(f"{pairs.name!r} holds {len(pairs)} pairs, save_every={save_every}; both must be at least 1.")
    sets = {"train": pairs}
    if held_out is not None:
        held_out.require_disjoint(pairs)
        sets["held_out"] = held_out
    settings = Settings(
        side=side,
        method=method,
        loss=loss or ("answer" if all(pair.key for pair in pairs) else "completion"),
        metric=metric_for(pairs, metric).name,
        epochs=epochs,
        learning_rate=LEARNING_RATES.get(method, 0.0) if learning_rate is None else learning_rate,
        batch_size=batch_size,
        rank=rank if method == "lora" else None,
        seed=seed,
        dtype=None if dtype is None else str(as_dtype(dtype)).removeprefix("torch."),
    )
    run = _Run(Path(folder), _asked(model, sets, settings, template))
    if run.finished:
        return FinetuneResult.load(run.folder)
    if method == "lora" and importlib.util.find_spec("peft") is None:
        raise InputError(
            "method='lora' needs the peft package: pip install 'caa-lens[finetune]'; method='full' does without."
        )
    weights = torch.float32 if method == "full" else as_dtype(dtype)
    checkpoint = load_checkpoint(model, dtype=weights, device=as_device(device))
    chosen = template or default_template(checkpoint.base, checkpoint.tokenizer)
    learnt, meter = _prepare(checkpoint, sets, settings, chosen, progress)
    run.claim()
    before = meter.measure(checkpoint.model, "before")
    parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    with seeded(seed, checkpoint.model.device):
        trained = checkpoint.model if settings.rank is None else with_lora(checkpoint.model, settings.rank)
        trainable = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
        losses, seconds = train(
            trained,
            learnt,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=settings.learning_rate,
            seed=seed,
            checkpoint=run.checkpoint,
            save_every=save_every,
            label=f"finetune {pairs.name}, {side}, {method}",
            progress=progress,
        )
    tuned = trained.to(as_dtype(dtype) or torch.float32) if settings.rank is None else trained.merge_and_unload()
    after = meter.measure(tuned, "after")
    name = _name(checkpoint.name, pairs.name, settings, run.signature)
    replace(checkpoint, model=tuned).save(run.folder / name)
    run.finish(
        {
            "name": name,
            "losses": losses,
            "steps_an_epoch": -(-len(pairs) // batch_size),
            "items": [*before, *after],
            "seconds": seconds,
            "trainable_parameters": trainable,
            "parameters": parameters,
            "settings": asdict(settings),
            "provenance": {
                "model": checkpoint.name,
                "revision": checkpoint.revision,
                "base": checkpoint.base,
                "pairs": pairs.name,
                "n_pairs": len(pairs),
                "pairs_hash": pairs.hash,
                "held_out_hash": None if held_out is None else held_out.hash,
                "template": repr(chosen),
                "device": str(checkpoint.model.device),
                "versions": {each: version(each) for each in _PACKAGES[method]},
            },
        }
    )
    return FinetuneResult.load(run.folder)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is trained and measured; arguments and errors as in `finetune`. A rank of None is all weights."""

    side: Side
    method: Method
    loss: LossName
    metric: MetricName
    epochs: int
    learning_rate: float
    batch_size: int
    rank: int | None
    seed: int
    dtype: str | None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: allowed are {' and '.join(map(repr, allowed))}.")
        for name in ("epochs", "batch_size", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1.")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate={self.learning_rate} must be above 0.")


def _asked(
    model: str | os.PathLike[str], sets: Mapping[str, PairSet], settings: Settings, template: Template | None
) -> dict[str, Any]:
    """What makes a run the one it is, known before any model is loaded."""
    return {
        "model": Path(model).expanduser().resolve().name,
        **asdict(settings),
        "template": None if template is None else [repr(template), template.hash],
        # in order, unlike PairSet.hash: the order decides which pairs share a step
        **{name: digest([[pair.prompt, pair.positive, pair.negative] for pair in of]) for name, of in sets.items()},
    }


def _prepare(
    checkpoint: Checkpoint, sets: Mapping[str, PairSet], settings: Settings, template: Template, progress: bool
) -> tuple[list[Text], Meter]:
    """The texts to learn, and those to measure.

    Raises:
        InputError: a pair that the template, the metric or the context refuses.
    """
    tokenizer, config = checkpoint.tokenizer, checkpoint.model.config.get_text_config()
    metric = metric_for(sets["train"], settings.metric)
    info = ModelInfo(
        name=checkpoint.name,
        revision=checkpoint.revision,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=getattr(config, "max_position_embeddings", sys.maxsize),  # some architectures have no limit
        base=checkpoint.base,
    )
    learnt = [
        text_to_learn(template.encode_pair(tokenizer, pair), settings.side, settings.loss) for pair in sets["train"]
    ]
    texts = {name: [metric.texts(tokenizer, template, pair) for pair in pairs] for name, pairs in sets.items()}
    for name, pairs in sets.items():
        for number, pair in enumerate(pairs):
            run = [*texts[name][number], *([learnt[number]] if name == "train" else [])]
            info.require_room(pair.where, max(text.targets[-1][0] for text in run))
    return learnt, Meter(metric, sets, texts, settings.side, settings.batch_size, progress)


def _name(model: str, pairs: str, settings: Settings, signature: str) -> str:
    """The tuned model's own name: vectors made on it fit no other model by accident."""
    parts = (model.rsplit("/", 1)[-1], pairs, settings.side, settings.method, signature[:6])
    return "-".join(re.sub(r"[^\w.]+", "-", part).strip("-") for part in parts)


class _Run:
    """A folder that belongs to one run.

    Raises:
        InputError: it belongs to another.
    """

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        self.folder, self.asked, self.signature = folder, asked, digest(asked)
        self.about, self.checkpoint = folder / "about.json", folder / "checkpoint.pt"
        is_claimed(self.about, self.signature, "run")  # another run's is refused before any model is loaded

    @property
    def finished(self) -> bool:
        return (self.folder / SUMMARY).exists()

    def claim(self) -> None:
        claim_folder(self.about, self.signature, self.asked)

    def finish(self, summary: dict[str, Any]) -> None:
        write_json(self.folder / SUMMARY, summary)
        self.checkpoint.unlink()
