"""Open questions answered at every strength: what the vector does to text that the model writes itself.

    answer[item, system, vector, layer, multiplier]

All strengths of a vector are written together, each row of a batch with its own; the unsteered answer is written once. Sampled
answers to one question draw the same random numbers at every setting, so that settings differ by their steering only. Several
processes share the questions.

Source of the comparison: Rimsky et al., arXiv:2312.06681, section 4.3 (open-ended generation).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from caa_lens.arguments import Layers, Multipliers, require_count
from caa_lens.errors import InputError
from caa_lens.experiments.answer_set import DIAGNOSTICS, AnswerSet, repeated_share
from caa_lens.experiments.grid import grid_logprobs
from caa_lens.experiments.runs import UNSTEERED, Setting, describe_run, settings_for
from caa_lens.experiments.scoring import completion_text
from caa_lens.experiments.store import ItemStore
from caa_lens.experiments.sweep import System, under_systems
from caa_lens.files import digest
from caa_lens.hooks import template_for
from caa_lens.models import Model, describe, tokenizer_of
from caa_lens.pairs import PairSet, prompt_digest
from caa_lens.positions import Positions
from caa_lens.prompts import Template
from caa_lens.steering import generate, steer
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet
from caa_lens.workers import alone, is_main, shared_map

Measured = tuple[str, int, float, float | None]
"""An answer with its diagnostics, in the order of `DIAGNOSTICS`."""


def answers(
    model: Model,
    vectors: VectorSet | SteeringVector | None,
    prompts: PairSet | Sequence[str],
    *,
    layers: Layers | None = None,
    multipliers: Multipliers = (-1.0, 0.0, 1.0),
    systems: Mapping[str, System] | None = None,
    controls: bool | int = False,
    others: Mapping[str, VectorSet | SteeringVector] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    template: Template | None = None,
    positions: Positions = "after_instruction",
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> AnswerSet:
    """Answers open questions under every setting, and measures the texts' length, repetition and fluency.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        vectors: as in `sweep`; None answers with the unsteered model alone (under `systems`, say).
        prompts: the questions, or a `PairSet` whose `open_prompts` are asked.
        layers: one of the vectors' layers, or several; all by default. Each is steered by itself.
        multipliers, systems, controls, others: as in `sweep`.
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 is greedy; above, tokens are sampled.
        seed: of the sampling, the random controls and the bootstrap. An answer depends on it and on its own setting and
            question only.
        batch_size: answers written together; changes speed and memory only.
        template, positions: as in `steer`.
        store: a folder that keeps each question's answers as soon as they are written; a second call with the same arguments
            continues there.
        progress: show a progress bar.

    Returns:
        An `AnswerSet`, to read, to save and to `judge`.

    Raises:
        InputError: no question, one that a vector was trained on or that leaves no room for its answer, and as in `sweep`;
            all before the model runs.
        MissingError: a layer that the vectors do not have.

    Example:
        >>> said = caa.answers(model, vectors, held_out, layers=14, controls=1)  # doctest: +SKIP
        >>> said.to_pandas()  # doctest: +SKIP
    """
    max_new_tokens = require_count("max_new_tokens", max_new_tokens)
    batch_size = require_count("batch_size", batch_size)
    questions = _questions(prompts, vectors)
    settings = (
        [UNSTEERED]
        if vectors is None
        else settings_for(
            model, vectors, layers=layers, multipliers=multipliers, controls=controls, others=others, seed=seed
        )
    )
    info, tokenizer, chosen = describe(model), tokenizer_of(model), template_for(model, template)
    written: Mapping[str | None, Template] = {None: chosen}
    if systems is not None:
        written = under_systems(tokenizer, chosen, systems)
    ids = []
    for way, question in product(written.values(), questions):
        ids.append(way.encode(tokenizer, question).ids)
        info.require_room(f"the question {question[:60]!r}", len(ids[-1]), max_new_tokens=max_new_tokens)
    about = {
        "prompts": getattr(prompts, "name", "prompts"),
        "prompts_hash": digest(questions),
        "texts": digest(ids),
        "template": repr(chosen),
        "systems": None if systems is None else {str(name): repr(way) for name, way in written.items()},
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    made = describe_run(model, settings, positions, about, store=store)
    done: ItemStore[list[Measured]] = ItemStore(store, made, what="set of answers")
    missing = [number for number in range(len(questions)) if number not in done.found]
    # As many questions together as the strengths of a vector leave room for in a batch.
    strengths = max((len(places) for group, places in _together(settings).items() if group), default=1)
    together = max(1, batch_size // strengths)
    batches = [missing[start : start + together] for start in range(0, len(missing), together)]

    def write(numbers: Sequence[int]) -> dict[int, list[Measured]]:
        rows: dict[int, list[Measured]] = {number: [] for number in numbers}
        with alone():  # a process's own batch, which is not shared again
            for way in written.values():
                texts = _write(
                    model,
                    settings,
                    {number: questions[number] for number in numbers},
                    template=way,
                    positions=positions,
                    batch_size=batch_size,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed,
                )
                asked = [(questions[number], text) for number in numbers for text in texts[number]]
                measured = _measure(model, way, asked, batch_size=batch_size)
                for k, number in enumerate(numbers):
                    rows[number] += measured[k * len(settings) : (k + 1) * len(settings)]
        return rows

    with tqdm(
        total=len(questions),
        initial=len(done.found),
        desc=f"answers {about['prompts']}",
        unit="item",
        disable=not (progress and is_main()),
    ) as bar:
        for rows in shared_map(write, batches):
            for number, row in rows.items():
                done.add(number, row)
                bar.update()
    return AnswerSet(_item_table(questions, list(written), settings, done.found), made, seed)


def _questions(prompts: PairSet | Sequence[str], vectors: VectorSet | SteeringVector | None) -> list[str]:
    if isinstance(prompts, PairSet):
        questions = list(prompts.open_prompts)
        if not questions:
            raise InputError(f"{prompts.name!r} brings no open prompts; give the questions as a list of strings.")
    else:
        questions = [prompts] if isinstance(prompts, str) else list(prompts)
    if not questions or not all(isinstance(question, str) and question.strip() for question in questions):
        raise InputError("prompts= holds no question, or an empty one; give a list of strings, or a PairSet.")
    seen = set() if vectors is None else set(vectors.provenance.prompt_digests)
    trained_on = [question for question in questions if prompt_digest(question) in seen]
    if trained_on:
        raise InputError(
            f"{len(trained_on)} of {len(questions)} questions were used in training, the first is {trained_on[0]!r}; ask others, "
            "or look at them with generate()."
        )
    return questions


def _together(settings: Sequence[Setting]) -> dict[tuple[str, int] | None, list[int]]:
    """Places of the settings that are written in one batch: those of one vector at one layer; under None the unsteered ones."""
    groups: dict[tuple[str, int] | None, list[int]] = {}
    for place, setting in enumerate(settings):
        steered = setting.multiplier and setting.direction is not None
        groups.setdefault((setting.vector, setting.layer) if steered else None, []).append(place)
    return groups


def _write(
    model: Model,
    settings: Sequence[Setting],
    questions: Mapping[int, str],
    *,
    positions: Positions,
    batch_size: int,
    template: Template,
    **options: Any,
) -> dict[int, list[str]]:
    """Each question's answers, one a setting."""
    texts: dict[tuple[int, int], str] = {}
    for group, places in _together(settings).items():
        # The unsteered answer is written once, however many settings ask for it.
        rows = [(number, place) for place in (places if group else places[:1]) for number in questions]
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            asked: dict[str, Any] = {
                "draws": [number for number, _ in batch],
                "batch_size": len(batch),
                "template": template,
                **options,
            }
            prompts = [questions[number] for number, _ in batch]
            direction = settings[places[0]].direction
            if group is None or direction is None:
                said = generate(model, prompts, **asked)
            else:
                strength = torch.tensor([settings[place].multiplier for _, place in batch])
                with steer(model, direction, positions=positions, strength=strength, template=template):
                    said = generate(model, prompts, **asked)
            texts |= dict(zip(batch, said, strict=True))
        if group is None:
            texts |= {(number, place): texts[number, places[0]] for number in questions for place in places}
    return {number: [texts[number, place] for place in range(len(settings))] for number in questions}


