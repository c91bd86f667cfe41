"""One scale for figures, coloured text and interactive figures: centred, robust, and honest about what lies beyond."""

import numpy as np
import pytest
from test_token_text import long_projection

from caa_lens.scale import beyond, diverging_limit, largest_size


def test_the_limit_is_the_largest_size_unless_a_few_dwarf_the_others():
    assert diverging_limit([1.0, -2.5, 0.5]) == 2.5
    most = [0.1] * 98
    assert diverging_limit([*most, 0.3, 0.3]) == 0.3  # three times as large is no outlier
    assert diverging_limit([*most, 0.31, -50.0]) == pytest.approx(0.15)
    assert diverging_limit([0.1] * 90 + [-5.0] * 10) == 5.0  # a tenth of the text is no outlier
    for scale in (1e-6, 1e6):
        values = np.r_[np.linspace(-1, 1, 99), 80.0]
        assert diverging_limit(scale * values) == pytest.approx(scale * diverging_limit(values))
        assert diverging_limit(-values) == diverging_limit(values)


def test_what_has_no_size_has_a_scale_all_the_same():
    for values in ([], [0.0, 0.0], [float("nan")], [float("inf")]):
        assert diverging_limit(values) == largest_size(values) == 1.0
    assert diverging_limit([0.0] * 99 + [7.0]) == 7.0
    assert diverging_limit([1.0, float("nan"), -2.0]) == 2.0
    assert diverging_limit(np.ones((3, 4))) == 1.0


def test_what_lies_beyond_is_said():
    assert beyond([1.0, -3.0, float("nan"), 2.0], 1.5) == "beyond the scale: 2 of 4, up to -3"
    assert beyond([[1.0, 1.5]], 1.5) == ""


@pytest.mark.parametrize("n_layers", [1, 3])
def test_every_picture_of_a_projection_has_the_same_scale(n_layers):
    """Three layers in one map share one; the coloured text of a layer has that of the layer alone."""
    projection = long_projection(n_layers, 200)
    limit = diverging_limit(projection.values)
    assert limit < 10
    still, interactive = projection.plot(), projection.plot(interactive=True)
    (trace,) = interactive.data
    if n_layers == 1:
        assert projection.lines()[0].scale == limit
        assert still.axes[0].get_ylim() == interactive.layout.yaxis.range == (-limit, limit)
    else:
        assert still.axes[0].images[0].get_clim() == (trace.zmin, trace.zmax) == (-limit, limit)
        for line, layer in zip(projection.lines(), projection.layers, strict=True):
            assert line.scale == diverging_limit(projection.at_layer(layer).values)
    assert beyond(projection.values, limit) in still.axes[0].get_title()
    assert beyond(projection.values, limit) in interactive.layout.title.text
