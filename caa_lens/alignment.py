"""What is patched where: pairs of runs, the positions of one that correspond to the other's, and the answers they are read by.

    logit difference = logit(positive answer token) - logit(negative answer token) at the last token of a run

A run ends with the token at which it is read: nothing behind it can matter, and it is not run. Positions correspond if they have
the same index, counted from the start or from the end, or the same name in the template. Where both runs have the same tokens up
to and including a position, they have the same activations there, and patching it from one to the other changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caa_lens.errors import InputError
from caa_lens.pairs import ContrastPair, PairSet
from caa_lens.prompts import Conversation, Prompt, Template

Position = int | str | slice
Answers = tuple[str, str] | Callable[[ContrastPair], tuple[str, str]]


@dataclass(frozen=True)
class Run:
    """Token ids up to the position read, and the template's named spans of them that are not empty."""

    ids: tuple[int, ...]
    spans: Mapping[str, range]

    @classmethod
    def of(cls, prompt: Prompt, length: int) -> Run:
        """The first `length` tokens of a prompt."""
        spans = {name: range(span.start, min(span.stop, length)) for name, span in prompt.spans.items()}
        return cls(prompt.ids[:length], {name: span for name, span in spans.items() if span})

    def resolve(self, position: Position) -> range:
        """The tokens that a position means in this run.

        Raises:
            InputError: there are none.
        """
        if isinstance(position, str):
            if position in self.spans:
                return self.spans[position]
            raise InputError(
                f"there is no span {position!r} among the {len(self.ids)} tokens that are run; there are "
                f"{', '.join(map(repr, self.spans))}."
            )
        if isinstance(position, slice) and position.step in (None, 1):
            span = range(*position.indices(len(self.ids)))
        elif isinstance(position, int) and not isinstance(position, bool):
            start = position + len(self.ids) if position < 0 else position
            span = range(start, start + 1)
        else:
            raise InputError(
                f"position {position!r}: allowed are an index (negative from the position read, -1), a slice of step 1, "
                "or the name of a span of the template."
            )
        if not span or span.start < 0 or span.stop > len(self.ids):
            raise InputError(f"position {position!r} lies outside the {len(self.ids)} tokens that are run.")
        return span


@dataclass(frozen=True)
class Case:
    """One target run, the source run whose activations go into it (None for a vector), and the two answer tokens."""

    target: Run
    source: Run | None
    answers: tuple[int, int]
    name: str


@dataclass(frozen=True)
class Column:
    """One position or span: its tokens in every case's target, and those of the source that replace them."""

    label: int | str
    target: tuple[range, ...]
    source: tuple[range, ...]

    def of(self, index: Sequence[int]) -> Column:
        """The same column for some of the cases."""
        return Column(self.label, tuple(self.target[i] for i in index), tuple(self.source[i] for i in index))

    def changes_nothing(self, cases: Sequence[Case]) -> bool:
        """Whether source and target are alike up to here, so that their activations are the same."""
        return all(
            case.source is not None
            and target == source
            and case.source.ids[: target.stop] == case.target.ids[: target.stop]
            for case, target, source in zip(cases, self.target, self.source, strict=True)
        )


def text_case(
    tokenizer: Any,
    template: Template,
    source: Conversation | None,
    target: Conversation,
    answers: tuple[str, str],
) -> Case:
    """Two prompts, or one and a vector, read where the answers begin to differ."""
    where = f"the prompt {target[:60]!r}" if isinstance(target, str) else "the target conversation"
    run, tokens = _question(tokenizer, template, target, "", answers, where)
    if source is None:
        return Case(run, None, tokens, where)
    other, same = _question(tokenizer, template, source, "", answers, "the source")
    if same != tokens:
        raise InputError(
            f"the answers {answers} tokenise to other first tokens behind the source than behind the target; write both "
            "prompts with the same end."
        )
    return Case(run, other, tokens, where)


