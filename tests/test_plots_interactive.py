"""Interactive figures hold the tables' numbers, say them where the mouse is, and show every token as it is."""

import json
import sys
import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_geometry import planted, vector_sets  # noqa: F401
from test_plots import projection
from test_plots_sweep import VECTORS, swept
from test_token_text import long_projection

import caa_lens as caa
from caa_lens.figures import BLUE, GREY, NEGATIVE, ORANGE, POSITIVE
from caa_lens.plots import plot_projection as plot_still
from caa_lens.plots_interactive import plot_projection

NASTY = ["<script>", "<b>", " &lt;", "$x$", "%{y}\n", "", "\x1b", "incomprehensibilities"]
SHOWN = [
    "0: &lt;script&gt;",
    "1: &lt;b&gt;",
    "2: ␣&amp;lt;",
    "3: &#36;x&#36;",
    "4: %{y}↵",
    "5: ·",
    "6: \\x1b",
    "7: incomprehensibilities",
]


def in_order(figure, mode):
    """The traces of a kind as the legend lists them; the vector itself is drawn last."""
    return sorted((trace for trace in figure.data if trace.mode == mode), key=lambda trace: trace.legendrank)


def lines_of(figure):
    return in_order(figure, "lines+markers")


def bands_of(figure):
    """Of each series x and its lowest and highest end, as the polygon has them."""
    bands = in_order(figure, "lines")
    half = len(bands[0].x) // 2
    for band in bands:
        assert list(band.x[:half]) == list(band.x[half:])[::-1]
    return [np.stack([band.x[:half], band.y[half:][::-1], band.y[:half]], axis=1) for band in bands]


def filled(trace, row, column):
    """What the mouse is told over a cell or bar, as the template says; numbers as they are."""
    cell = trace.customdata[row][column] if row is not None else trace.customdata[column]
    return trace.hovertemplate.replace("%{customdata}", cell).removesuffix("<extra></extra>")


def test_a_projection_at_one_layer_is_a_bar_a_token():
    values = [1.0, -2.0, 0.5, 0.1, 0.2, 0.3, -0.1, 0.0]
    figure = plot_projection(projection(values, NASTY, measure="cosine"))
    (bars,) = figure.data
    np.testing.assert_allclose(bars.y, values)
    assert list(bars.customdata) == SHOWN
    assert list(bars.x[:7]) == SHOWN[:7]
    assert bars.x[7] == "7: incomprehensib…"
    assert list(bars.marker.color) == [NEGATIVE if value < 0 else POSITIVE for value in values]
    assert filled(bars, None, 0) == "0: &lt;script&gt;<br>cosine of x and v: %{y:,.4~r}"
    assert figure.layout.title.text == "v, layers (14,)"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("token", "cosine of x and v")
    assert figure.layout.yaxis.range is None
    assert figure.layout.xaxis.rangeslider.visible is None


def test_a_projection_at_several_layers_is_a_heat_map_of_the_still_ones_colours():
    values = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    given = projection(values.tolist(), NASTY, (3, 17))
    figure, still = plot_projection(given), plot_still(given).axes[0].images[0]
    (cells,) = figure.data
    np.testing.assert_allclose(cells.z, values)
    assert (cells.zmin, cells.zmax) == still.get_clim()
    for share, color in cells.colorscale:
        red, green, blue = (int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(","))
        np.testing.assert_allclose([red, green, blue], 255 * np.array(still.cmap(share)[:3]), atol=3)
    assert list(cells.y) == ["3", "17"]
    assert list(cells.customdata) == [SHOWN, SHOWN]
    assert filled(cells, 1, 0) == "0: &lt;script&gt;<br>layer %{y}<br>x · v: %{z:,.4~r}"
    assert cells.colorbar.title.text == "x · v"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("token", "layer")


def test_nothing_from_outside_is_markup(tmp_path):
    """Neither in the page that is written nor in what plotly takes for markup."""
    for layers in ((14,), (14, 15)):
        values = torch.ones(len(layers), len(NASTY)).squeeze(0)
        given = projection(values.tolist(), NASTY, layers)
        given.title = "<i>v</i> <script>alert('x')</script>"
        figure = plot_projection(given)
        text = json.dumps(json.loads(figure.to_json())["data"], ensure_ascii=False)
        assert not any(mark in text for mark in ("<script", "<b>", "$x$", "\x1b"))
        assert figure.layout.title.text == "&lt;i&gt;v&lt;/i&gt; &lt;script&gt;alert('x')&lt;/script&gt;"
        figure.write_html(tmp_path / "page.html", include_plotlyjs=False)
        assert "<script>alert" not in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("n_layers", [1, 30])
