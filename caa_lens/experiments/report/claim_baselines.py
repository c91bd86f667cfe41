"""Claim 4: the vector beside and on top of system prompts, few-shot examples, and fine-tuning on the same pairs."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float

from caa_lens.experiments.baselines import SIDES, AdditivityResult, Side, additivity, prompting
from caa_lens.experiments.finetuning import finetune
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.section import NotRun, Section, Status, together
from caa_lens.experiments.result import SweepResult
from caa_lens.experiments.statistics import paired_change
from caa_lens.experiments.sweep import score
from caa_lens.experiments.tuned import FinetuneResult
from caa_lens.models import Model, load_model
from caa_lens.vector import SteeringVector
from caa_lens.workers import alone, on_main


def prompting_baselines(lab: Lab, behaviour: str) -> Section:
    """Each way of prompting alone, the vector alone, both, and how far both are from their sum."""
    pairs, study = lab.pairs(behaviour), lab.study
    ways = prompting(lab.model, pairs.train, pairs.report, k=study.examples, seed=study.seed)
    result = lab.sweep(
        "prompting", behaviour, lab.vector(behaviour), pairs.report, multipliers=(-1, 0, 1), systems=ways
    )
    effects = result.effects()
    own = effects[effects["vector"] == "vector"]
    shown = own["effect_low"] > 0
    status: Status = "holds" if shown.all() else "mixed" if shown.any() else "null"
    by_way = "; ".join(
        f"{row.system}: {row.effect:+.3f} [{row.effect_low:+.3f}, {row.effect_high:+.3f}]" for row in own.itertuples()
    )
    added = additivity(result)
    words = (
        f"Effect of the vector per unit of multiplier under each way of prompting, in nats: {by_way}.\n{_summed(added)}"
    )
    tables = {"scores": result.to_pandas(), "effects": effects, "additivity": added.to_pandas()}
    notes = (
        "The status asks whether the vector's effect is above zero under every way of prompting; controls stand in claim 2.",
    )
    return Section(status, words, tables, {"additivity": added.plot()}, notes=notes)


def _summed(added: AdditivityResult) -> str:
    """How many combinations of a way of prompting and a multiplier add up, in the metric's own unit; the table has each."""
    table = added.to_pandas()
    own = table[(table["vector"] == "vector") & (table["measure"] == "value")]
    sums = own[(own["interaction_low"] <= 0) & (own["interaction_high"] >= 0)]
    largest = own.loc[own["interaction"].abs().idxmax()]
    return (
        f"Prompt and vector add up, within the interval, in {len(sums)} of {len(own)} combinations; the largest interaction is "
        f"{largest['interaction']:+.3f} [{largest['interaction_low']:+.3f}, {largest['interaction_high']:+.3f}] "
        f"{added.metric.unit}, of {largest['system']!r} with multiplier {largest['multiplier']:+g}."
    )


def fine_tuning(lab: Lab) -> Section:
    """Fine-tuning in either direction on the same pairs: its effect, the vector on top of it, and its cost."""
    study = lab.study
    if not study.finetune:
        raise NotRun("the study fine-tunes on no behaviour (finetune: [...])")
    rows: list[dict[str, object]] = []
    lines: list[str] = []
    statuses: list[Status] = []
    figures = {}
    for behaviour in study.finetune:
        v = lab.vector(behaviour)
        base = _scored(lab, behaviour, "base", lab.model, v)
        rows += _rows(behaviour, "base", base)
        for side in SIDES:
            tuned = on_main(lambda b=behaviour, s=side: _tuned(lab, b, s))  # type: ignore[misc]
            model = load_model(tuned.path, kind=study.kind, dtype=study.dtype, device=study.device)  # type: ignore[arg-type]
            result = _scored(lab, behaviour, side, model, v.retarget(tuned.path.name))
            del model
            rows += _rows(behaviour, f"tuned {side}", result)
            change = paired_change(_at(base, 0.0), _at(result, 0.0), seed=study.seed)
            moved = change.low > 0 if side == "positive" else change.high < 0
            on_top = result.effects().iloc[0]
            statuses.append("holds" if moved and on_top["effect_low"] > 0 else "mixed" if moved else "null")
            lines.append(
                f"{behaviour}, tuned towards the {side} side ({tuned.method}, {tuned.trainable_parameters:,} of "
                f"{tuned.parameters:,} parameters): the held-out score changes by {change.value:+.3f} [{change.low:+.3f}, "
                f"{change.high:+.3f}]; on top of it the vector has an effect of {on_top['effect']:+.3f} "
                f"[{on_top['effect_low']:+.3f}, {on_top['effect_high']:+.3f}] nats per unit of multiplier."
            )
            figures[f"training_{behaviour.replace('/', '_')}_{side}"] = tuned.plot()
    notes = (
        "The vector is the base model's, used on the tuned one. The claim holds where tuning moves the score its way and "
        "the vector works on top of it.",
    )
    return Section(together(statuses), "\n".join(lines), {"fine_tuning": pd.DataFrame(rows)}, figures, notes=notes)


def _tuned(lab: Lab, behaviour: str, side: Side) -> FinetuneResult:
    """The study's model, tuned on a behaviour's training pairs by one process for all."""
    study, pairs = lab.study, lab.pairs(behaviour)
    with alone():
        return finetune(
            study.model,
            pairs.train,
            folder=lab.work("fine-tuned", behaviour, side),
            side=side,
            method=study.method,  # type: ignore[arg-type]
            held_out=pairs.report,
            epochs=study.epochs,
            seed=study.seed,
            dtype=study.dtype,
            device=study.device,
            progress=lab.progress,
        )


def _scored(lab: Lab, behaviour: str, name: str, model: Model, v: SteeringVector) -> SweepResult:
    return score(
        model,
        lab.pairs(behaviour).report,
        v,
        batch_size=lab.study.batch_size,
        seed=lab.study.seed,
        store=lab.work("on-fine-tuned", behaviour, name),
        progress=lab.progress,
    )


def _rows(behaviour: str, model: str, result: SweepResult) -> list[dict[str, object]]:
    table = result.to_pandas()[["multiplier", "value", "low", "high", "n"]]
    return [{"behaviour": behaviour, "model": model, **row} for row in table.to_dict("records")]


def _at(result: SweepResult, multiplier: float) -> Float[np.ndarray, " item"]:
    items = result.items
    return items[items["multiplier"] == multiplier].sort_values("item")["value"].to_numpy(float)
