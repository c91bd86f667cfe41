"""Claims 1 and 2: the effect of a vector by layer, and by multiplier, alone and under system prompts."""

from __future__ import annotations

import pandas as pd

from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.section import Section
from caa_lens.experiments.report.status import OF_FINDING
from caa_lens.experiments.result import SweepResult
from caa_lens.experiments.scoring import MetricName

PAPER = "layer 13 of 32 for Llama-2 7B, 44%"


def unprompted(lab: Lab, behaviour: str) -> SweepResult:
    """The chosen layer's vector without a system prompt, beside its controls, on the pairs that report."""
    return lab.dose(behaviour).by_system()["none"]


def by_layer(lab: Lab, behaviour: str) -> Section:
    """Effects by layer beside controls; the finding is of the chosen layer, on pairs that did not choose it."""
    swept, layer, dose = lab.layer_sweep(behaviour), lab.layer(behaviour), unprompted(lab, behaviour)
    finding = dose.finding()
    n = swept.items["item"].nunique()
    depth = (layer + 1) / lab.n_layers()
    if lab.study.layer is not None:
        chosen, where, of = f"Layer {layer} was set by the study.", "the same pairs", "that the finding is of"
    else:
        share = f"{depth:.0%} of the depth; the paper: {PAPER}"
        chosen = f"Layer {layer} has the largest effect on {n} pairs ({share})."
        where, of = "the other held-out pairs", "that the layer was chosen on"
    effects = swept.effects()
    own = effects[effects["vector"] == "vector"]
    excluding = int((own["effect_low"] > 0).sum())
    return Section(
        OF_FINDING[finding.status],
        f"{chosen}\nOn {where}, {finding.words}\nThe interval excludes zero from above at {excluding} of {len(own)} layers swept.",
        {"effects_by_layer": effects},
        {"effects_by_layer": swept.plot("layer") if len(own) > 1 else swept.plot("multiplier")},
        notes=(
            f"The figure shows the {n} pairs {of}, at multipliers -1 and +1.",
            "Bands are 95% bootstrap intervals over pairs; controls have the vector's norm at each layer.",
        ),
    )


def by_multiplier(lab: Lab, behaviour: str) -> Section:
    """Scores by multiplier at the chosen layer, without a system prompt and under a positive and a negative one."""
    dose = lab.dose(behaviour)
    found = {name: result.finding() for name, result in dose.by_system().items()}
    alone = found["none"]
    lines = [f"System prompt {name!r}: {finding.words}" for name, finding in found.items()]
    lines.append(_shape(dose.by_system()["none"]))
    tables = {"scores_by_multiplier": dose.to_pandas(), "effects_by_system_prompt": dose.effects()}
    if lab.study.published_score and behaviour.startswith("ab/"):
        tables["published_score"] = _published_score(lab, behaviour)
    return Section(
        OF_FINDING[alone.status],
        "\n".join(lines),
        tables,
        {"scores_by_multiplier": dose.plot("multiplier")},
        notes=(f"{dose.items['item'].nunique()} held-out pairs; the status is of the vector alone.",),
    )


def _shape(result: SweepResult) -> str:
    """Whether the score rises with every step of the multiplier."""
    table = result.to_pandas()
    own: pd.Series[float] = table[table["vector"] == "vector"].sort_values("multiplier")["value"]
    rises = own.is_monotonic_increasing
    values = ", ".join(f"{value:.3g}" for value in own)
    return f"Alone, the mean score {'rises' if rises else 'does not rise'} with every step of the multiplier: {values}."


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
