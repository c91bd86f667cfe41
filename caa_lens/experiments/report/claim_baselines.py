"""Claim 4: the vector beside and on top of system prompts, few-shot examples, and fine-tuning on the same pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from caa_lens.experiments.baselines import SIDES, Side, additivity, prompting
from caa_lens.experiments.effects import Finding
from caa_lens.experiments.finetuning import finetune
from caa_lens.experiments.report.claim_effects import summed, unprompted
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.section import NotRun, Section
from caa_lens.experiments.report.status import PLACES, Status, capped, of_interval, reservation, together, written
from caa_lens.experiments.result import SweepResult
from caa_lens.experiments.statistics import paired_change
from caa_lens.experiments.sweep import score
from caa_lens.experiments.tuned import FinetuneResult
from caa_lens.models import Model
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
    added, beside = additivity(result), unprompted(lab, behaviour)
    status, words = by_way(own, beside.finding())
    tables = {
        "scores": result.to_pandas(),
        "effects": effects,
        "effects_beside_controls": beside.effects(),
        "additivity": added.to_pandas(),
    }
    return Section(status, f"{words}\n{summed(added)}", tables, {"additivity": added.plot()})


def by_way(effects: pd.DataFrame, finding: Finding) -> tuple[Status, str]:
    """Whether a vector works under every way of prompting, in a word and in words.

    Args:
        effects: rows of `SweepResult.effects`, one a way.
        finding: of the vector without a system prompt, beside its controls.
    """
    places = [of_interval(row.effect_low, row.effect_high) for row in effects.itertuples()]
    said = "; ".join(
        f"{row['system']}: {written(row)}, {PLACES[place]}"
        for row, place in zip(effects.to_dict("records"), places, strict=True)
    )
    words = f"Effect of the vector per unit of multiplier under each way of prompting, in nats: {said}."
    return together(capped(place, finding) for place in places), f"{words}\n{reservation(finding)}"


def fine_tuning(lab: Lab) -> Section:
    """Fine-tuning in either direction on the same pairs: its effect, the vector on top of it, and its cost."""
    study = lab.study
    if not study.finetune:
        raise NotRun("the study fine-tunes on no behaviour (finetune: [...])")
    rows: list[dict[str, object]] = []
    found: list[dict[str, Any]] = []
    times: list[dict[str, object]] = []
    figures = {}
    for behaviour in study.finetune:
        v = lab.vector(behaviour)
        base = _scored(lab, behaviour, "base", lab.model, v)
        rows += _rows(behaviour, "base", base)
        for side in SIDES:
            tuned = on_main(lambda b=behaviour, s=side: _tuned(lab, b, s))  # type: ignore[misc]
            model = lab.load(tuned.path)
            result = _scored(lab, behaviour, side, model, v.retarget(tuned.path.name))
            del model
            rows += _rows(behaviour, f"tuned {side}", result)
            change = paired_change(_at(base, 0.0), _at(result, 0.0), seed=study.seed)
            effect = result.effects().iloc[0]
            about = {"behaviour": behaviour, "side": side, "method": tuned.method}
            times.append({"behaviour": behaviour, "side": side, "seconds": tuned.seconds})
            sizes = {"trainable": tuned.trainable_parameters, "parameters": tuned.parameters}
            changes = {"change": change.value, "change_low": change.low, "change_high": change.high}
            on_top = {name: effect[name] for name in ("effect", "effect_low", "effect_high")}
            found.append(about | sizes | _accuracies(tuned) | changes | on_top)
            figures[f"training_{behaviour.replace('/', '_')}_{side}"] = tuned.plot()
    results = {behaviour: unprompted(lab, behaviour) for behaviour in study.finetune}
    status, words = on_all_tuned(found, {behaviour: result.finding() for behaviour, result in results.items()})
    beside = pd.concat([result.effects().assign(behaviour=behaviour) for behaviour, result in results.items()])
    tables = {
        "fine_tuning": pd.DataFrame(found),
        # A table of its own, for seconds are the only numbers here that differ from run to run.
        "training_time": pd.DataFrame(times),
        "effects_beside_controls": beside,
        "scores": pd.DataFrame(rows),
    }
    notes = ("The vector is the base model's, used on the tuned one.",)
    return Section(status, words, tables, figures, notes=notes)


def on_all_tuned(rows: Sequence[Mapping[str, Any]], findings: Mapping[str, Finding]) -> tuple[Status, str]:
    """What all fine-tunings show together: the rows of `on_tuned`, and each behaviour's vector on the model as it was."""
    lines: list[str] = []
    statuses: list[Status] = []
    for behaviour, finding in findings.items():
        for row in rows:
            if row["behaviour"] == behaviour:
                status, words = on_tuned(row, finding)
                statuses.append(status)
                lines.append(words)
        lines.append(reservation(finding))
    return together(statuses), "\n".join(lines)


def on_tuned(row: Mapping[str, Any], finding: Finding) -> tuple[Status, str]:
    """What one fine-tuning shows, in a word and in words: whether it moved the held-out score its way, and the vector on top of it.

    Args:
        row: of the table `fine_tuning`; `change` is of the score, which tuning towards the negative side should lower, and `effect`
            the vector's.
        finding: of the vector on the model as it was, beside its controls.
    """
    ends = row["change_low"], row["change_high"]
    moved = of_interval(*ends) if row["side"] == "positive" else of_interval(-ends[1], -ends[0])
    on_top = of_interval(row["effect_low"], row["effect_high"])
    way = {"holds": "moves its way", "null": "is not shown to move", "opposite": "moves the other way"}[moved]
    shown = capped(on_top, finding)
    before, after = (f"{row[f'held_out_accuracy_{when}']:.0%} of pairs {when}" for when in ("before", "after"))
    return shown if moved == "holds" else together([moved, shown]), (
        f"{row['behaviour']}, tuned towards the {row['side']} side ({row['method']}, {row['trainable']:,} of "
        f"{row['parameters']:,} parameters): the held-out score {way}, by {written(row, 'change')} "
        f"(that side is the likelier one in {before}, {after}); "
        f"on top of it the vector has an effect of {written(row)} nats per unit of multiplier, {PLACES[on_top]}."
    )


def _accuracies(tuned: FinetuneResult) -> dict[str, float]:
    """Shares of pairs whose asked-for completion is the likelier one."""
    sets = {"train": tuned.train_accuracy, "held_out": tuned.held_out_accuracy}
    both = {name: accuracy._asdict() for name, accuracy in sets.items() if accuracy is not None}
    return {f"{name}_accuracy_{when}": share for name, each in both.items() for when, share in each.items()}


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
