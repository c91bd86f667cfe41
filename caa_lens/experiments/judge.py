"""Answers scored from 0 to 10 by a judge that does not know how they were made.

    score[answer, repeat] = judge(rubric, question, answer)

Every distinct text is judged once a repeat, in a seeded random order: equal answers at two settings have equal scores, and a judge
that drifts cannot favour a setting. Judgements are kept in a folder by what determines them (judge, rubric, question, answer,
repeat), so that no text is judged or paid for twice, in whatever set of answers it comes again.

Caveat: a score is this judge's reading of this rubric. `judge(known_answers(pairs), ...)` shows whether the judge can tell the two
sides of the pairs apart, and `JudgeResult.agreement()` whether it says the same thing twice; neither shows that people would agree.

Source of the rating from 0 to 10 by a model: Rimsky et al., arXiv:2312.06681, section 4.3.
"""

from __future__ import annotations

import json
import os
import random
import threading
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from caa_lens.errors import CaaLensWarning, EndpointError, InputError
from caa_lens.experiments.answer_set import AnswerSet
from caa_lens.experiments.judged import JudgeResult
from caa_lens.experiments.judges.base import Case, Judge, Judgement
from caa_lens.experiments.judges.endpoint import OpenAIJudge
from caa_lens.experiments.judges.local import LocalJudge
from caa_lens.experiments.rubric import Rubric, rubric_for
from caa_lens.files import digest, write_json
from caa_lens.models import load_model
from caa_lens.pairs import PairSet
from caa_lens.workers import alone, on_main


