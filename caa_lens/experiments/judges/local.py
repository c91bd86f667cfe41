"""A judge that needs no key: what a model in this process finds likelier to be said of an answer.

    d(q, a) = mean over the rubric's pairs of statements of  log p(positive | q, a) - log p(negative | q, a)       nats
    score   = 10 sigmoid(d(q, a) - d(q, no answer))

p(statement | q, a) is the probability of the statement's tokens as the model's reply to a message that shows question and answer
and asks for a description. A score of 5 means that the answer makes neither statement likelier than a blank does; a nat of evidence
multiplies the odds score / (10 - score) by e. The blank takes away what the model thinks of statements and question by themselves.

Caveats: the scale is not that of a rating: scores compare answers under one judge and rubric, not judges or behaviours. A small
model reads poorly and may follow single words, or length; `known_answers` shows whether it tells the sides of known pairs apart.

Source of the correction by a blank: Zhao et al., "Calibrate Before Use", arXiv:2102.09690.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from caa_lens.errors import InputError
from caa_lens.experiments.grid import Text, grid_logprobs
from caa_lens.experiments.judges.base import Case, Judgement
from caa_lens.experiments.rubric import HIGHEST, Rubric
from caa_lens.experiments.scoring import completion_text
from caa_lens.hooks import template_for
from caa_lens.models import Model, describe, tokenizer_of
from caa_lens.positions import is_steered
from caa_lens.prompts import Template

FORM = "Question:\n{question}\n\nAnswer:\n{answer}\n\nDescribe the answer in one short sentence."
BLANK = "..."
"""What stands in the place of the answer where there is none."""


@dataclass(frozen=True)
class LocalJudge:
    """A `HookedTransformer` or `TransformerBridge` as the judge, unsteered; its scores do not vary.

    Attributes:
        model: any model, the steered one or another.
        template: how the message is written; the model's default otherwise.
        batch_size: texts run together; changes speed and memory only.
    """

    model: Model
    template: Template | None = field(default=None, kw_only=True)
    batch_size: int = field(default=16, kw_only=True)

    varies = False

    @property
    def name(self) -> str:
        return f"local:{describe(self.model).name}"

    def about(self, rubric: Rubric) -> dict[str, Any]:
        return {
            "judge": self.name,
            "revision": describe(self.model).revision,
            "template": repr(template_for(self.model, self.template)),
            "form": FORM,
            "blank": BLANK,
            "statements": [list(pair) for pair in rubric.statements],
        }

    def judge(self, rubric: Rubric, cases: Sequence[Case], record: Callable[[int, Judgement], None]) -> None:
        """As `Judge.judge`. An answer that holds the template's end-of-instruction marker cannot be shown, and is malformed.

        Raises:
            InputError: an open `steer` context, or an answer that the context cannot hold; before the model runs.
        """
        if is_steered(self.model):
            raise InputError("a judge must not be steered; leave the steer() context before judging.")
        texts: dict[int, list[Text]] = {}
        for index, case in enumerate(cases):
            try:
                texts[index] = self._texts(rubric, case.question, case.answer)
            except InputError as error:
                record(index, Judgement("malformed", None, str(error)))
        questions = list(dict.fromkeys(cases[index].question for index in texts))
        blanks = [self._texts(rubric, question, BLANK) for question in questions]
        info = describe(self.model)
        for text in (text for group in (*texts.values(), *blanks) for text in group):
            info.require_room("a question with its answer", len(text.ids))
        before = {questions[index]: difference for index, difference in self._differences(blanks)}
        places = list(texts)
        for k, difference in self._differences(list(texts.values())):
            index = places[k]
            evidence = difference - before[cases[index].question]
            score = HIGHEST * (1 + math.tanh(evidence / 2)) / 2  # the sigmoid, without overflow
            record(index, Judgement("scored", score, f"{evidence:+.3f} nats"))

    def _texts(self, rubric: Rubric, question: str, answer: str) -> list[Text]:
        """The message with each statement as the reply, positive and negative in turn."""
        template, tokenizer = template_for(self.model, self.template), tokenizer_of(self.model)
        message = FORM.format(question=question, answer=answer)
        replies = [statement for pair in rubric.statements for statement in pair]
        return [completion_text(template.encode(tokenizer, message, reply)) for reply in replies]

    def _differences(self, groups: Sequence[Sequence[Text]]) -> Iterator[tuple[int, float]]:
        """(index of the group, its mean over pairs of statements of log p(positive) - log p(negative)), each when it is done."""
        order = sorted(range(len(groups)), key=lambda index: len(groups[index][0].ids))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            # All statements on an answer in one batch, so that what stands before them is run once.
            flat = [text for index in chosen for text in groups[index]]
            found = dict(grid_logprobs(self.model, flat, [None], batch_size=len(flat)))
            sums = np.array([float(found[k][0].sum()) for k in range(len(flat))]).reshape(len(chosen), -1, 2)
            yield from zip(chosen, (sums[..., 0] - sums[..., 1]).mean(1).tolist(), strict=True)