def _measure(model: Model, template: Template, asked: Sequence[tuple[str, str]], *, batch_size: int) -> list[Measured]:
    """Answers with their diagnostics; equal texts are run once.

    An answer is tokenised behind its question as a text, which need not give the very tokens that were generated.
    """
    distinct = list(dict.fromkeys(asked))
    encoded = [template.encode(tokenizer_of(model), question, answer) for question, answer in distinct]
    spoken = [index for index, prompt in enumerate(encoded) if len(prompt.spans["completion"])]
    fluency: dict[int, float] = {}
    for index, logprobs in grid_logprobs(
        model, [completion_text(encoded[i]) for i in spoken], [None], batch_size=batch_size
    ):
        fluency[spoken[index]] = float(logprobs[0].mean())
    found: dict[tuple[str, str], Measured] = {}
    for index, (key, prompt) in enumerate(zip(distinct, encoded, strict=True)):
        tokens = [prompt.ids[i] for i in prompt.spans["completion"]]
        found[key] = (key[1], len(tokens), repeated_share(tokens), fluency.get(index))
    return [found[key] for key in asked]


def _item_table(
    questions: Sequence[str],
    systems: Sequence[str | None],
    settings: Sequence[Setting],
    found: Mapping[int, Sequence[Sequence[Any]]],
) -> pd.DataFrame:
    rows = []
    for number, question in enumerate(questions):
        for (system, setting), (answer, *diagnostics) in zip(product(systems, settings), found[number], strict=True):
            rows.append(
                {
                    "item": number,
                    "prompt": question,
                    **({} if system is None else {"system": system}),
                    "vector": setting.vector,
                    "layer": setting.layer,
                    "multiplier": setting.multiplier,
                    "answer": answer,
                    **{
                        name: math.nan if value is None else value
                        for name, value in zip(DIAGNOSTICS, diagnostics, strict=True)
                    },
                }
            )
    return pd.DataFrame(rows)
