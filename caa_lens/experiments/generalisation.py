"""Does a vector work where it was not made: another behaviour, free text or multiple choice, another prompt style?

    effect[source, test, template] = mean over items of the slope of the item's effect against the multiplier
    all sources at one norm: the mean of theirs at the layer, as in `normalize_across`

The paper evaluates vectors normalised so; directions are compared, not lengths, and one set of random controls serves all of them.
Every test set is run once for all sources, templates and controls: one `sweep(others=..., systems=...)` each. An effect counts as
shown when its interval lies beyond the largest effect of any control of that source on that test. Effects in nats per token (free
text) and in nats of log-odds (letters) are not comparable with each other.

`restyle` and `as_free_text` write multiple-choice sets in other styles; split a set before, and use one part for the vector only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from caa_lens.errors import InputError
from caa_lens.experiments.effects import largest_control
from caa_lens.experiments.result import SweepResult
from caa_lens.experiments.scoring import MetricName, metric_for
from caa_lens.experiments.statistics import bracket, why_undecided
from caa_lens.experiments.sweep import sweep, write_items
from caa_lens.models import Model
from caa_lens.pairs import PairSet
from caa_lens.prompts import Template
from caa_lens.vector_set import VectorSet, normalize_across

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = {"logprob": "nats per token"}
"""Of an effect per unit of multiplier; for letters it is in nats of log-odds."""


@dataclass(frozen=True)
class TransferResult:
    """Effects of vectors of several sources on several test sets.

    Attributes:
        results: each test set's sweep, by name; its vectors are named `<source>: vector`, `<source>: <control>`, `random-<k>`.
        provenance: the layer, the common norm, and what the sources and test sets are.
    """

    results: Mapping[str, SweepResult]
    provenance: dict[str, Any]

    def effects(self) -> pd.DataFrame:
        """One row a (test, template, source, vector): the columns of `SweepResult.effects`, and `unit`. `vector` is `"vector"` or
        the name of a control; random ones have no source (`""`). Without templates there is no such column."""
        tables = []
        for test, result in self.results.items():
            table = result.effects().rename(columns={"system": "template"}).drop(columns="layer")
            names = table["vector"].str.rpartition(": ")
            table["vector"] = names[2]
            table.insert(0, "source", names[0])
            table.insert(0, "test", test)
            table["unit"] = UNITS.get(result.metric.name, "nats of log-odds")
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    def to_pandas(self) -> pd.DataFrame:
        """One row a (test, template, source): `effect` with its 95% interval, `anti_steerable`, `n`, `unit`; the `control` of
        largest effect and its `control_effect` (None without controls); whether the effect is `beyond` it, in either direction."""
        effects = self.effects()
        axes = ["test", "template"] if "template" in effects else ["test"]
        rows = []
        for place, block in effects.groupby(axes, sort=False):
            for own in block[block["vector"] == "vector"].to_dict("records"):
                # The letter-balanced vector is a variant of the vector, not a null.
                nulls = block[
                    block["source"].isin(["", own["source"]]) & ~block["vector"].isin(["vector", "letter-balanced"])
                ]
                largest = None if nulls.empty else largest_control(nulls)
                bound = 0.0 if largest is None else abs(largest["effect"])
                rows.append(
                    {
                        **dict(zip(axes, place, strict=True)),
                        "source": own["source"],
                        **{
                            name: own[name]
                            for name in ("effect", "effect_low", "effect_high", "anti_steerable", "n", "unit")
                        },
                        "control": None if largest is None else largest["vector"],
                        "control_effect": None if largest is None else float(largest["effect"]),
                        "beyond": bool(largest is not None and max(own["effect_low"], -own["effect_high"]) > bound),
                    }
                )
        return pd.DataFrame(rows)

    def verdict(self) -> str:
        """In words, a line for each source, test and template: whether the effect is beyond zero and beyond every control."""
        lines = []
        for row in self.to_pandas().to_dict("records"):
            where = f"{row['source']} on {row['test']}" + (f", template {row['template']}" if "template" in row else "")
            lines.append(
                f"{where}: effect {row['effect']:+.3f} {row['unit']} per unit of multiplier "
                f"{bracket(row['effect_low'], row['effect_high'])}, n = {row['n']}. {_judged(row)}"
            )
        return "\n".join(lines)

    def plot(self, *, ax: Axes | None = None) -> Figure:
        """A heat map of the effects, those beyond their controls marked; see `caa_lens.plots_experiments.plot_transfer`."""
        from caa_lens.plots_experiments import plot_transfer

        return plot_transfer(self, ax=ax)


def _judged(row: Mapping[str, Any]) -> str:
    if why := why_undecided(row["effect"], row["effect_low"]):
        return why
    if row["effect_low"] <= 0 <= row["effect_high"]:
        return "NULL: the interval includes zero."
    way = "" if row["effect"] > 0 else "OPPOSITE: the interval lies below zero. "
    if row["control"] is None:
        return f"{way}The interval excludes zero; no controls were run (controls=True)."
    if why := why_undecided(row["control_effect"], 0.0):
        return f"{way}{why} This is the control {row['control']!r}."
    what = f"{row['control']!r} of the same norm has an effect of {row['control_effect']:+.3f}"
    if row["beyond"]:
        return f"{way}Beyond every control: {what}, the largest."
    return f"{way}NOT SHOWN: {what}, which the interval does not exceed."


def transfer(
    model: Model,
    vectors: Mapping[str, VectorSet],
    tests: Mapping[str, PairSet],
    *,
    layer: int,
    multipliers: Sequence[float] = (-1.0, 0.0, 1.0),
    templates: Mapping[str, Template] | None = None,
    controls: bool | int = True,
    metric: MetricName | None = None,
    store: str | os.PathLike[str] | None = None,
    **options: Any,
) -> TransferResult:
    """Effects of every source's vector on every test set, under every template, at one layer and one norm.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        vectors: sets of vectors by the name of their source: a behaviour, a form of the pairs, a prompt style.
        tests: held-out pairs by name; a prompt that any of the vectors was trained on, in whatever style, is refused.
        layer: of the vectors.
        multipliers: at least two.
        templates: ways to prompt, by name; one by default, `template=` or the model's own.
        controls: a number of random directions (True: 3, False: none), and with any the label-shuffled and letter vectors that
            the sources carry.
        metric: as in `sweep`, for all tests; by default by the kind of each test's pairs.
        store: a folder with a folder for each test, as in `sweep`.
        **options: `positions`, `operator`, `strength`, `template`, `batch_size`, `seed`, `progress`, as in `sweep`.

    Raises:
        InputError: no source or no test, a single multiplier, vectors that do not fit the model or each other, and what `sweep`
            refuses, for every test before the first is run.
        MissingError: a source without this layer.

    Example:
        >>> sources = {"letters": caa.extract(model, train), "text": caa.extract(model, caa.as_free_text(train))}  # doctest: +SKIP
        >>> tests = {"letters": held_out, "text": caa.as_free_text(held_out)}  # doctest: +SKIP
        >>> caa.transfer(model, sources, tests, layer=14).plot()  # doctest: +SKIP
    """
    if not vectors or not tests:
        raise InputError(
            "transfer needs at least one set of vectors and one test set: {'name': vectors}, {'name': pairs}."
        )
    if len(set(multipliers)) < 2:
        raise InputError(f"multipliers={tuple(multipliers)}: an effect needs at least two, such as (-1, 0, 1).")
    if taken := {"layers", "others", "systems"} & set(options):
        raise InputError(f"transfer() takes no {taken.pop()}=; it has layer=, vectors= and templates= for that.")
    for name, test in tests.items():
        write_items(model, test, metric_for(test, metric), systems=templates, template=options.get("template"))
        for source, group in vectors.items():
            try:
                test.require_disjoint(group.provenance.prompt_digests)
            except InputError as error:
                raise InputError(f"vectors[{source!r}] on tests[{name!r}]: {error}") from error
    sources = {name: VectorSet([group[layer]]) for name, group in vectors.items()}
    if len(sources) > 1:
        sources = normalize_across(sources)
    n_random = 3 if controls is True else int(controls)
    first = next(iter(sources))
    others = {f"{name}: vector": group for name, group in sources.items() if name != first}
    if n_random:
        carried = [(name, kind, control) for name, group in sources.items() for kind, control in group.controls.items()]
        others |= {f"{name}: {kind}": control for name, kind, control in carried}
    bare = sources[first].map(lambda v: replace(v, controls={}))
    results = {}
    for name, test in tests.items():
        results[name] = sweep(
            model,
            bare,
            test,
            multipliers=multipliers,
            metric=metric,
            controls=n_random,
            others=others,
            systems=templates,
            store=None if store is None else Path(store) / re.sub(r"[^\w.-]+", "_", name),
            **options,
        )
    made = {
        "layer": bare.layers[0],
        "norm": bare[layer].norm,
        "sources": {name: group.provenance.expression for name, group in vectors.items()},
        "tests": {name: test.hash for name, test in tests.items()},
    }
    return TransferResult({name: _named(result, first) for name, result in results.items()}, made)


def _named(result: SweepResult, first: str) -> SweepResult:
    """The sweep with the vector in question under its source's name."""
    items = result.items.assign(vector=result.items["vector"].replace("vector", f"{first}: vector"))
    return replace(result, items=items)
