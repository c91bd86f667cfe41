"""Figures show what the tables say, where they are asked to, and exactly once in a notebook."""

import subprocess
import sys
import textwrap
import time
import xml.etree.ElementTree as xml
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import caa_lens as caa
from caa_lens.figures import NEGATIVE, POSITIVE, visible
from caa_lens.plots import plot_heatmap, plot_learning_curve, plot_projection


@pytest.fixture
def ax():
    return Figure(layout="constrained").subplots()


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No figure is registered with pyplot, no style outlives the drawing, all text is inside the picture."""
    before = dict(matplotlib.rcParams)
    yield
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def assert_whole(figure):
    """Laid out, nothing reaches over the figure's edge."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    assert min(drawn.x0, drawn.y0) > -0.01
    assert drawn.x1 < width + 0.01
    assert drawn.y1 < height + 0.01


def test_a_heat_map_is_its_table_with_zero_in_the_middle():
    values = torch.tensor([[0.5, -0.2, float("nan")], [-2.0, 0.1, 0.3]])
    names = {"row_name": "layer", "column_name": "position", "unit": "effect (logits)"}
    figure = plot_heatmap(values, [3, 4], [" a", "\n", "$x^$"], title="patch", **names)
    assert_whole(figure)
    ax, bar = figure.axes
    image = ax.images[0]
    np.testing.assert_allclose(image.get_array().filled(np.nan), values)
    assert image.get_clim() == (-2, 2)
    assert image.origin == "lower"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["\u2423a", "\u21b5", "$x^$"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["3", "4"]
    assert (ax.get_ylabel(), ax.get_xlabel(), bar.get_ylabel(), ax.get_title()) == (
        "layer",
        "position",
        "effect (logits)",
        "patch",
    )
    assert plot_heatmap(values, [3, 4], [0, 1, 2], limit=1.0, **names).axes[0].images[0].get_clim() == (-1, 1)
    assert plot_heatmap(values, [3, 4], [0, 1, 2], centred=False, **names).axes[0].images[0].get_clim() == (-2, 0.5)
    assert plot_heatmap(0 * values, [3, 4], [0, 1, 2], **names).axes[0].images[0].get_clim() == (-1, 1)
    long = {**names, "unit": "effect (0 = target, 1 = source)"}
    assert_whole(plot_heatmap(values, [3, 4], ["<|im_start|>", " capital", " of"], **long))
    with pytest.raises(caa.InputError, match="3 row and 3 column labels do not fit values of shape"):
        plot_heatmap(values, [1, 2, 3], [0, 1, 2], **names)
    with pytest.raises(caa.InputError, match="limit=0 must be above 0"):
        plot_heatmap(values, [3, 4], [0, 1, 2], limit=0, **names)


def projection(values, tokens, layers=(14,), measure="dot"):
    return SimpleNamespace(
        values=torch.tensor(values), tokens=tokens, layers=layers, measure=measure, title=f"v, layers {layers}"
    )


def heights(ax):
    """Of the bars, left to right, each centred at its token."""
    corners = np.stack([path.vertices[:4] for path in ax.collections[0].get_paths()])
    np.testing.assert_allclose(corners[:, [0, 3], 1], 0)
    np.testing.assert_allclose(corners[:, :, 0].mean(1), np.arange(len(corners)))
    np.testing.assert_array_equal(corners[:, 1, 1], corners[:, 2, 1])
    return corners[:, 1, 1].tolist()


def test_a_projection_at_one_layer_is_a_bar_a_token():
    figure = plot_projection(projection([1.0, -2.0, 0.5], ["Hi", " <script>", "\n"], measure="cosine"))
    assert_whole(figure)
    (ax,) = figure.axes
    assert heights(ax) == [1.0, -2.0, 0.5]
    colors = [to_hex(color).upper() for color in ax.collections[0].get_facecolors()]
    assert colors == [POSITIVE, NEGATIVE, POSITIVE]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["Hi", "\u2423<script>", "\u21b5"]
    assert ax.get_ylabel() == "cosine of x and v"
    assert ax.get_title() == "v, layers (14,)"


def test_a_projection_at_several_layers_is_a_heat_map():
    values = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]
    figure = plot_projection(projection(values, ["a", "b", "c"], (3, 7)))
    assert_whole(figure)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), values)
    assert figure.axes[0].images[0].get_clim() == (-3, 3)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["3", "7"]