def pair_case(
    tokenizer: Any, template: Template, pair: ContrastPair, side: str | None, answers: Answers | None
) -> Case:
    """One contrast pair: a vector's target (side None), or one side as the source and the other as the target.

    A vector is read where the pair's completions begin to differ. Two sides differ there already: they are read at the last
    token that differs while both go on, or behind the whole completions, where `answers` begin to differ.
    """
    texts = answers(pair) if callable(answers) else answers
    if side is None:
        run, tokens = _question(
            tokenizer, template, pair.prompt, "", texts or (pair.positive, pair.negative), pair.where
        )
        return Case(run, None, tokens, pair.where)
    if texts is not None:
        (positive, tokens), (negative, other) = (
            _question(tokenizer, template, pair.prompt, completion, texts, pair.where)
            for completion in (pair.positive, pair.negative)
        )
        if tokens != other:
            raise InputError(
                f"{pair.where}: the answers {texts} begin with other tokens behind one side than the other."
            )
    else:
        both = template.encode_pair(tokenizer, pair)
        ids = list(zip(both.positive.ids, both.negative.ids, strict=False))
        again = max(index for index, (a, b) in enumerate(ids) if a != b)
        if again == both.answer:
            raise InputError(
                f"{pair.where}: behind the token at which they differ both completions go on alike, so no next token tells the "
                "two sides apart; give answers=, the two texts to compare behind the completions (or a function of "
                "the pair that returns them), or patch with a vector."
            )
        positive, negative = Run.of(both.positive, again), Run.of(both.negative, again)
        tokens = (both.positive.ids[again], both.negative.ids[again])
    source, target = (positive, negative) if side == "positive" else (negative, positive)
    return Case(target, source, tokens, pair.where)


def cases_of(
    tokenizer: Any,
    template: Template,
    source: Any,
    target: Conversation | ContrastPair | PairSet,
    answers: Answers | None,
) -> list[Case]:
    """The runs to compare; `source` is None for a vector.

    Raises:
        InputError: a source and a target that do not go together, or answers that are missing or alike.
    """
    if isinstance(target, (PairSet, ContrastPair)):
        if source not in (None, "positive", "negative"):
            raise InputError(
                f"source={source!r}: for contrast pairs the source is the side 'positive' or 'negative' (the other is the "
                "target), or a vector."
            )
        pairs = [target] if isinstance(target, ContrastPair) else list(target)
        if not pairs:
            raise InputError("no pairs to patch; give at least one.")
        return [pair_case(tokenizer, template, pair, source, answers) for pair in pairs]
    if answers is None or callable(answers):
        raise InputError("a text needs answers=(positive, negative): the two continuations whose logits are compared.")
    return [text_case(tokenizer, template, source, target, answers)]


def columns_of(cases: Sequence[Case], positions: Position | Sequence[Position] | None) -> list[Column]:
    """The positions of every case, matched between source and target; None means each token by itself.

    Raises:
        InputError: positions outside a run, or that do not match.
    """
    if positions is None:
        lengths = {len(run.ids) for case in cases for run in (case.target, case.source) if run is not None}
        if len(lengths) > 1:
            raise InputError(
                f"the runs have {min(lengths)} to {max(lengths)} tokens, so they cannot be matched token by token; give "
                "positions counted from the end (positions=range(-5, 0)), names of the template's spans "
                "(positions=['instruction_end', 'completion']), or slices."
            )
        positions = range(lengths.pop())
    chosen: Sequence[Position] = [positions] if isinstance(positions, (int, str, slice)) else list(positions)
    if not chosen:
        raise InputError("no position to patch; leave positions= out for every token.")
    return [_column(cases, position) for position in chosen]


def _column(cases: Sequence[Case], position: Position) -> Column:
    target = tuple(case.target.resolve(position) for case in cases)
    source = tuple((case.source or case.target).resolve(position) for case in cases)
    for case, here, there in zip(cases, target, source, strict=True):
        if len(here) != len(there):
            raise InputError(
                f"position {position!r} is {len(there)} tokens in the source and {len(here)} in the target of {case.name}; "
                "give spans of equal length, such as slices counted from the end."
            )
    if isinstance(position, slice):
        start, stop = ("" if bound is None else bound for bound in (position.start, position.stop))
        return Column(f"{start}:{stop}", target, source)
    return Column(position, target, source)


def _question(
    tokenizer: Any,
    template: Template,
    conversation: Conversation,
    completion: str,
    answers: tuple[str, str],
    where: str,
) -> tuple[Run, tuple[int, int]]:
    """The run that ends before the first token at which the answers differ, and the two tokens there."""
    positive, negative = (template.encode(tokenizer, conversation, completion + answer) for answer in answers)
    at = next((i for i, (a, b) in enumerate(zip(positive.ids, negative.ids, strict=False)) if a != b), None)
    if at is None:
        raise InputError(f"{where}: no token tells the answers {answers} apart; give two that differ in a token.")
    return Run.of(positive, at), (positive.ids[at], negative.ids[at])