def test_a_long_text_is_scrolled_and_quick(n_layers):
    given = long_projection(n_layers)
    began = time.process_time()
    figure = given.plot(interactive=True)
    size = len(figure.to_json())
    assert time.process_time() - began < 5
    assert size < 5_000_000
    xaxis = figure.layout.xaxis
    assert xaxis.rangeslider.visible
    assert xaxis.range == (-0.5, 59.5)
    assert (xaxis.minallowed, xaxis.maxallowed) == (-0.5, 3999.5)
    assert len(set(figure.data[0].x)) == 4000  # equal tokens are told apart by their place
    assert "beyond the scale" in figure.layout.title.text


def test_a_token_that_looks_like_its_place_is_shown():
    (bars,) = plot_projection(projection([1.0, 2.0], ["0", "1"])).data
    assert list(bars.customdata) == list(bars.x) == ["0: 0", "1: 1"]


def test_effects_by_layer_are_those_of_the_table():
    result = swept()
    figure, effects = result.plot(interactive=True), result.effects()
    for line, name in zip(lines_of(figure), VECTORS, strict=True):
        of = effects[effects["vector"] == name]
        np.testing.assert_allclose(np.stack([line.x, line.y], axis=1), of[["layer", "effect"]])
        assert [row[0] for row in line.customdata] == [name] * 3
        intervals = [row[1:] for row in line.customdata]
        np.testing.assert_allclose(intervals, of[["effect_low", "effect_high", "n"]])
    own = effects[effects["vector"] == "vector"]
    bands = bands_of(figure)
    np.testing.assert_allclose(bands[0], own[["layer", "effect_low", "effect_high"]])
    random = effects[effects["vector"].str.startswith("random")].groupby("layer")
    np.testing.assert_allclose(bands[1][:, 1:], np.stack([random["effect_low"].min(), random["effect_high"].max()], 1))
    assert [line.name for line in lines_of(figure) if line.showlegend] == ["vector", "random (2)", "letter"]
    assert [trace.name for trace in figure.data[-2:]] == ["vector", "vector"]  # on top
    assert [line.line.color for line in lines_of(figure)] == [BLUE, GREY, GREY, ORANGE]
    assert "nats per token per unit of multiplier" in figure.layout.yaxis.title.text
    assert figure.layout.xaxis.title.text == "layer"
    assert figure.layout.annotations[0].text == "planted, n = 12"
    assert "[%{customdata[1]:,.4~r}, %{customdata[2]:,.4~r}], n = %{customdata[3]}" in lines_of(figure)[0].hovertemplate


@pytest.mark.parametrize("metric", ["letter", "logprob"])
def test_scores_by_multiplier_are_those_of_the_table_at_the_best_layer(metric):
    result = swept(metric)
    figure, table = result.plot("multiplier", interactive=True), result.to_pandas()
    at_best = table[table["layer"] == 4]
    for line, name in zip(lines_of(figure), VECTORS, strict=True):
        of = at_best[at_best["vector"] == name]
        np.testing.assert_allclose(np.stack([line.x, line.y], axis=1), of[["multiplier", "value"]])
    own = at_best[at_best["vector"] == "vector"]
    np.testing.assert_allclose(bands_of(figure)[0], own[["multiplier", "low", "high"]])
    assert result.metric.unit in figure.layout.yaxis.title.text
    title = figure.layout.annotations[0].text
    assert "layer 4, n = 12" in title
    assert ("letters together: 0.70 to 0.90" in title) == (metric == "letter")


def test_a_single_setting_has_its_interval_too():
    result = swept(layers=(4,), multipliers=(0,), vectors={"none": 0.0})
    figure, row = result.plot(interactive=True), result.to_pandas().iloc[0]
    np.testing.assert_allclose(bands_of(figure)[0], [[0, row["low"], row["high"]]])
    assert figure.data[0].line.width > 0


def test_each_system_prompt_has_a_panel_and_names_are_escaped():
    result = swept(systems=("none", "<b>polite"), vectors={"vector": 1.0, "<i>other": 0.2})
    figure = result.plot(interactive=True)
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [
        "system prompt: none<br>planted, n = 12",
        "system prompt: &lt;b&gt;polite<br>planted, n = 12",
    ]
    assert [line.name for line in lines_of(figure) if line.showlegend] == ["vector", "&lt;i&gt;other"]
    assert {trace.xaxis for trace in figure.data} == {"x", "x2"}
    assert figure.layout.yaxis2.matches == "y"
    assert lines_of(figure)[-1].customdata[0][0] == "&lt;i&gt;other"


def test_what_a_sweep_cannot_show_is_refused_alike():
    with pytest.raises(caa.MissingError, match="layer 5 was not swept"):
        swept().plot(layer=5, interactive=True)
    with pytest.raises(caa.InputError, match="at least two multipliers"):
        swept(multipliers=(1,)).plot(interactive=True)


