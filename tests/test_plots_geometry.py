"""Figures show the numbers they are given, on the axis they are given, with tokens as they are."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_geometry import planted, vector_sets  # noqa: F401

import caa_lens as caa
from caa_lens.plots_geometry import plot_lens


@pytest.fixture
def ax():
    return Figure().subplots()


def drawn(figure):
    """The figure with everything laid out; text that cannot be drawn fails here."""
    figure.canvas.draw()
    return figure


def test_patches_and_lenses_are_drawn_as_they_are(model, pairs, ax):
    result = caa.patch(model, "positive", pairs[0], progress=False)
    drawn(result.plot(ax=ax))
    np.testing.assert_allclose(ax.images[0].get_array(), result.normalized, rtol=1e-6)
    by_vector = caa.patch(model, caa.extract(model, pairs, progress=False), pairs[0], progress=False)
    assert "logits" in by_vector.plot().axes[1].get_ylabel()
    lens = caa.logit_lens(model, "Hi?", positions=slice(-4, None), top=1)
    figure = drawn(lens.plot())
    words = [t.get_text() for t in figure.axes[0].texts]
    assert len(words) == 3 * 4
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), lens.top_probabilities[..., 0])


def test_long_words_of_a_lens_are_cut(ax):
    plot_lens(torch.tensor([[0.9]]), [["incomprehensibleness"]], [0], ["x"], ax=ax)
    assert [t.get_text() for t in ax.texts] == ["incomprehensibl\N{HORIZONTAL ELLIPSIS}"]


def test_cosines_are_drawn_in_blocks(vector_sets, ax):  # noqa: F811
    found = caa.similarity(vector_sets)
    drawn(found.plot(ax=ax))
    assert ax.images[0].get_clim() == (-1, 1)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "base"]
    one = drawn(caa.similarity({"a": vector_sets["a"]}).plot())
    assert [t.get_text() for t in one.axes[0].get_xticklabels()] == ["0", "1", "2"]


def test_components_of_one_layer_or_all(ax):
    found = caa.pca(planted(20, 0, shift=1.0, layers=8))
    drawn(found.plot(layer=3, ax=ax))
    np.testing.assert_allclose(ax.collections[0].get_offsets(), found.positive[3, :, :2])
    assert f"{float(found.explained[3, 1]):.0%} of variance" in ax.get_ylabel()
    figure = drawn(found.plot())
    assert len(figure.axes) == 8
    (legend,) = figure.legends
    assert not any(legend.get_window_extent().overlaps(text.get_window_extent()) for text in figure.texts)
    with pytest.raises(caa.InputError, match="an axis holds one layer"):
        found.plot(ax=ax)
    with pytest.raises(caa.InputError, match="layer 9 is not in this PCA"):
        found.plot(layer=9)
    with pytest.raises(caa.InputError, match="needs two components"):
        caa.pca(planted(20, 0, shift=1.0), n_components=1).plot()


def test_separability_and_norms_are_drawn_with_their_ranges(vector_sets, ax):  # noqa: F811
    found = caa.separability(planted(30, 0, shift=0.3), planted(30, 1, shift=0.3))
    drawn(found.plot(ax=ax))
    line = next(line for line in ax.lines if len(line.get_ydata()) == 2 and line.get_marker() == "o")
    np.testing.assert_allclose(line.get_ydata(), found.auroc)
    assert len(ax.collections) == 2  # the interval and the shuffled fits
    figure = drawn(caa.norms(vector_sets).plot())
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()][1:] == ["a", "b", "base"]
