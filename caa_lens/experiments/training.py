"""Gradient descent on texts by a Hugging Face model: seeded, and the same after an interruption as without one.

    loss of a step = mean over its texts of the mean over a text's targets of -log p(target | text before it), in nats

Each pair counts once, however long its completion, as in a vector. AdamW without weight decay at a constant learning rate,
gradients clipped to norm 1. Trained weights are float32; on an accelerator the forward pass is autocast to bfloat16. All that
the steps depend on (trained weights, optimizer, random state) is kept in one file, so that on the CPU a resumed run ends in the
very weights of an uninterrupted one; an accelerator's kernels may round differently from run to run.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.errors import InputError
from caa_lens.experiments.grid import Text
from caa_lens.experiments.scoring import Metric, completion_text
from caa_lens.experiments.statistics import where_defined
from caa_lens.files import atomic_path
from caa_lens.models import pad
from caa_lens.pairs import PairSet
from caa_lens.prompts import EncodedPair

Side = Literal["positive", "negative"]
LossName = Literal["answer", "completion"]
LORA_DROPOUT = 0.05
LORA_SCALE = 2.0  # alpha / rank


def text_to_learn(pair: EncodedPair, side: Side, loss: LossName) -> Text:
    """The asked-for side of a pair: its answer token (the first at which the sides differ), or all of its completion, counts."""
    chosen = pair.positive if side == "positive" else pair.negative
    if loss == "completion":
        return completion_text(chosen)
    return Text(chosen.ids, chosen.instruction_end, ((pair.answer, (chosen.ids[pair.answer],)),))


def target_logprobs(model: Any, texts: Sequence[Text]) -> list[Float[Tensor, " target"]]:
    """log p of each text's targets given the text before them, in one forward pass of a Hugging Face model; differentiable."""
    rows = [text.ids[: text.targets[-1][0]] for text in texts]
    tokens, mask = pad(rows, side="right", device=model.device)
    first = min(text.targets[0][0] for text in texts) - 1
    places = [
        (row, index - 1 - first, token)
        for row, text in enumerate(texts)
        for index, asked in text.targets
        for token in asked
    ]
    row, column, token = torch.tensor(places, device=model.device).T
    kept = tokens.shape[1] - first
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
    found = logits[row, column].float().log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
    return list(found.split([sum(len(asked) for _, asked in text.targets) for text in texts]))


@dataclass(frozen=True)
class Meter:
    """Measures a Hugging Face model on sets of pairs as `score` does.

    Attributes:
        metric: what is measured.
        sets: pairs by name.
        texts: of every set, each pair's texts.
        side: the completion that is asked for.
        batch_size: texts run together.
        progress: show progress bars.
    """

    metric: Metric
    sets: Mapping[str, PairSet]
    texts: Mapping[str, Sequence[Sequence[Text]]]
    side: Side
    batch_size: int
    progress: bool

    def measure(self, model: Any, when: str) -> list[dict[str, Any]]:
        """One row a pair: its score, and whether the asked-for side is the likelier one (`accuracy`)."""
        asked = 1 if self.side == "positive" else -1
        rows = []
        for name, pairs in self.sets.items():
            flat = [text for texts in self.texts[name] for text in texts]
            found = self._logprobs(model, flat, f"measure {name.replace('_', '-')} pairs {when}")
            for number, (pair, texts) in enumerate(zip(pairs, self.texts[name], strict=True)):
                values = self.metric.values(pair, [next(found) for _ in texts])
                scores = {column: float(value[0]) for column, value in values.items()}
                accuracy = float(where_defined(asked * values["effect"] > 0, values["value"])[0])
                rows.append(
                    {"pairs": name, "when": when, "item": number, "key": pair.key, **scores, "accuracy": accuracy}
                )
        return rows

    def _logprobs(self, model: Any, texts: Sequence[Text], label: str) -> Iterator[Float[np.ndarray, "1 target"]]:
        """Of each text's targets, in the order of the texts."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))  # little padding
        found: dict[int, np.ndarray] = {}
        with torch.no_grad(), tqdm(total=len(texts), desc=label, unit="text", disable=not self.progress) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                for index, logprobs in zip(batch, target_logprobs(model, [texts[i] for i in batch]), strict=True):
                    found[index] = logprobs.cpu().numpy()[None]
                bar.update(len(batch))
        return (found[index] for index in range(len(texts)))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random numbers from this seed inside the block; the caller's are as they were after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def with_lora(model: Any, rank: int) -> Any:
    """The model with low-rank adapters on all linear layers but the unembedding, initialised by torch's random numbers.

    weight + (alpha / rank) * B A,   A random, B zero, alpha / rank = 2        (Hu et al., arXiv:2106.09685)
    """
    from peft import LoraConfig, get_peft_model

    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())  # GPT-2's layers
    config = LoraConfig(
        r=rank,
        lora_alpha=int(LORA_SCALE * rank),
        lora_dropout=LORA_DROPOUT,
        target_modules="all-linear",
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    # peft asks transformers 5 for an attribute by its older name.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def train(
    model: Any,
    texts: Sequence[Text],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path,
    save_every: int,
    label: str,
    progress: bool,
) -> tuple[list[float], float]:
    """Trains the parameters that ask for gradients, from the checkpoint where there is one; leaves the model in eval mode.

    Args:
        model: a Hugging Face model.
        texts: what to learn.
        epochs, batch_size, learning_rate: passes over the texts; texts a step; of AdamW.
        seed: of the order.
        checkpoint: the file; written every `save_every` steps and at the end.
        label, progress: of the progress bar.

    Returns:
        The loss of every step, in nats a token, and the seconds that the steps took, earlier runs' included.

    Raises:
        InputError: the loss is not finite.
    """
    device: torch.device = model.device
    steps = _schedule(len(texts), epochs, batch_size, seed)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=0.0)
    losses, seconds = _restore(checkpoint, trained, optimizer, device) if checkpoint.exists() else ([], 0.0)
    model.train()
    started = time.perf_counter() - seconds
    with tqdm(total=len(steps), initial=len(losses), desc=label, unit="step", disable=not progress) as bar:
        for number in range(len(losses), len(steps)):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
                logprobs = target_logprobs(model, [texts[i] for i in steps[number]])
            loss = -torch.stack([each.mean() for each in logprobs]).mean()
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                what = f"the loss of step {number + 1} is {losses[-1]}"
                raise InputError(f"{what}; lower learning_rate={learning_rate:g}.")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            seconds = time.perf_counter() - started
            if (number + 1) % save_every == 0 or number + 1 == len(steps):
                _keep(checkpoint, trained, optimizer, device, losses, seconds)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
    model.eval()
    return losses, seconds


def _schedule(n_texts: int, epochs: int, batch_size: int, seed: int) -> list[list[int]]:
    """The texts of every step: each epoch in an order of its own."""
    order = torch.Generator().manual_seed(seed)
    return [step.tolist() for _ in range(epochs) for step in torch.randperm(n_texts, generator=order).split(batch_size)]


def _keep(
    file: Path,
    trained: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    losses: list[float],
    seconds: float,
) -> None:
    state = {
        "trained": {name: parameter.detach() for name, parameter in trained.items()},
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "losses": losses,
        "seconds": seconds,
    }
    with atomic_path(file) as temporary:
        torch.save(state, temporary)


def _restore(
    file: Path, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[list[float], float]:
    state = torch.load(file, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["random_cuda"], device)
    return list(state["losses"]), float(state["seconds"])
