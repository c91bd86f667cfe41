"""Claim 6: how the activations and the vectors lie, and whether a vector works at other layers than its own."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from caa_lens.experiments.effects import Finding
from caa_lens.experiments.report.claim_effects import unprompted
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.section import NotRun, Section
from caa_lens.experiments.report.status import PLACES, Status, capped, of_interval, reservation, together, written
from caa_lens.extraction import extract
from caa_lens.geometry import norms, pca, similarity
from caa_lens.separation import separability


def geometry(lab: Lab, behaviour: str) -> Section:
    """PCA, separability, cosines between layers, norms; and the chosen layer's vector used at other layers."""
    vectors, layer = lab.vectors(behaviour), lab.layer(behaviour)
    train = lab.activations(behaviour, "train")
    apart = separability(train, lab.held_out_activations(behaviour), seed=lab.study.seed)
    components = pca(train, layers=[layer])
    alike = similarity({behaviour: vectors})
    lengths = norms({behaviour: vectors})
    moved = _transfer(lab, behaviour)
    table = apart.to_pandas()
    at = table[table["layer"] == layer].iloc[0]
    ratio = vectors[layer].relative_norm or float("nan")
    near = [c for c in (layer - 1, layer + 1) if c in vectors.layers]  # not -1, the last
    cosine = alike.to_pandas().loc[(behaviour, layer)]
    neighbours = ", ".join(f"{float(cosine[(behaviour, c)]):.2f} to layer {c}" for c in near)
    beside = unprompted(lab, behaviour)
    status, shown = elsewhere(moved, beside.finding())
    words = (
        f"At layer {layer} the mean difference separates held-out sides with AUROC {at['auroc']:.2f} [{at['low']:.2f}, "
        f"{at['high']:.2f}]; fits to shuffled labels give {at['shuffled_low']:.2f} to {at['shuffled_high']:.2f}.\n"
        f"The first two components hold {float(components.explained[0, :2].sum()):.0%} of the variance there; the vector is "
        f"{ratio:.2f} of the residual norm; its cosine is {neighbours}.\n"
        f"{shown}"
    )
    return Section(
        status,
        words,
        {
            "separability": table,
            "transfer_to_layers": moved,
            "effects_beside_controls": beside.effects(),
            "norms": lengths.to_pandas(),
        },
        {
            "pca": components.plot(),
            "separability": apart.plot(),
            "similarity_of_layers": alike.plot(),
            "norms": lengths.plot(),
        },
        notes=("The transferred vector keeps its own length.",),
    )


def _transfer(lab: Lab, behaviour: str) -> pd.DataFrame:
    """The effect of the chosen layer's vector at every layer swept."""
    v = lab.vector(behaviour)
    layers = sorted({*lab.vectors(behaviour).layers[:: lab.study.layer_step], v.layer})
    result = lab.sweep("layer-transfer", behaviour, v, lab.pairs(behaviour).report, layers=layers, multipliers=(-1, 1))
    return result.effects().assign(own=lambda table: table["layer"] == v.layer)


def elsewhere(effects: pd.DataFrame, finding: Finding) -> tuple[Status, str]:
    """Whether a vector works at most of the layers that are not its own, in a word and in words.

    Args:
        effects: rows of `SweepResult.effects`, one a layer, with whether it is the vector's `own`.
        finding: of the vector at its own layer, beside its controls.
    """
    places = {row.layer: of_interval(row.effect_low, row.effect_high) for row in effects.itertuples() if not row.own}
    home = effects[effects["own"]].iloc[0].to_dict()
    at_home = of_interval(home["effect_low"], home["effect_high"])

    def at(place: Status) -> str:
        layers = [str(layer) for layer, found in places.items() if found == place]
        return f"{PLACES[place]} at {len(layers)}" + (f" ({', '.join(layers)})" if layers else "")

    words = (
        f"At its own layer its effect is {written(home)} nats per unit of multiplier, {PLACES[at_home]}; used at the "
        f"{len(places)} other layers tried, {at('holds')}, {at('opposite')}."
    )
    return _most(
        [capped(found, finding) for found in places.values()], capped(at_home, finding)
    ), f"{words}\n{reservation(finding)}"


def _most(elsewhere: Sequence[Status], at_home: Status) -> Status:
    """The claim is of a vector that works at home: of the other layers then, and it holds at most of them."""
    if at_home != "holds":
        return at_home
    working = sum(found == "holds" for found in elsewhere)
    if working:
        return "holds" if 2 * working > len(elsewhere) else "mixed"
    return together(elsewhere) if elsewhere else "not shown"


def between_behaviours(lab: Lab) -> Section:
    """Cosines between behaviours, and between the model's vectors and those of its base model."""
    sets = dict(lab.several(2, "the comparison of behaviours"))
    layer = lab.layer(next(iter(sets)))
    alike = similarity(sets, layers=[layer])
    table = alike.at_layer(layer)
    tables = {"cosines": table.reset_index(names="behaviour")}
    figures = {"cosines": alike.plot()}
    pairs = [(float(table.loc[a, b]), a, b) for i, a in enumerate(sets) for b in list(sets)[i + 1 :]]
    largest = max(pairs, key=lambda pair: abs(pair[0]))
    lines = [
        f"At layer {layer}, cosines between behaviours lie between {min(pairs)[0]:+.2f} and {max(pairs)[0]:+.2f}; the largest in "
        f"size is {largest[0]:+.2f}, of {largest[1]} and {largest[2]}."
    ]
    if lab.study.base is not None:
        compared = _with_base(lab)
        tables["cosines_with_base_model"] = compared
        lines.append(
            f"Between {lab.study.model} and {lab.study.base}, cosines at the same layer have a median of "
            f"{float(compared['cosine'].median()):.2f}."
        )
    return Section("described", "\n".join(lines), tables, figures)


def _with_base(lab: Lab) -> pd.DataFrame:
    """Cosine of each behaviour's vector with that of the base model, by layer."""
    study, rows = lab.study, []
    assert study.base is not None
    if study.base == study.model:
        raise NotRun("base and model are the same")
    other = lab.load(study.base)
    for behaviour in study.behaviours:
        theirs = extract(other, lab.pairs(behaviour).train, progress=lab.progress)
        both = similarity({"model": lab.vectors(behaviour), "base": theirs}).between("model", "base")
        rows += [{"behaviour": behaviour, "layer": layer, "cosine": float(both.loc[layer, layer])} for layer in theirs]
    return pd.DataFrame(rows)