def judge(
    answers: AnswerSet,
    rubric: Rubric | PairSet | str,
    judge: Judge,
    *,
    repeats: int = 1,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> JudgeResult:
    """Scores answers by a rubric, blindly, in random order, several times if asked.

    Args:
        answers: of `answers`, `AnswerSet.load` or `known_answers`.
        rubric: a `Rubric`, or that of a built-in behaviour, by its pairs or its name.
        judge: an `OpenAIJudge`, a `LocalJudge`, or an object that does what `judges.base.Judge` says.
        repeats: how often each text is judged, for `agreement()`; a judge whose scores do not vary is asked once only.
        seed: of the order, and of the bootstrap.
        store: a folder that keeps every judgement as soon as it is made, and gives back those that it has. Without it they live in
            the result only, and are lost when the call fails.
        progress: show a progress bar.

    Returns:
        A `JudgeResult`. Refused and malformed replies are counted in it, and have no score.

    Raises:
        InputError: fewer than one repeat, several with a judge that does not vary, or pairs without a rubric.
        EndpointError: the judge's service refuses the key or has died; the message says what is kept and how to go on.

    Example:
        >>> result = caa.judge(said, "formality", caa.OpenAIJudge("gpt-4o"), store="judged")  # doctest: +SKIP
        >>> result.to_pandas(), result.verdict()  # doctest: +SKIP
    """
    chosen = rubric_for(rubric)
    if repeats < 1:
        raise InputError(f"repeats={repeats} must be at least 1.")
    if repeats > 1 and not judge.varies:
        raise InputError(
            f"repeats={repeats}: {judge.name} gives the same score every time, so that its agreement with itself says nothing; "
            "leave repeats= out."
        )
    about = judge.about(chosen)
    pairs = list(zip(answers.items["prompt"], answers.items["answer"], strict=True))
    cases = [Case(*texts, repeat) for texts in dict.fromkeys(pairs) for repeat in range(repeats)]
    random.Random(seed).shuffle(cases)
    # Asked by one process for all, or an endpoint would be paid by each.
    found = on_main(lambda: _judgements(judge, chosen, cases, _Judgements(store, about), store, progress))
    failed = [judgement for judgement in found.values() if judgement.status == "failed"]
    if failed:
        warnings.warn(
            f"{len(failed)} of {len(cases)} texts could not be judged (the last: {failed[-1].reply}); they have no score, and the "
            "same call asks for them again.",
            CaaLensWarning,
            stacklevel=2,
        )
    rows = [{"repeat": repeat, **asdict(found[Case(*texts, repeat)])} for texts in pairs for repeat in range(repeats)]
    judged = pd.DataFrame(rows).astype({"score": float})[["repeat", "score", "status", "reply"]]
    items = answers.items.loc[answers.items.index.repeat(repeats)].reset_index(drop=True)
    made = {**answers.provenance, "judge": about, "rubric": asdict(chosen), "repeats": repeats, "judge_seed": seed}
    return JudgeResult(pd.concat([items, judged], axis=1), made, chosen, judge.name, seed)


def _judgements(
    judge: Judge,
    rubric: Rubric,
    cases: list[Case],
    kept: _Judgements,
    store: str | os.PathLike[str] | None,
    progress: bool,
) -> dict[Case, Judgement]:
    """What was judged before, and the rest from the judge, kept as it comes."""
    found = {case: judgement for case in cases if (judgement := kept.get(case)) is not None}
    missing = [case for case in cases if case not in found]
    lock = threading.Lock()
    with tqdm(
        total=len(cases), initial=len(found), desc=f"judge {rubric.title}", unit="answer", disable=not progress
    ) as bar:

        def record(index: int, judgement: Judgement) -> None:
            with lock:
                found[missing[index]] = judgement
                kept.add(missing[index], judgement)
                bar.update()

        try:
            if missing:
                with alone():
                    judge.judge(rubric, missing, record)
        except EndpointError as error:
            n_kept = sum(judgement.status != "failed" for judgement in found.values())
            where = (
                f"are kept in {store}; the same call goes on there, and asks for none of them again"
                if store is not None
                else "were made and are lost; give store= a folder, which keeps them"
            )
            raise EndpointError(f"{error} {n_kept} of {len(cases)} judgements {where}.") from error
    return found


def judge_from(spec: str, **options: Any) -> Judge:
    """A judge from one word, for command lines and settings: `"openai:gpt-4o"`, `"local:smollm2-135m-instruct"`.

    Args:
        spec: the kind and, behind the colon, the model's name: an endpoint's, or what `load_model` takes.
        **options: of `OpenAIJudge` or `LocalJudge`.

    Raises:
        InputError: another kind, or no name.
    """
    kind, name = parse_judge(spec)
    return OpenAIJudge(name, **options) if kind == "openai" else LocalJudge(load_model(name), **options)


def parse_judge(spec: str) -> tuple[str, str]:
    """The kind and the model's name of what `judge_from` takes.

    Raises:
        InputError: another kind, or no name.
    """
    kind, _, name = spec.partition(":")
    if kind not in ("openai", "local") or not name.strip():
        raise InputError(f"no judge {spec!r}: give 'openai:MODEL', or 'local:MODEL' with what load_model() takes.")
    return kind, name


class _Judgements:
    """Judgements by what determines them, one file each; what failed is not kept."""

    def __init__(self, folder: str | os.PathLike[str] | None, about: dict[str, Any]) -> None:
        self.folder, self.about = (Path(folder) if folder is not None else None), about

    def _file(self, folder: Path, case: Case) -> Path:
        return folder / f"{digest([self.about, case.question, case.answer, case.repeat])}.json"

    def get(self, case: Case) -> Judgement | None:
        if self.folder is None or not (file := self._file(self.folder, case)).exists():
            return None
        try:
            return Judgement(**json.loads(file.read_text(encoding="utf-8"))["judgement"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is no judgement ({error}); delete it, and it is asked for again.") from error

    def add(self, case: Case, judgement: Judgement) -> None:
        if self.folder is None or judgement.status == "failed":
            return
        content = {"judge": self.about, **asdict(case), "judgement": asdict(judgement)}
        write_json(self._file(self.folder, case), content)
