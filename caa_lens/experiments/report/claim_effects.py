"""Claims 1 and 2: the effect of a vector by layer, and by multiplier, alone and under system prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from caa_lens.experiments.baselines import AdditivityResult, additivity
from caa_lens.experiments.effects import Finding, best_of
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.section import Section
from caa_lens.experiments.report.status import OF_FINDING, PLACES, Status, of_interval, together, written
from caa_lens.experiments.result import SweepResult
from caa_lens.experiments.scoring import MetricName
from caa_lens.experiments.statistics import bootstrap_mean

PAPER = "layer 13 of 32 for Llama-2 7B, 44%"
MIDDLE = (0.25, 0.75)
"""Shares of the depth between which a layer is in the middle."""


def unprompted(lab: Lab, behaviour: str) -> SweepResult:
    """The chosen layer's vector without a system prompt, beside its controls, on the pairs that report."""
    return lab.dose(behaviour).by_system()["none"]


def by_layer(lab: Lab, behaviour: str) -> Section:
    """Effects by layer beside controls; the finding is of the chosen layer, on pairs that did not choose it."""
    swept, layer, beside = lab.layer_sweep(behaviour), lab.layer(behaviour), unprompted(lab, behaviour)
    finding = beside.finding()
    n = swept.items["item"].nunique()
    depth = (layer + 1) / lab.n_layers()
    if lab.study.layer is not None:
        chosen, where, of = f"Layer {layer} was set by the study.", "the same pairs", "that the finding is of"
    else:
        share = f"{depth:.0%} of the depth; the paper: {PAPER}"
        chosen = f"Layer {layer} has the largest effect on {n} pairs ({share})."
        where, of = "the other held-out pairs", "that the layer was chosen on"
    effects = swept.effects()
    status, place = by_depth(effects, lab.n_layers())
    own = effects[effects["vector"] == "vector"]
    # Where a vector works is asked of one that works.
    status = status if finding.status == "beyond controls" else OF_FINDING[finding.status]
    return Section(
        status,
        f"{chosen}\nOn {where}, {finding.words}\n{place}",
        {"effects_by_layer": effects, "effects_at_chosen_layer": beside.effects()},
        {"effects_by_layer": swept.plot("layer") if len(own) > 1 else swept.plot("multiplier")},
        notes=(
            f"The figure shows the {n} pairs {of}, at multipliers -1 and +1.",
            "Bands are 95% bootstrap intervals over pairs; controls have the vector's norm at each layer.",
        ),
    )


def by_depth(effects: pd.DataFrame, n_layers: int) -> tuple[Status, str]:
    """Whether a vector works most in the middle half of a model, in a word and in words; by the size of the effects as measured.

    Args:
        effects: rows of `SweepResult.effects`, one a layer and vector.
        n_layers: of the model.
    """
    own = effects[effects["vector"] == "vector"]
    best = best_of(effects)
    low, high = MIDDLE
    inside = low <= (best["layer"] + 1) / n_layers <= high
    above = int((own["effect_low"] > 0).sum())
    words = (
        f"The interval lies above zero at {above} of {len(own)} layers swept; the largest effect is at layer {best['layer']}, "
        f"{written(best)}, {'inside' if inside else 'outside'} the middle half of the model."
    )
    if len(own) < 2:
        return "mixed", f"{words} One layer does not tell where the effect is largest."
    return "holds" if inside else "mixed", words


def by_multiplier(lab: Lab, behaviour: str) -> Section:
    """Scores by multiplier at the chosen layer, without a system prompt and under a positive and a negative one."""
    dose = lab.dose(behaviour)
    findings = {name: result.finding() for name, result in dose.by_system().items()}
    rises = steps(unprompted(lab, behaviour))
    added = additivity(replace(dose, items=dose.items[dose.items["vector"] == "vector"]))
    status, words = by_system(findings, rises)
    tables = {
        "scores_by_multiplier": dose.to_pandas(),
        "effects_by_system_prompt": dose.effects(),
        "steps_of_the_multiplier": rises,
        "additivity": added.to_pandas(),
    }
    if lab.study.published_score and behaviour.startswith("ab/"):
        tables["published_score"] = _published_score(lab, behaviour)
    return Section(
        status,
        f"{words}\n{summed(added)}",
        tables,
        {"scores_by_multiplier": dose.plot("multiplier")},
        notes=(f"{dose.items['item'].nunique()} held-out pairs.",),
    )


def by_system(findings: Mapping[str, Finding], rises: pd.DataFrame) -> tuple[Status, str]:
    """Whether a vector works under every system prompt and grows with the multiplier, in a word and in words.

    Args:
        findings: under each system prompt, beside controls.
        rises: of `steps`.
    """
    places = [of_interval(row.change_low, row.change_high) for row in rises.itertuples()]
    counts = ", ".join(f"{PLACES[place]} at {places.count(place)}" for place in PLACES if place in places)
    lines = [f"System prompt {name!r}: {finding.words}" for name, finding in findings.items()]
    lines.append(
        f"Of {len(places)} steps from one multiplier to the next, without a system prompt, the change of the mean score is "
        f"{counts}."
    )
    status = together(OF_FINDING[finding.status] for finding in findings.values())
    return "mixed" if status == "holds" and "opposite" in places else status, "\n".join(lines)


def steps(result: SweepResult) -> pd.DataFrame:
    """One row a step of the multiplier: `start`, `end`, the vector's mean `change` of the items' scores with its 95% interval."""
    own = result.items[result.items["vector"] == "vector"]
    values = own.pivot(index="item", columns="multiplier", values="value").sort_index(axis="columns")
    strata = own.drop_duplicates("item").set_index("item")["key"].loc[values.index].tolist()
    rows = []
    for start, end in zip(values.columns, values.columns[1:], strict=False):
        change = (values[end] - values[start]).to_numpy(float)
        found = bootstrap_mean(change, strata if result.metric.balanced else None, seed=result.seed)
        rows.append(
            {"start": start, "end": end, "change": found.value, "change_low": found.low, "change_high": found.high}
        )
    return pd.DataFrame(rows)


def summed(added: AdditivityResult) -> str:
    """How many combinations of a way of prompting and a multiplier add up, in the metric's own unit; the table has each."""
    table = added.to_pandas()
    own = table[(table["vector"] == "vector") & (table["measure"] == "value")]
    sums = own[(own["interaction_low"] <= 0) & (own["interaction_high"] >= 0)]
    largest = own.loc[own["interaction"].abs().idxmax()].to_dict()
    return (
        f"Prompt and vector add up, within the interval, in {len(sums)} of {len(own)} combinations; the largest interaction is "
        f"{written(largest, 'interaction')} {added.metric.unit}, of {largest['system']!r} with "
        f"multiplier {largest['multiplier']:+g}."
    )


def _published_score(lab: Lab, behaviour: str) -> pd.DataFrame:
    """The authors' formula at the chosen layer, without controls."""
    metric: MetricName = "letter_published"
    result = lab.sweep(
        "published-score",
        behaviour,
        lab.vector(behaviour),
        lab.pairs(behaviour).report,
        multipliers=lab.study.multipliers,
        metric=metric,
    )
    return result.to_pandas()
