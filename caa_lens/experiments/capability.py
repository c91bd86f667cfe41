"""What steering costs: two-choice questions and plain text, before and under it, beside controls of the same norm.

    accuracy, p_correct    the correct letter is the likelier one; its probability among the letters offered
    loss                   mean over tokens of -log p(token | text before it), nats per token
    change                 mean over items of (steered minus unsteered), each item against itself

A capability counts as changed when the interval of the change excludes zero and the permutation test agrees (p < 0.05), and as
changed by the vector's direction when the interval also lies beyond the largest change that any control of the same norm
causes, at the same layer and size of multiplier. "No change shown" is not "unchanged": the interval says how large a
change is still compatible. Intervals and tests are of one setting each, and not corrected for looking at many; those of
few items (a category, a short text) are rough.

Source of the two-choice form: Rimsky et al., arXiv:2312.06681, section 7 (MMLU and TruthfulQA under steering).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from caa_lens.arguments import Layers, Multipliers, as_numbers, require_options, require_pairs
from caa_lens.errors import InputError
from caa_lens.experiments.capability_result import CapabilityResult
from caa_lens.experiments.grid import Text
from caa_lens.experiments.runs import run_items, settings_for
from caa_lens.experiments.sweep import sweep
from caa_lens.files import digest
from caa_lens.models import Model, describe, tokenizer_of
from caa_lens.pairs import PairSet
from caa_lens.positions import Positions, needs_marker
from caa_lens.templates import Plain
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet


def capability(
    model: Model,
    questions: PairSet,
    vectors: VectorSet | SteeringVector,
    *,
    layers: Layers | None = None,
    multipliers: Multipliers = (-1.0, 1.0),
    controls: bool | int = False,
    others: Mapping[str, VectorSet | SteeringVector] | None = None,
    **options: Any,
) -> CapabilityResult:
    """Accuracy on two-choice questions before and under steering: a `sweep` of the letter score, compared item by item.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        questions: pairs whose positive completion is the letter of the correct answer: `load_pairs` reads the CAA authors'
            `mmlu.json` and `truthful_qa.json`, and makes such questions of `"hub:cais/mmlu"` and
            `"hub:truthfulqa/truthful_qa"`.
        vectors: the vectors; one `SteeringVector` is used at its own layer, or at all of `layers`.
        layers, controls, others: as in `sweep`.
        multipliers: strengths to compare with the unsteered model, which is always run.
        **options: `positions`, `operator`, `template`, `batch_size`, `seed`, `store`, `progress`, as in `sweep`.

    Returns:
        A `CapabilityResult` with the measures `accuracy`, `p_correct` and `mass` (the probability of all letters offered).

    Raises:
        InputError: questions without letters, and as in `sweep`; before the model runs.

    Example:
        >>> questions = caa.load_pairs("CAA/datasets/test/mmlu/mmlu.json")  # doctest: +SKIP
        >>> result = caa.capability(model, questions, vectors[14], controls=True)  # doctest: +SKIP
        >>> result.to_pandas(by="category"), result.verdict()  # doctest: +SKIP
    """
    if "systems" in options:
        raise InputError(
            "capability() takes no systems=; give template=ChatTemplate(system_prompt=...) for one of them."
        )
    require_pairs("capability", questions)
    found = sweep(
        model,
        vectors,
        questions,
        layers=layers,
        multipliers=_with_zero(multipliers),
        metric="letter",
        controls=controls,
        others=others,
        **options,
    )
    items = found.items.rename(columns={"value": "p_correct", "preferred": "accuracy"}).drop(columns=["key", "effect"])
    categories = [pair.extra.get("category") for pair in questions]
    if None not in categories:
        items.insert(1, "category", [categories[number] for number in items["item"]])
    made = {**found.provenance, "measured_on": questions.name}
    return CapabilityResult(items, ("accuracy", "p_correct", "mass"), made, found.seed)


def text_loss(
    model: Model,
    text: str | Path,
    vectors: VectorSet | SteeringVector,
    *,
    layers: Layers | None = None,
    multipliers: Multipliers = (-1.0, 1.0),
    controls: bool | int = False,
    others: Mapping[str, VectorSet | SteeringVector] | None = None,
    window: int = 512,
    positions: Positions = "all",
    batch_size: int = 1,
    seed: int = 0,
    **options: Any,
) -> CapabilityResult:
    """Negative log-likelihood per token of a plain text, before and under steering.

    The text is cut into windows of equal length, each run by itself behind a BOS where the tokenizer has one (else its first
    token is context only), so that the mean over windows is the mean over tokens. A few last tokens, fewer than there
    are windows, are left out.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        text: the text itself, or the `Path` of a UTF-8 file.
        vectors, layers, multipliers, controls, others: as in `capability`.
        window: the longest window in tokens, BOS included; at most the model's context.
        positions: which tokens are steered: all, a slice of each window, or a function of its ids.
        batch_size: windows run together; changes speed and memory only.
        seed: of the random controls, the bootstrap and the permutation test.
        **options: `operator`, `strength`, `store`, `progress`, as in `sweep`.

    Returns:
        A `CapabilityResult` with the measure `loss`, in nats per token, one item a window.

    Raises:
        InputError: a file that cannot be read, the name of a file in place of its `Path`, a text of fewer than two tokens, a window
            outside 2 to the context, positions that depend on an instruction, no multiplier but 0; before the model runs.
    """
    if isinstance(positions, str) and (needs_marker(positions) or positions == "last"):
        raise InputError(
            f"positions={positions!r}: a plain text has no instruction; use 'all', a slice or a function of the token ids."
        )
    require_options("text_loss", options, run_items, but=("label", "parts"))
    name = text.name if isinstance(text, Path) else "text"
    windows = _windows(model, _read(text), window)
    settings = settings_for(
        model,
        vectors,
        layers=layers,
        multipliers=_with_zero(multipliers),
        controls=controls,
        others=others,
        seed=seed,
    )
    items = [
        [Text(ids, len(ids) - 1, tuple((index, (ids[index],)) for index in range(1, len(ids))))] for ids in windows
    ]
    about = {"metric": "loss", "measured_on": name, "window": len(windows[0]), "text": digest(windows), "seed": seed}
    found, made = run_items(
        model, settings, items, about, label=f"loss {name}", positions=positions, batch_size=batch_size, **options
    )
    frames = [
        pd.DataFrame(
            {
                "item": number,
                "vector": [setting.vector for setting in settings],
                "layer": [setting.layer for setting in settings],
                "multiplier": [setting.multiplier for setting in settings],
                "loss": -logprobs.astype(float).mean(1),
            }
        )
        for number, (logprobs,) in enumerate(found)
    ]
    return CapabilityResult(pd.concat(frames, ignore_index=True), ("loss",), made, seed)


def _with_zero(multipliers: Multipliers) -> list[float]:
    """The strengths to compare, and the unsteered model."""
    strengths = as_numbers("multipliers", multipliers)
    if not any(strengths):
        raise InputError(
            "multipliers=0 is the unsteered model, which is always run to compare with; give a multiplier other than 0."
        )
    return [0.0, *strengths]


def _read(text: str | Path) -> str:
    if isinstance(text, str):
        if os.path.isfile(text):
            raise InputError(f"text={text!r} is the name of a file; give Path({text!r}) to measure what it holds.")
        return text
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text} cannot be read as UTF-8 text ({error}); check the path.") from error


def _windows(model: Model, text: str, window: int) -> list[tuple[int, ...]]:
    """Token ids of windows of equal length, at most `window` each."""
    tokenizer, context = tokenizer_of(model), describe(model).n_ctx
    if not 2 <= window <= context:
        raise InputError(f"window={window}: allowed are 2 to {context} tokens, the context of this model.")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = Plain().bos(tokenizer, text)
    if len(bos) + len(ids) < 2:
        raise InputError(f"a loss needs at least two tokens, BOS included; the text has {len(ids)}.")
    count = -(-len(ids) // (window - len(bos)))
    length = len(ids) // count
    return [(*bos, *ids[start : start + length]) for start in range(0, count * length, length)]
