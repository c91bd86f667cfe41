"""Prompting as the baseline of steering: system prompts and worked examples, alone and together with the vector.

    A = y(prompting, 0) - y(none, 0)      B = y(none, m) - y(none, 0)      both = y(prompting, m) - y(none, 0)
    interaction = both - A - B            per item, then the mean over items; y a score, m the vector's multiplier

All of it is one sweep: `sweep(..., systems=prompting(model, train, held_out))`, read by `additivity`. An interval that includes
zero does not show that two effects add up, only that these items do not tell. A probability bends near 0 and 1: what
adds up on the log-odds does not add up on it; both measures are given.

Source of the comparison: Rimsky et al., arXiv:2312.06681, sections 5 and 6 (CAA beside system prompts and few-shot prompting).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from caa_lens.errors import InputError, MissingError
from caa_lens.experiments.result import SweepResult
from caa_lens.experiments.scoring import Metric
from caa_lens.experiments.statistics import bootstrap_mean, bracket, why_undecided
from caa_lens.experiments.sweep import System
from caa_lens.hooks import template_for
from caa_lens.models import Model, describe, tokenizer_of
from caa_lens.pairs import ContrastPair, PairSet
from caa_lens.prompts import Template

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Side = Literal["positive", "negative"]
Measure = Literal["value", "effect"]
SIDES: tuple[Side, ...] = ("positive", "negative")
TERMS = ("prompting", "steering", "both", "expected", "interaction")


def few_shot(
    model: Model,
    pairs: PairSet,
    *,
    side: Side,
    k: int | None = None,
    longest: PairSet | None = None,
    at_most: int = 8,
    seed: int = 0,
    template: Template | None = None,
) -> Template:
    """The template with worked examples before every prompt: prompts of the pairs, each answered with its completion of one side.

    The same seed draws the same pairs for both sides, and more examples include the fewer. Of multiple-choice pairs each answer
    letter is drawn in turn, as long as it lasts, so that the examples do not favour one. The order in which they are written is
    random.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; only its tokenizer and its context length are used.
        pairs: the training pairs to draw from.
        side: which completion answers.
        k: number of examples; by default as many as the context holds.
        longest: the pairs to be scored, whose longest must fit behind the examples, and whose prompts are never drawn; by default
            only the longest of `pairs` must fit.
        at_most: the largest number that is taken by default.
        seed: of the drawing.
        template: how prompts are written; the model's default otherwise.

    Returns:
        A template, for `sweep(systems={"few-shot": ...})` or wherever a template is taken.

    Raises:
        InputError: another side, a template with turns of its own, fewer pairs than examples, or examples that do not fit.

    Example:
        >>> shots = caa.few_shot(model, train, side="positive", k=4, longest=held_out)  # doctest: +SKIP
        >>> caa.generate(model, "How was your weekend?", template=shots)  # doctest: +SKIP
    """
    if side not in SIDES:
        raise InputError(f"side={side!r}: allowed are 'positive' and 'negative'.")
    chosen = template_for(model, template)
    if chosen.turns:
        raise InputError(
            f"template= has {len(chosen.turns)} turns of its own; give it without, worked examples are turns."
        )
    scored = pairs if longest is None else longest
    examples = _drawn(pairs, () if longest is None else longest.prompt_digests, seed)
    wanted = 1 if k is None else k
    if not 1 <= wanted <= len(examples):
        raise InputError(
            f"k={k}: {pairs.name!r} has {len(examples)} distinct prompts outside the scored pairs; give 1 to that many, "
            "or more pairs."
        )
    tokenizer, context = tokenizer_of(model), describe(model).n_ctx

    def written(count: int) -> Template:
        order = examples[:count]
        random.Random(seed).shuffle(order)
        return replace(chosen, turns=tuple((pair.prompt, getattr(pair, side)) for pair in order))

    def length(way: Template, pair: ContrastPair) -> int:
        return max(len(way.encode(tokenizer, pair.prompt, text).ids) for text in (pair.positive, pair.negative))

    last = max(scored, key=lambda pair: length(chosen, pair))
    most = min(at_most, len(examples)) if k is None else k
    fits = next((n for n in range(most, 0, -1) if length(written(n), last) <= context), 0)
    if fits < wanted:
        raise InputError(
            f"{wanted} worked examples and {last.where} take {length(written(wanted), last)} tokens, the context of "
            f"{describe(model).name} holds {context}; at most {fits} examples fit."
        )
    return written(fits)


def _drawn(pairs: PairSet, taken: Sequence[str], seed: int) -> list[ContrastPair]:
    """Pairs of distinct prompts, none of them taken, each answer letter in turn."""
    distinct = {pair.prompt.strip(): pair for pair in pairs if pair.digests.isdisjoint(taken)}
    groups: dict[str | None, list[ContrastPair]] = {}
    for pair in distinct.values():
        groups.setdefault(pair.key, []).append(pair)
    rng, order = random.Random(seed), list(groups.values())
    for group in order:
        rng.shuffle(group)
    rng.shuffle(order)
    return [pair for row in zip_longest(*order) for pair in row if pair is not None]


def prompting(
    model: Model,
    train: PairSet,
    held_out: PairSet,
    *,
    k: int | None = None,
    seed: int = 0,
    template: Template | None = None,
) -> dict[str, System]:
    """All prompting baselines of a set by name, for `sweep(systems=...)`: none, system prompts, worked examples.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; it is not run.
        train: the training pairs, which examples are drawn from.
        held_out: the pairs to be scored.
        k: number of worked examples; by default as many as fit on both sides, at most 8.
        seed: of the drawing; both sides show the same prompts.
        template: how prompts are written; a system prompt of its own is left out.

    Returns:
        `"none"`; `"positive"` and `"negative"` if the set brings such system prompts; `"few-shot positive"` and
        `"few-shot negative"`.

    Raises:
        InputError: as in `few_shot`.

    Example:
        >>> systems = caa.prompting(model, train, held_out)  # doctest: +SKIP
        >>> caa.additivity(caa.sweep(model, vectors[14], held_out, systems=systems)).verdict()  # doctest: +SKIP
    """
    bare = replace(template_for(model, template), system_prompt=None)

    def shots(side: Side, count: int | None) -> Template:
        return few_shot(model, train, side=side, k=count, longest=held_out, seed=seed, template=bare)

    count = min(len(shots(side, k).turns) for side in SIDES)
    brings = any(f"{side}_system_prompt" in train.about for side in SIDES)
    systems = train.system_prompts if brings else {"none": None}
    return {**systems, **{f"few-shot {side}": shots(side, count) for side in SIDES}}


@dataclass(frozen=True)
class AdditivityResult:
    """Prompting and steering, alone and together.

    Attributes:
        items: one row an item, system, vector, multiplier and measure: the differences `prompting` (A), `steering` (B), `both`,
            `expected` (A + B) and `interaction` against the baseline without steering.
        metric: how items were scored.
        provenance: of the sweep.
        layer: of the vectors.
        baseline: the system that the others are compared with.
        seed: of the bootstrap.
    """

    items: pd.DataFrame
    metric: Metric
    provenance: dict[str, Any]
    layer: int
    baseline: str
    seed: int = 0

    def to_pandas(self) -> pd.DataFrame:
        """One row a (system, vector, multiplier, measure): every term's mean over items, with its 95% interval `<term>_low`,
        `<term>_high`; answer keys weigh equally where the metric is balanced. The measure `value` is in the metric's unit;
        `effect`, for letters, is the log-odds in nats."""
        axes = ["system", "vector", "multiplier", "measure"]
        rows = []
        for place, group in self.items.groupby(axes, sort=False):
            row = {**dict(zip(axes, place, strict=True)), "layer": self.layer}
            strata = group["key"].tolist() if self.metric.balanced else None
            for term in TERMS:
                found = bootstrap_mean(group[term].to_numpy(float), strata, seed=self.seed)
                row |= {term: found.value, f"{term}_low": found.low, f"{term}_high": found.high}
            rows.append({**row, "n": len(group)})
        return pd.DataFrame(rows)

    def verdict(self) -> str:
        """In words, a line for each system, multiplier and measure: whether the two effects add up.

        LESS and MORE THAN ADDITIVE are said of effects of the same sign; of opposite ones, whether both together lie ABOVE or
        BELOW THE SUM.
        """
        table = self.to_pandas()
        return "\n".join(f"{self._what(row)} {_judged(row)}" for row in table[table["vector"] == "vector"].itertuples())

    def _what(self, row: Any) -> str:
        unit = self.metric.unit if row.measure == "value" else "nats of log-odds"
        return (
            f"{self.provenance['pairs']}, layer {row.layer}, {row.system!r} with multiplier {row.multiplier:+g}, in {unit}: "
            f"prompting {row.prompting:+.3f}, steering {row.steering:+.3f}, both {row.both:+.3f} (sum {row.expected:+.3f}); "
            f"interaction {row.interaction:+.3f} {bracket(row.interaction_low, row.interaction_high)}, n = {row.n}."
        )

    def plot(self, measure: Measure = "value", *, ax: Axes | None = None) -> Figure:
        """A figure of the effects beside their sum, by system; see `caa_lens.plots_experiments.plot_additivity`."""
        from caa_lens.plots_experiments import plot_additivity

        return plot_additivity(self, measure, ax=ax)


def _judged(row: Any) -> str:
    if why := why_undecided(row.interaction, row.interaction_low):
        return why
    if row.interaction_low <= 0 <= row.interaction_high:
        return "ADDITIVE within the interval, which includes zero."
    if row.prompting * row.steering <= 0:
        return f"{'ABOVE' if row.interaction > 0 else 'BELOW'} THE SUM of effects of opposite sign."
    return f"{'MORE' if row.interaction * row.steering > 0 else 'LESS'} THAN ADDITIVE: the interval excludes zero."


def additivity(result: SweepResult, *, layer: int | None = None, baseline: str = "none") -> AdditivityResult:
    """Whether prompting and the vector add up, from one sweep over systems and multipliers.

    Args:
        result: of `sweep(..., systems=...)` with multiplier 0 and at least one other.
        layer: of the vectors; by default the layer whose effect under the baseline is largest (chosen on these items: see
            `SweepResult.best`).
        baseline: the system that counts as no prompting.

    Returns:
        An `AdditivityResult`; controls of the sweep are in its table too, under their names.

    Raises:
        InputError: a sweep without systems, with the baseline alone, or without multiplier 0 and another.
        MissingError: a baseline or a layer that was not swept.

    Example:
        >>> found = caa.additivity(caa.sweep(model, v, held_out, systems=held_out.system_prompts))  # doctest: +SKIP
        >>> found.to_pandas(), found.verdict(), found.plot()  # doctest: +SKIP
    """
    parts = result.by_system()
    if not parts:
        raise InputError("additivity compares ways to prompt; sweep with systems=prompting(model, train, held_out).")
    if baseline not in parts:
        raise MissingError(f"baseline={baseline!r} was not swept; there are {', '.join(map(repr, parts))}.")
    if len(parts) == 1:
        raise InputError(f"only {baseline!r} was swept; give systems= a way to prompt to compare with it.")
    multipliers = sorted(result.items["multiplier"].unique())
    if 0 not in multipliers or len(multipliers) == 1:
        raise InputError(f"additivity needs multiplier 0 and another; the sweep has {multipliers}.")
    layers = sorted(result.items["layer"].unique())
    if layer is None:
        layer = int(layers[0] if len(layers) == 1 else parts[baseline].best()["layer"])
    if layer not in layers:
        raise MissingError(f"layer {layer} was not swept; there are {', '.join(map(str, layers))}.")
    rows = result.items[result.items["layer"] == layer]
    keys = rows.drop_duplicates("item").set_index("item")["key"]
    frames = []
    for measure in ("value",) if result.metric.name == "logprob" else ("value", "effect"):
        for vector, group in rows.groupby("vector", sort=False):
            table = group.pivot(index="item", columns=["system", "multiplier"], values=measure)
            change = table.sub(table[baseline, 0.0], axis=0)
            for system in [name for name in parts if name != baseline]:
                for multiplier in [m for m in multipliers if m]:
                    place = {"system": system, "vector": vector, "multiplier": multiplier, "measure": measure}
                    alone, steered, both = change[system, 0.0], change[baseline, multiplier], change[system, multiplier]
                    terms = (alone, steered, both, alone + steered, both - alone - steered)
                    columns = dict(zip(TERMS, terms, strict=True))
                    frames.append(pd.DataFrame({"key": keys, **place, **columns}).reset_index(names="item"))
    items = pd.concat(frames, ignore_index=True)
    return AdditivityResult(items, result.metric, result.provenance, layer, baseline, result.seed)