def test_tokens_that_dwarf_the_others_do_not_set_the_scale():
    values = [-90.0, *np.linspace(-2, 1, 59)]
    (ax,) = plot_projection(projection(values, ["t"] * 60)).axes
    low, high = ax.get_ylim()
    assert 2 < high == -low <= 3
    assert "up to -90" in ax.get_title()
    assert heights(ax)[0] == -90
    ax, _ = plot_projection(projection([values] * 2, ["t"] * 60, (1, 2))).axes
    low, high = ax.images[0].get_clim()
    assert 2 < high == -low <= 3
    assert ax.images[0].colorbar.extend == "both"
    assert "beyond" not in plot_projection(projection(values[1:], ["t"] * 59)).axes[0].get_title()


@pytest.mark.parametrize("n", [1, 60, 61, 4000])
def test_at_most_sixty_tokens_are_named_each_at_its_place(n):
    tokens = [f" t{i}" for i in range(n)]
    for values in (np.ones(n), np.ones((2, n))):
        figure = plot_projection(projection(values.tolist(), tokens, (1, 2)[: values.ndim]))
        ticks = figure.axes[0].xaxis.get_major_ticks()
        assert n / 2 - 1 < len(ticks) <= 60 or (n > 120 and 30 <= len(ticks) <= 60)
        for tick in ticks:
            place = round(tick.get_loc())
            assert tick.label1.get_text() == (f"\u2423t{place}" if n <= 60 else f"{place} \u2423t{place}")


def test_bars_start_at_zero_and_fill_the_axis():
    (ax,) = plot_projection(projection([1.0, 3.0, 2.0], ["a", "b", "c"])).axes
    low, high = ax.get_ylim()
    assert low == 0
    assert 3 < high < 3.5
    assert ax.get_xlim() == pytest.approx((-0.425 - 0.0285, 2.425 + 0.0285))


@pytest.mark.parametrize("layers", [(14,), range(30)], ids=["bars", "heat map"])
def test_a_text_of_4000_tokens_is_drawn_at_once(layers):
    """A few artists, however many tokens; and a bar narrower than a pixel is seen."""
    values = torch.full((len(layers), 4000), 0.1).squeeze(0)
    values[..., 1234] = -1.0
    began = time.process_time()
    figure = plot_projection(projection(values.tolist(), [f" t{i}" for i in range(4000)], layers))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert time.process_time() - began < 3  # 0.4 and 0.9 s; a rectangle a token takes 5 s
    ax = figure.axes[0]
    assert len(ax.collections) + len(ax.images) + len(ax.patches) == 1
    assert len(ax.get_xticklabels()) <= 60
    if len(layers) > 1:
        return
    assert heights(ax) == pytest.approx(values.tolist())
    left, _, right, _ = ax.get_window_extent().extents.round().astype(int)
    pixels = np.asarray(canvas.buffer_rgba())[:, left:right, :3].astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 20).sum(0)
    assert blue.argmax() == pytest.approx((1234.5 + 40) / 4080 * (right - left), abs=4)


def test_tokens_are_made_visible_whatever_they_hold():
    assert visible(" a\tb\n") == "\u2423a\u21e5b\u21b5"
    assert visible("\x00") == "\\x00"
    assert visible("\u4e2d") == "\\u4e2d"  # the default font has no such glyph
    assert visible("incomprehensibilities") == "incomprehensibi\u2026"


