"""What a steered model prefers, item by item.

    letter            p(matching) / sum over the letters offered of p(letter), mean over keys of the mean within a key (keys of
                      few items are taken together, see `bootstrap_mean`)
    letter_published  sum over items of p(matching) / (p(A) + p(B)), divided by the number of items: the authors' formula
    logprob           mean over tokens of log p(positive) minus mean over tokens of log p(negative), nats per token

The published formula adds 0 for items whose matching answer is neither A nor B, and hides how little mass the letters may have;
`letter` normalises over what is offered, and `mass` always stands beside it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from caa_lens.errors import InputError
from caa_lens.experiments.grid import Text
from caa_lens.experiments.statistics import where_defined
from caa_lens.pairs import ContrastPair, PairSet
from caa_lens.prompts import Prompt, Template

MetricName = Literal["letter", "letter_published", "logprob"]
Values = dict[str, Float[np.ndarray, " setting"]]


class Metric(ABC):
    """Turns a pair into texts to run, and their log-probabilities into an item's values.

    Attributes:
        name: as in `score(metric=...)`.
        unit: of `value`.
        balanced: whether the summary weights the answer keys equally.
        bounds: the least and the largest value there can be.
    """

    name: MetricName
    unit: str
    balanced: bool = False
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @abstractmethod
    def texts(self, tokenizer: Any, template: Template, pair: ContrastPair) -> list[Text]:
        """The texts of an item.

        Raises:
            InputError: the pair cannot be scored so.
        """

    @abstractmethod
    def values(self, pair: ContrastPair, logprobs: Sequence[Float[np.ndarray, "setting _"]]) -> Values:
        """`value` (the score), `effect` (what slopes are taken of), and whatever else is reported, for every setting."""


class Logprob(Metric):
    """Contrast of the completions' mean log-probability per token; `preferred` is whether it is positive (NaN where it is NaN)."""

    name: MetricName = "logprob"
    unit = "nats per token"

    def texts(self, tokenizer: Any, template: Template, pair: ContrastPair) -> list[Text]:
        both = template.encode_pair(tokenizer, pair)
        return [completion_text(side) for side in (both.positive, both.negative)]

    def values(self, pair: ContrastPair, logprobs: Sequence[Float[np.ndarray, "setting _"]]) -> Values:
        positive, negative = (side.mean(1) for side in logprobs)
        value = positive - negative
        return {
            "value": value,
            "effect": value,
            "positive": positive,
            "negative": negative,
            "preferred": where_defined(value > 0, value),
        }


def completion_text(prompt: Prompt) -> Text:
    """A text of which all tokens of the completion count."""
    targets = tuple((index, (prompt.ids[index],)) for index in prompt.spans["completion"])
    return Text(prompt.ids, prompt.instruction_end, targets)


class Letter(Metric):
    """Probability of the matching letter among those offered; `mass` is what they have together, `preferred` whether it is the
    likeliest of them."""

    name: MetricName = "letter"
    unit = "probability"
    balanced = True
    bounds = (0.0, 1.0)

    def letters(self, pair: ContrastPair) -> tuple[str, ...]:
        """The letters read, the matching one first."""
        if pair.key is None:
            raise InputError(
                f"{pair.where}: its completions are no answer letters ({pair.positive[:40]!r}); metric={self.name!r} needs "
                "multiple-choice pairs, use metric='logprob' for free text."
            )
        if pair.key not in pair.options:
            raise InputError(
                f"{pair.where}: the matching answer {pair.positive!r} is not offered; the prompt offers "
                f"{', '.join(pair.options) or 'no letters'}. Correct the key, or write the options as '(A) ...' lines."
            )
        if len(pair.options) < 2:
            raise InputError(
                f"{pair.where}: the prompt offers ({pair.key}) alone, so there is nothing to choose. Write the options as lines "
                "'(A) ...', '(B) ...' that follow each other."
            )
        return (pair.key, *(letter for letter in pair.options if letter != pair.key))

    def texts(self, tokenizer: Any, template: Template, pair: ContrastPair) -> list[Text]:
        letters = self.letters(pair)
        sides = [template.encode(tokenizer, pair.prompt, pair.answer(letter)) for letter in letters]
        rows = [side.ids for side in sides]
        answer = next((i for i, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), 0)
        tokens = tuple(row[answer] for row in rows)
        if len(set(tokens)) < len(tokens):
            raise InputError(
                f"{pair.where}: the letters {', '.join(letters)} share a first token, so their "
                "probabilities cannot be told apart; use letters of one token, or metric='logprob'."
            )
        return [Text(rows[0], sides[0].instruction_end, ((answer, tokens),))]

    def values(self, pair: ContrastPair, logprobs: Sequence[Float[np.ndarray, "setting _"]]) -> Values:
        probabilities = np.exp(logprobs[0].astype(np.float64))
        mass = probabilities.sum(1)
        with np.errstate(invalid="ignore"):  # of values that are not finite
            others = np.logaddexp.reduce(logprobs[0][:, 1:].astype(np.float64), axis=1)
            value = probabilities[:, 0] / mass
        return {
            "value": value,
            "effect": logprobs[0][:, 0] - others,
            "mass": mass,
            "preferred": where_defined(logprobs[0][:, 0] > logprobs[0][:, 1:].max(1), value),
        }


class LetterPublished(Letter):
    """The authors' formula on the tokens A and B, its two faults included; reproduces their numbers."""

    name: MetricName = "letter_published"
    balanced = False

    def letters(self, pair: ContrastPair) -> tuple[str, ...]:
        super().letters(pair)
        return ("A", "B")

    def values(self, pair: ContrastPair, logprobs: Sequence[Float[np.ndarray, "setting _"]]) -> Values:
        probabilities = np.exp(logprobs[0].astype(np.float64))
        mass = probabilities.sum(1)
        matching = published_item(pair.key, probabilities[:, 0], probabilities[:, 1])
        sign = {"A": 1.0, "B": -1.0}.get(pair.key or "", 0.0)
        return {"value": matching, "effect": sign * (logprobs[0][:, 0] - logprobs[0][:, 1]), "mass": mass}


def published_item(key: str | None, a: Any, b: Any) -> Any:
    """p(matching) / (p(A) + p(B)); 0 where the matching answer is neither, as in the authors' code."""
    return {"A": a, "B": b}.get(key or "", 0 * a) / (a + b)


METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in (Letter, LetterPublished, Logprob)}


def metric_for(pairs: PairSet, name: MetricName | None) -> Metric:
    """The named metric; by default `letter` where every pair has answer letters, else `logprob`.

    Raises:
        InputError: no such metric.
    """
    if name is None:
        name = "letter" if all(pair.key for pair in pairs) else "logprob"
    if name not in METRICS:
        raise InputError(f"metric={name!r}: allowed are {', '.join(map(repr, METRICS))}.")
    return METRICS[name]()
