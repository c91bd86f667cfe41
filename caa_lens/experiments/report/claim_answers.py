"""Claim 3: what the model writes under steering, as a judge sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from caa_lens.choices import as_free_text
from caa_lens.errors import InputError
from caa_lens.experiments.answer_set import AnswerSet, known_answers
from caa_lens.experiments.answers import answers
from caa_lens.experiments.effects import Finding
from caa_lens.experiments.judge import judge, judge_from
from caa_lens.experiments.judged import JudgeResult
from caa_lens.experiments.judges.base import Judge
from caa_lens.experiments.judges.local import LocalJudge
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.section import NotRun, Section
from caa_lens.experiments.report.status import OF_FINDING, Status, of_interval
from caa_lens.experiments.rubric import rubric_for
from caa_lens.vector_set import VectorSet

SHOWN = 3
"""Questions whose answers are shown."""


def judged_answers(lab: Lab, behaviour: str) -> Section:
    """Answers to open questions by multiplier, beside a random and a shuffled vector of the same norm, and their judged scores."""
    study, pairs = lab.study, lab.pairs(behaviour)
    # Before any answer is written: neither may be lacking when they are there.
    asked, rubric = _judge(lab), rubric_for(pairs.train)
    questions = lab.open_questions(behaviour)[: study.questions]
    if not questions:
        raise NotRun(f"{behaviour} brings no open questions")
    v = lab.vector(behaviour)
    found = answers(
        lab.model,
        v,
        questions,
        multipliers=(-1.0, 0.0, 1.0),
        # One control of each kind: writing is slow.
        others={
            "random-0": VectorSet([v.random_control(seed=study.seed)]),
            "shuffled-0": VectorSet([v.controls["shuffled-0"]]),
        },
        max_new_tokens=study.max_new_tokens,
        batch_size=study.batch_size,
        seed=study.seed,
        store=lab.work("answers", behaviour),
        progress=lab.progress,
    )
    result = judge(
        found,
        rubric,
        asked,
        seed=study.seed,
        store=lab.work("judged", behaviour),
        progress=lab.progress,
    )
    known = pairs.report
    able = judge(
        known_answers(as_free_text(known) if behaviour.startswith("ab/") else known),
        rubric,
        asked,
        # The known sides only: a second score of every answer would be paid for too.
        repeats=2 if asked.varies else 1,
        seed=study.seed,
        store=lab.work("judged", behaviour),
        progress=lab.progress,
    )
    failed = sum(int((each.items["status"] == "failed").sum()) for each in (result, able))
    tables = {
        "judged_scores": result.to_pandas(),
        "judged_effects": result.effects(),
        "judged_items": result.items,
        "judge_on_known_sides": able.effects(),
        "answers": _shown(found),
    }
    status, words = conclude(result.finding(), able.best())
    return Section(
        status,
        "\n".join([words, *_agreement(able), _fluency(found)]),
        tables,
        {"judged_scores": result.plot()},
        notes=(
            f"Judge: {result.judge}; it sees question and answer only.",
            *(
                [f"{failed} judgements failed and are left out; the study, run again, asks for them again."]
                if failed
                else []
            ),
        ),
        complete=not failed,
    )


def _shown(found: AnswerSet) -> pd.DataFrame:
    """The first questions, one column a multiplier."""
    items = found.items
    own = items[(items["vector"] == "vector") & (items["item"] < SHOWN)]
    table = own.pivot(index="prompt", columns="multiplier", values="answer").reset_index()
    table.columns = [name if isinstance(name, str) else f"{name:+g}" for name in table.columns]
    return table


def _judge(lab: Lab) -> Judge:
    """The study's judge; `local` is the study's own model, unsteered."""
    if lab.study.judge == "local":
        return LocalJudge(lab.model, batch_size=lab.study.batch_size)
    if "judge" not in lab.made:
        lab.made["judge"] = judge_from(lab.study.judge)
    return lab.made["judge"]


def conclude(finding: Finding, known: Mapping[str, Any]) -> tuple[Status, str]:
    """What judged answers show, in a word and in words, given what the judge says of texts whose side is known.

    Args:
        finding: of the answers.
        known: the row of `JudgeResult.effects` of the known sides, which stand at -1 and +1.
    """
    of_known = of_interval(known["effect_low"], known["effect_high"])
    reads = {"holds": "it tells them apart", "opposite": "it takes them the wrong way round"}
    said = (
        f"On {known['n']} held-out pairs' own completions, positive minus negative, the judge gives {2 * known['effect']:+.2f} "
        f"points [{2 * known['effect_low']:+.2f}, {2 * known['effect_high']:+.2f}]: "
        f"{reads.get(of_known, 'it does not tell them apart')}."
    )
    if of_known == "holds":
        return OF_FINDING[finding.status], f"{finding.words}\n{said}"
    return "cannot tell", f"{said} What it says of the answers decides nothing.\nIt says: {finding.words}"


def _agreement(able: JudgeResult) -> list[str]:
    """How far a judge whose scores vary says the same of the known sides twice."""
    if able.provenance["repeats"] < 2:
        return []
    try:
        found = able.agreement()
    except InputError:  # no text has two scores
        return ["No known side was scored twice: how far the judge agrees with itself is not known."]
    alpha = "" if np.isnan(found.alpha) else f"; Krippendorff's alpha {found.alpha:.2f}"
    return [
        f"Asked twice of each of {found.n} known sides, the judge gives scores {found.mean_absolute_difference:.2f} points apart "
        f"on average, and the same one for {found.exact:.0%} of them{alpha}."
    ]


def _fluency(found: AnswerSet) -> str:
    own = found.items[found.items["vector"] == "vector"]
    means = own.groupby("multiplier")["repeated"].mean()
    said = ", ".join(f"{m:+g}: {share:.0%}" for m, share in means.items())
    return f"Share of repeated three-token sequences, by multiplier: {said}."