def test_a_learning_curve_has_a_line_a_layer():
    frame = pd.DataFrame(
        {"layer": [5, 5, 5, 2, 2, 2], "n_pairs": [16, 4, 8] * 2, "split_half_cosine": [0.9, 0.5, 0.7, 0.6, -0.1, 0.3]}
    )
    figure = plot_learning_curve(frame)
    assert_whole(figure)
    (ax,) = figure.axes
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[4, -0.1], [8, 0.3], [16, 0.6]])
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[4, 0.5], [8, 0.7], [16, 0.9]])
    assert [line.get_label() for line in ax.lines] == ["layer 2", "layer 5"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["4", "8", "16"]
    assert ax.get_ylim()[0] <= -0.1
    with pytest.raises(caa.InputError, match="lacks n_pairs"):
        plot_learning_curve(frame.drop(columns="n_pairs"))


def test_many_layers_of_a_learning_curve_share_a_colour_bar():
    rows = [{"layer": k, "n_pairs": n, "split_half_cosine": n / 10} for k in range(9) for n in (4, 8)]
    ax, bar = plot_learning_curve(pd.DataFrame(rows)).axes
    assert bar.get_ylabel() == "layer"
    assert ax.get_legend() is None
    assert len({line.get_color() for line in ax.lines}) == 9


def assert_drawn_on_its_axis(draw):
    figure = Figure()
    left, right = figure.subfigures(1, 2)
    mine, other = left.subplots(), right.subplots()
    assert draw(mine) is figure
    assert mine.has_data()
    assert not other.has_data()


def test_every_figure_draws_on_the_axis_it_is_given_and_returns_its_figure():
    tokens = projection([1.0, -1.0], ["a", "b"])
    curve = pd.DataFrame({"layer": [1, 1], "n_pairs": [4, 8], "split_half_cosine": [0.1, 0.2]})
    names = {"row_name": "r", "column_name": "c", "unit": "u"}
    assert_drawn_on_its_axis(lambda ax: plot_heatmap(torch.eye(2), [0, 1], [0, 1], ax=ax, **names))
    assert_drawn_on_its_axis(lambda ax: plot_projection(tokens, ax=ax))
    assert_drawn_on_its_axis(lambda ax: plot_learning_curve(curve, ax=ax))


def test_figures_are_saved_as_png_and_svg(tmp_path):
    figure = plot_projection(projection([1.0, -1.0] * 12, ["a", "b"] * 12))
    figure.savefig(tmp_path / "a.png")
    figure.savefig(tmp_path / "a.svg", bbox_inches="tight")
    assert pyplot.imread(tmp_path / "a.png").shape[:2] == (280, 648)
    assert xml.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def run(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_matplotlib_is_loaded_by_the_first_plot_only_and_its_absence_says_what_to_install():
    assert run("import caa_lens, sys; print('matplotlib' in sys.modules)") == "False"
    found = run(
        """
        import sys
        sys.modules["matplotlib"] = None
        import pandas as pd, caa_lens as caa
        try:
            caa.SweepResult(pd.DataFrame(), None, {}).plot()
        except caa.InputError as error:
            print(error)
        """
    )
    assert found == "plots need matplotlib; install it with pip install 'caa-lens[plot]'."


CURVE = """
import pandas as pd
from caa_lens.plots import plot_learning_curve
frame = pd.DataFrame({"layer": [1, 1], "n_pairs": [4, 8], "split_half_cosine": [0.1, 0.2]})
"""


@pytest.mark.filterwarnings("ignore")  # of the kernel's sockets
def test_a_notebook_shows_a_figure_exactly_once_with_and_without_the_inline_backend():
    nbformat, nbclient = pytest.importorskip("nbformat.v4"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    plot, keep, pyplots = "plot_learning_curve(frame)", "figure = plot_learning_curve(frame)", "%matplotlib inline"
    cells = [nbformat.new_code_cell(cell) for cell in (CURVE, plot, keep, pyplots, plot, keep)]
    nbclient.NotebookClient(nbformat.new_notebook(cells=cells), timeout=300).execute()
    pictures = [
        "".join("P" if "image/png" in out.get("data", ()) else "-" for out in cell.outputs) for cell in cells[1:]
    ]
    assert pictures == ["P", "", "", "P", ""]