def test_patches_are_their_table(model, pairs, vectors):
    result = caa.patch(model, "positive", pairs, positions=[-1, "prefix"], progress=False)
    figure, table = result.plot(interactive=True), result.to_pandas()
    (cells,) = figure.data
    np.testing.assert_allclose(cells.z.flatten(), table["normalized"], rtol=1e-6)
    assert cells.zmax == -cells.zmin == pytest.approx(table["normalized"].abs().max())
    assert list(cells.x) == ["-1", "prefix"]
    row = table.iloc[3]
    expected = f"prefix<br>layer 1<br>effect: {row['effect']:.4g} logits, standard error {row['se']:.2g} (5 pairs)"
    assert filled(cells, 1, 1) == f"{expected}<br>effect (0 = target, 1 = source): %{{z:,.4~r}}"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("position patched", "layer")
    one = caa.patch(model, vectors, pairs[0], progress=False)
    (cells,) = one.plot(interactive=True).data
    np.testing.assert_allclose(cells.z, one.effect)
    assert cells.colorbar.title.text == "effect on the logit difference (logits)"
    assert filled(cells, 0, 0) == f"0: &lt;|im_start|&gt;<br>layer 0<br>effect: {float(one.effect[0, 0]):.4g} logits"


def test_a_lens_tells_all_tokens_that_were_kept(model):
    lens = caa.logit_lens(model, "Hi?", positions=slice(-4, None), top=3)
    (cells,) = lens.plot(interactive=True).data
    np.testing.assert_allclose(cells.z, lens.top_probabilities[..., 0])
    assert (cells.zmin, cells.zmax) == (0, 1)
    told = filled(cells, 2, 1).split("<br>")
    assert told[0].startswith(f"{lens.positions[1]}: ")
    assert told[1] == "layer 2"
    assert [line.split(" ")[0] for line in told[2:]] == [f"{p:.3f}" for p in lens.top_probabilities[2, 1].tolist()]
    assert np.shape(cells.text) == (3, 4)


def test_cosines_are_square_and_named(vector_sets):  # noqa: F811
    found = caa.similarity(vector_sets)
    figure = found.plot(interactive=True)
    (cells,) = figure.data
    np.testing.assert_allclose(cells.z, found.values)
    assert list(cells.x) == list(cells.y) == [f"{name}, {layer}" for name in ("a", "b", "base") for layer in range(3)]
    assert (cells.zmin, cells.zmax) == (-1, 1)
    borders = [(line.x0, line.y0) for line in figure.layout.shapes]
    assert borders == [(0, 2.5), (2.5, 0), (0, 5.5), (5.5, 0)]
    assert figure.layout.yaxis.scaleanchor == "x"


def test_components_of_one_layer_or_of_all_with_a_slider():
    found = caa.pca(planted(20, 0, shift=1.0, layers=4))
    one = found.plot(layer=3, interactive=True)
    for trace, side in zip(one.data, ("positive", "negative"), strict=True):
        np.testing.assert_allclose(np.stack([trace.x, trace.y], axis=1), getattr(found, side)[3], rtol=1e-6)
        assert list(trace.customdata) == list(range(20))
        assert trace.name == side
    assert one.layout.xaxis.title.text == f"PC1 ({float(found.explained[3, 0]):.0%} of variance)"
    assert one.layout.sliders == ()
    figure = found.plot(interactive=True)
    (slider,) = figure.layout.sliders
    assert [step.label for step in slider.steps] == ["0", "1", "2", "3"]
    seen, named = slider.steps[2].args
    assert seen["visible"] == [False, False, False, False, True, True, False, False]
    assert named["title.text"].startswith("layer 2: ")
    assert [trace.visible for trace in figure.data] == list(slider.steps[slider.active].args[0]["visible"])
    assert figure.layout.title.text == slider.steps[slider.active].args[1]["title.text"]
    with pytest.raises(caa.InputError, match="layer 9 is not in this PCA"):
        found.plot(layer=9, interactive=True)


def test_an_axis_is_refused_and_plotlys_absence_says_what_to_install(monkeypatch):
    with pytest.raises(caa.InputError, match="not drawn on a matplotlib axis"):
        swept().plot(ax=Figure().subplots(), interactive=True)
    for name in ("plotly", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "caa_lens.plots_interactive")
    monkeypatch.delattr(caa, "plots_interactive")
    with pytest.raises(
        caa.InputError, match=r"interactive plots need plotly; install it with pip install 'caa-lens\[plot\]'"
    ):
        swept().plot(interactive=True)
    swept().plot()  # the still figure needs none
