"""Figures of sweeps show the tables' numbers and intervals, the vector beside its controls."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_plots import assert_drawn_on_its_axis, assert_whole, nothing_left_behind  # noqa: F401

import caa_lens as caa
from caa_lens.experiments.scoring import METRICS
from caa_lens.figures import BLUE, GREY
from caa_lens.plots import plot_sweep

VECTORS = {"vector": 1.0, "random-0": 0.1, "random-1": -0.2, "letter": 0.3}


def swept(metric="logprob", layers=(2, 4, 6), multipliers=(-1, 0, 1), systems=(), vectors=VECTORS):
    """A sweep with a planted effect, largest in the middle layer."""
    rng = np.random.default_rng(0)
    rows = []
    for system in systems or [None]:
        for vector, size in vectors.items():
            for layer in layers:
                slope = rng.normal(size / (1 + abs(layer - 4)), 0.1, 12)
                for multiplier in multipliers:
                    effect = slope * multiplier + np.linspace(-1, 1, 12)
                    for item, e in enumerate(effect):
                        row = {"item": item, "key": "AB"[item % 2], "vector": vector, "layer": layer}
                        row |= {"system": system} if system else {}
                        row |= {"multiplier": multiplier, "effect": e, "value": e}
                        if metric != "logprob":
                            row |= {"value": 1 / (1 + np.exp(-e)), "mass": 0.8 + 0.1 * multiplier}
                        rows.append(row)
    return caa.SweepResult(pd.DataFrame(rows), METRICS[metric](), {"pairs": "planted"})


def lines_of(ax):
    """The drawn lines with several points and a marker, in order."""
    return [line for line in ax.lines if line.get_marker() != "None"]


def band_of(collection):
    """x -> (low, high) of a filled band."""
    corners = pd.DataFrame(collection.get_paths()[0].vertices, columns=["x", "y"])
    return corners.groupby("x")["y"].agg(["min", "max"]).to_numpy()


def test_effects_by_layer_are_those_of_the_table():
    result = swept()
    figure = result.plot()
    (ax,), effects = figure.axes, result.effects()
    assert_whole(figure)
    for line, name in zip(lines_of(ax), VECTORS, strict=True):
        of = effects[effects["vector"] == name]
        np.testing.assert_allclose(line.get_xydata(), of[["layer", "effect"]])
    bands = [band_of(collection) for collection in ax.collections]
    own = effects[effects["vector"] == "vector"]
    np.testing.assert_allclose(bands[0], own[["effect_low", "effect_high"]])
    random = effects[effects["vector"].str.startswith("random")].groupby("layer")
    np.testing.assert_allclose(bands[1], np.stack([random["effect_low"].min(), random["effect_high"].max()], axis=1))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["vector", "random (2)", "letter"]
    assert [to_hex(line.get_color()).upper() for line in lines_of(ax)][:3] == [BLUE, GREY, GREY]
    assert "nats per token per unit of multiplier" in ax.get_ylabel()
    assert list(ax.get_xticks()) == [2, 4, 6]


@pytest.mark.parametrize("metric", ["letter", "logprob"])
def test_scores_by_multiplier_are_those_of_the_table_at_the_best_layer(metric):
    result = swept(metric)
    figure = result.plot("multiplier")
    (ax,), table = figure.axes, result.to_pandas()
    assert_whole(figure)
    at_best = table[table["layer"] == 4]
    for line, name in zip(lines_of(ax), VECTORS, strict=True):
        np.testing.assert_allclose(line.get_xydata(), at_best.loc[at_best["vector"] == name, ["multiplier", "value"]])
    own = at_best[at_best["vector"] == "vector"]
    np.testing.assert_allclose(band_of(ax.collections[0]), own[["low", "high"]])
    assert result.metric.unit in ax.get_ylabel()
    assert "layer 4, n = 12" in ax.get_title()
    assert ("letters together: 0.70 to 0.90" in ax.get_title()) == (metric == "letter")


def test_the_layer_of_the_scores_can_be_chosen_and_is_the_only_one_there_is():
    result = swept()
    table = result.to_pandas().query("layer == 6 and vector == 'vector'")
    np.testing.assert_allclose(lines_of(result.plot(layer=6).axes[0])[0].get_ydata(), table["value"])
    assert swept(layers=(6,)).plot().axes[0].get_xlabel() == "multiplier"


def test_a_single_setting_has_its_interval_too():
    result = swept(layers=(4,), multipliers=(0,), vectors={"none": 0.0})
    (ax,) = result.plot().axes
    row = result.to_pandas().iloc[0]
    np.testing.assert_allclose(ax.collections[0].get_segments()[0], [[0, row["low"]], [0, row["high"]]])
    np.testing.assert_allclose(lines_of(ax)[0].get_xydata(), [[0, row["value"]]])


def test_each_system_prompt_has_a_panel_of_the_same_scale():
    result = swept(systems=("none", "polite"))
    for by, x in (("layer", "layer"), ("multiplier", "multiplier")):
        figure = result.plot(by)
        assert_whole(figure)
        assert [ax.get_title().splitlines()[0] for ax in figure.axes] == [
            "system prompt: none",
            "system prompt: polite",
        ]
        assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
        assert [ax.get_xlabel() for ax in figure.axes] == [x, x]
    own = swept(systems=("polite",)).plot().axes[0]
    assert "polite" in own.get_title()
    with pytest.raises(caa.InputError, match="an axis holds one system prompt, and 2 were swept"):
        result.plot(ax=Figure().subplots())


def test_what_a_sweep_cannot_show_is_refused(unchecked):
    result = swept()
    with pytest.raises(caa.InputError, match="allowed are 'layer' and 'multiplier'"):
        plot_sweep(result, "item")
    with pytest.raises(caa.InputError, match="for one layer use by='multiplier'"):
        result.plot("layer", layer=4)
    with pytest.raises(caa.InputError, match="for one layer use by='multiplier'"):
        swept(layers=(4,)).plot("layer")
    with pytest.raises(caa.MissingError, match="layer 5 was not swept; there are 2, 4, 6"):
        result.plot(layer=5)
    with pytest.raises(caa.InputError, match="at least two multipliers"):
        swept(multipliers=(1,)).plot()


def test_a_sweep_is_drawn_on_the_axis_it_is_given():
    assert_drawn_on_its_axis(lambda ax: swept().plot(ax=ax))
    assert_drawn_on_its_axis(lambda ax: swept().plot("multiplier", ax=ax))
