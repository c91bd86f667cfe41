"""Figures to look into: exact numbers where the mouse is, zoom, a slider along long texts. What is shown is what `plots` shows.

Every function returns a plotly `Figure`: a notebook shows it, and `figure.write_html(path)` saves a page that needs nothing else.
Data, scales and colours are those of the still figures. Plotly takes `<b>`, `&lt;` and `$` in a text for markup, so text from
outside (tokens, names) is escaped: a token is shown as it is, its white space made visible.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from caa_lens.errors import InputError
from caa_lens.figures import DIVERGING, MARKERS, MOST_ROWS, MOST_TOKENS, NEGATIVE, POSITIVE
from caa_lens.plots import MEASURES, Projected, scaled
from caa_lens.plots_geometry import SIDES, pca_names, pca_rows
from caa_lens.scale import largest_size
from caa_lens.sweep_panels import By, Panel, Series, panels_of
from caa_lens.token_text import one_line

try:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots
except ImportError as error:
    raise InputError("interactive plots need plotly; install it with pip install 'caa-lens[plot]'.") from error

if TYPE_CHECKING:
    from caa_lens.experiments.result import SweepResult
    from caa_lens.geometry import PCA, Similarity
    from caa_lens.logits import LogitLens
    from caa_lens.patching import PatchResult

SYMBOLS = dict(zip(MARKERS, ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x"), strict=True))
NUMBER = ",.4~r"  # four digits, without an exponent
LONGEST_TICK = 18


def refuse_axis(ax: object) -> None:
    """Refuses an axis, which only still figures are drawn on.

    Raises:
        InputError: an axis is given.
    """
    if ax is not None:
        raise InputError("an interactive figure is not drawn on a matplotlib axis; leave out ax=, or interactive=True.")


def plot_projection(projection: Projected) -> go.Figure:
    """Every token's projection: a bar a token at one layer, a heat map of layers and tokens otherwise.

    Of more than 60 tokens the first 60 are in sight; the slider below, or dragging, moves along the text.

    Args:
        projection: of `project`.
    """
    values, limit, title = scaled(projection)
    unit = _plain(MEASURES.get(projection.measure, projection.measure))
    names = _tokens(range(len(projection.tokens)), projection.tokens)
    texts = list(map(_plain, names))
    if values.ndim == 2:
        hover = f"%{{customdata}}<br>layer %{{y}}<br>{unit}: %{{z:{NUMBER}}}"
        scale: dict[str, Any] = {"unit": unit, "ends": (-limit, limit)}
        figure = _heatmap(values, projection.layers, _ticks(names), hover, **scale, customdata=[texts] * len(values))
        return _along(_styled(figure, title=title, x="token", y="layer", height=_height(len(values))), len(names))
    bars = go.Bar(
        x=_ticks(names),
        y=values,
        marker={"color": np.where(values < 0, NEGATIVE, POSITIVE).tolist(), "line": {"width": 0}},
        customdata=texts,
        hovertemplate=f"%{{customdata}}<br>{unit}: %{{y:{NUMBER}}}<extra></extra>",
    )
    figure = _along(_styled(go.Figure(bars), title=title, x="token", y=unit, height=380), len(names))
    past = bool(np.abs(values).max() > limit)
    return figure.update_yaxes(zeroline=True, range=[-limit, limit] if past else None)


def plot_sweep(result: SweepResult, by: By | None = None, *, layer: int | None = None) -> go.Figure:
    """Effects against the layer, or scores against the multiplier at one layer, the vector beside its controls.

    Args:
        result, by, layer: as in `caa_lens.plots.plot_sweep`.

    Raises:
        InputError, MissingError: as there.
    """
    panels = panels_of(result, by, layer)
    titles = [_plain(panel.title) for panel in panels]
    figure = make_subplots(1, len(panels), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    for column, panel in enumerate(panels, 1):
        for rank, series in sorted(
            enumerate(panel.series), key=lambda item: item[1].own
        ):  # what is drawn last is on top
            figure.add_traces(list(_traces(panel, series, rank, named=column == 1)), rows=1, cols=column)
        draw_zero = figure.add_hline if panel.x == "layer" else figure.add_vline
        draw_zero(0, col=column, line={"color": "black", "width": 1}, layer="below")
        figure.update_xaxes(tickvals=panel.places[:: -(-len(panel.places) // 16)], col=column)
    figure.update_annotations(font_size=14)
    return _styled(figure, x=panels[0].x, height=420).update_yaxes(title=_plain(panels[0].ylabel), col=1)


def _traces(panel: Panel, series: Series, rank: int, *, named: bool) -> Iterator[go.Scatter]:
    """The band of the intervals, and a line a vector; hidden and shown together."""
    name = _plain(series.label)
    common: dict[str, Any] = {"legendgroup": name, "name": name, "legendrank": rank}
    places, low, high = series.band.index.tolist(), series.band["low"].tolist(), series.band["high"].tolist()
    band: dict[str, Any] = {"x": places + places[::-1], "y": high + low[::-1], "mode": "lines", **common}
    if len(places) == 1:
        band["line"] = {"color": _transparent(series.color, 0.5), "width": 2}
    else:
        color = _transparent(series.color, 0.25 if series.own else 0.12)
        band |= {"fill": "toself", "fillcolor": color, "line": {"width": 0}}
    yield go.Scatter(**band, showlegend=False, hoverinfo="skip")
    for vector, line in series.lines.items():
        yield go.Scatter(
            x=line[panel.x].tolist(),
            y=line["value"].tolist(),
            customdata=[[_plain(vector), *interval] for interval in line[["low", "high", "n"]].to_numpy().tolist()],
            hovertemplate=f"<b>%{{customdata[0]}}</b><br>{panel.x} %{{x}}<br>%{{y:{NUMBER}}} "
            f"[%{{customdata[1]:{NUMBER}}}, %{{customdata[2]:{NUMBER}}}], n = %{{customdata[3]}}<extra></extra>",
            mode="lines+markers",
            line={"color": series.color, "width": 2.4 if series.own else 1.4},
            marker={"symbol": SYMBOLS[series.marker], "size": 7},
            showlegend=named,
            **common,
        )
        named = False


def plot_patch(result: PatchResult) -> go.Figure:
    """Heat map of layers and positions: the normalised effect, or the effect in logits where a vector was the source.

    Args:
        result: of `patch`.
    """
    values, unit = result.shown
    names = [  # spans, and positions whose tokens differ between pairs, have no token to show
        token if token == str(position) else f"{position}: {one_line(token)}"
        for position, token in zip(result.positions, result.tokens, strict=True)
    ]
    n, table = len(result.patched), result.to_pandas()
    errors = [f", standard error {se:.2g} ({n} pairs)" if n > 1 else "" for se in table["se"]]
    effects = [f"effect: {effect:.4g} logits{error}" for effect, error in zip(table["effect"], errors, strict=True)]
    notes = np.array(effects, dtype=object).reshape(values.shape)
    texts = [
        [f"{_plain(name)}<br>layer {layer}<br>{note}" for name, note in zip(names, row, strict=True)]
        for layer, row in zip(result.layers, notes, strict=True)
    ]
    hover = "%{customdata}" + (f"<br>{unit}: %{{z:{NUMBER}}}" if result.source is not None else "")
    end = largest_size(values)
    scale: dict[str, Any] = {"unit": unit, "ends": (-end, end)}
    figure = _heatmap(values.numpy(), result.layers, _ticks(names), hover, **scale, customdata=texts)
    return _along(_styled(figure, x="position patched", y="layer", height=_height(len(values))), len(names))


def plot_lens(lens: LogitLens) -> go.Figure:
    """The likeliest next token of every layer and position, darker where it is likelier, over all that were kept.

    Args:
        lens: of `logit_lens`.
    """
    names = _tokens(lens.positions, lens.tokens)
    words = [[list(map(one_line, lens.top_tokens(layer, i))) for i in range(len(names))] for layer in lens.layers]
    texts = [[f"{_plain(name)}<br>layer {layer}" for name in names] for layer in lens.layers]
    for row, column in np.ndindex(len(lens.layers), len(names)):
        ranked = zip(words[row][column], lens.top_probabilities[row, column].tolist(), strict=True)
        texts[row][column] += "".join(f"<br>{share:.3f} {_plain(word)}" for word, share in ranked)
    cells: dict[str, Any] = {"unit": "probability of the token", "ends": (0, 1), "colorscale": "Blues"}
    if len(names) <= MOST_TOKENS:
        cells |= {"text": [_ticks([best for best, *_ in row]) for row in words], "texttemplate": "%{text}"}
    shares = lens.top_probabilities[..., 0].numpy()
    figure = _heatmap(shares, lens.layers, _ticks(names), "%{customdata}", **cells, customdata=texts)
    return _along(_styled(figure, x="read at", y="layer", height=_height(len(lens.layers))), len(names))


def plot_similarity(similarity: Similarity) -> go.Figure:
    """All cosines as a square heat map; lines separate the sets.

    Args:
        similarity: of `caa_lens.similarity`.
    """
    names = [f"{_plain(name)}, {layer}" for name, layer in zip(similarity.names, similarity.layers, strict=True)]
    scale: dict[str, Any] = {"unit": "cosine similarity", "ends": (-1, 1)}
    hover = f"%{{y}}<br>%{{x}}<br>cosine: %{{z:{NUMBER}}}"
    figure = _heatmap(similarity.values.numpy(), names, names, hover, **scale)
    for name in list(dict.fromkeys(similarity.names))[1:]:
        for draw in (figure.add_hline, figure.add_vline):
            draw(similarity.names.index(name) - 0.5, line={"color": "black", "width": 0.8})
    figure.update_xaxes(constrain="domain").update_yaxes(constrain="domain", scaleanchor="x")
    return _styled(figure, x="set, layer", y="set, layer", height=600)


def plot_pca(pca: PCA, *, layer: int | None = None) -> go.Figure:
    """The pairs along the first two components, with a slider over the layers if none is given.

    Args:
        pca: of `caa_lens.pca`.
        layer: which; all by default.

    Raises:
        InputError: a layer that is not there, or fewer than two components.
    """
    rows = pca_rows(pca, layer)
    middle, steps, figure = rows[(len(rows) - 1) // 2], [], go.Figure()
    for row in rows:
        title, x, y = pca_names(pca, row)
        for side, color, marker in SIDES:
            first, second = getattr(pca, side)[row, :, :2].T.tolist()
            figure.add_scatter(
                x=first,
                y=second,
                mode="markers",
                name=side,
                marker={"color": color, "symbol": SYMBOLS[marker], "size": 8, "opacity": 0.7},
                customdata=list(range(len(first))),
                hovertemplate=f"pair %{{customdata}}, {side}<br>PC1: %{{x:{NUMBER}}}<br>PC2: %{{y:{NUMBER}}}<extra></extra>",
                visible=row == middle,
            )
        seen = {"visible": [other == row for other in rows for _ in SIDES]}
        named = {"title.text": title, "xaxis.title.text": x, "yaxis.title.text": y}
        steps.append({"method": "update", "label": str(pca.layers[row]), "args": [seen, named]})
    if len(rows) > 1:
        slider = {"active": rows.index(middle), "currentvalue": {"prefix": "layer "}, "pad": {"t": 50}, "steps": steps}
        figure.update_layout(sliders=[slider])
    title, x, y = pca_names(pca, middle)
    return _styled(figure, title=title, x=x, y=y, height=480 if len(rows) == 1 else 570)


def _heatmap(
    values: np.ndarray,
    rows: Sequence[int | str],
    columns: Sequence[str],
    hover: str,
    *,
    unit: str,
    ends: tuple[float, float],
    **cells: Any,
) -> go.Figure:
    """A table of numbers as colours, its first row at the bottom, grey where there is no number; names are distinct and escaped."""
    bar = {"title": {"text": unit, "side": "right"}, "outlinewidth": 0, "thickness": 16}
    options = {"colorscale": DIVERGING, "colorbar": bar, "zmin": ends[0], "zmax": ends[1], **cells}
    names = list(map(str, rows))
    figure = go.Figure(go.Heatmap(z=values, x=columns, y=names, hovertemplate=f"{hover}<extra></extra>", **options))
    figure.update_xaxes(type="category", nticks=MOST_TOKENS, tickangle=-90, showline=False)
    figure.update_yaxes(type="category", nticks=MOST_ROWS, showline=False)
    return figure.update_layout(plot_bgcolor="#DDDDDD")


def _along(figure: go.Figure, n: int) -> go.Figure:
    """Names the tokens below; of more than `MOST_TOKENS` so many are in sight, above a slider along all of them."""
    figure.update_xaxes(type="category", nticks=MOST_TOKENS, tickangle=-90, minallowed=-0.5, maxallowed=n - 0.5)
    if n > MOST_TOKENS:
        figure.update_xaxes(range=[-0.5, MOST_TOKENS - 0.5], rangeslider={"visible": True, "thickness": 0.12})
        figure.update_yaxes(fixedrange=True).update_layout(dragmode="pan", height=figure.layout.height + 60)
    return figure


def _tokens(places: Sequence[int], tokens: Sequence[str]) -> list[str]:
    """Each token behind its place, by which equal tokens are told apart."""
    return [f"{place}: {one_line(token)}" for place, token in zip(places, tokens, strict=True)]


def _ticks(names: Sequence[str]) -> list[str]:
    """Names short enough to stand below a figure, escaped."""
    cut = (
        name if len(name) <= LONGEST_TICK else f"{name[: LONGEST_TICK - 1]}\N{HORIZONTAL ELLIPSIS}" for name in names
    )
    return list(map(_plain, cut))


def _height(n_rows: int) -> int:
    return min(220 + 18 * n_rows, 820)


def _plain(text: str) -> str:
    """A text that plotly shows as it is: its markup and TeX escaped, and its line breaks kept."""
    return html.escape(text, quote=False).replace("$", "&#36;").replace("\n", "<br>")


def _transparent(color: str, share: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


def _styled(figure: go.Figure, *, title: str = "", x: str, y: str | None = None, height: int) -> go.Figure:
    """The look that the figures share: black on white in light and dark notebooks alike, as pictures are."""
    figure.update_xaxes(title=x).update_yaxes(title=y)
    return figure.update_layout(
        template="simple_white",
        title={"text": _plain(title), "font": {"size": 14}, "x": 0.5},
        font={"size": 12, "color": "black"},
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"family": "monospace"}},
        margin={"l": 70, "r": 20, "t": 70, "b": 60},
        height=height,
        bargap=0.15,
    )
