"""Charts as pictures."""

from __future__ import annotations

import textwrap
from io import BytesIO
from typing import Any

from ..errors import ConfigError, printable
from .document import Chart, Curve, HeatMap

_COLOURS = ("#1f5fa8", "#c8551b", "#2e8540", "#8a3ea8", "#b3202c", "#5b6770", "#a8861b", "#1b9aa8")
_MARKS = "osD^vPX*"
_WIDTH = 8.0
_HEIGHT = 5.4
_CAPTION_WIDTH = 130
_LEVELS = (":", "-.")
_LABEL = 0.06
"""Share of an axis that a tick's number takes."""
_FEW = 12
_MANY = 24
"""Rows of a heat map that fit."""
_LINE = 0.17
"""Inches that another line takes."""
_MARGIN = 0.04
_AS_IT_IS: dict[str, Any] = {"parse_math": False}
"""For words: names are strangers', and no formulas."""
_DARK = 0.6
"""Share of a heat map's range below which numbers on it are white."""


def png(chart: Chart | HeatMap) -> bytes:
    """The chart with its title and caption, as bytes of a PNG: the same for the same chart.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "study", expected="matplotlib", found="not installed", remedy='pip install "dare_train[study]"'
        ) from error
    caption = textwrap.fill(printable(" ".join(chart.caption.split())), _CAPTION_WIDTH)
    rows = len(chart.rows) if isinstance(chart, HeatMap) else 0
    height = _HEIGHT + _LINE * (caption.count("\n") + max(rows - _MANY, 0))
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axis = figure.subplots()
    if isinstance(chart, Chart):
        _fill(axis, chart)
    else:
        _colour(axis, chart)
    axis.set_title(_shown(chart.title), loc="left", fontsize="large", fontweight="bold", **_AS_IT_IS)
    figure.supxlabel(caption, x=0.01, ha="left", fontsize="small", color="0.3", **_AS_IT_IS)
    file = BytesIO()
    figure.savefig(file, dpi=150, format="png", metadata={"Software": None})
    return file.getvalue()


def _shown(words: str) -> str:
    return "\n".join(printable(line, 200) for line in words.split("\n"))


def _fill(axis: Any, chart: Chart) -> None:
    axis.set_xlabel(_shown(chart.x), **_AS_IT_IS)
    axis.set_ylabel(_shown(chart.y), **_AS_IT_IS)
    axis.set_xscale("log" if chart.log_x else "linear")
    axis.set_yscale("log" if chart.log_y else "linear")
    _mark_places(axis, chart)
    for number, curve in enumerate(chart.curves):
        _draw(axis, curve, _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)])
    for (label, value), line in zip(chart.levels.items(), _LEVELS, strict=False):
        axis.axhline(value, color="0.35", linestyle=line, linewidth=1.2, label=_shown(label))
    if chart.y_range is not None:
        low, high = chart.y_range
        axis.set_ylim(low - _MARGIN * (high - low), high + _MARGIN * (high - low))
    axis.grid(color="0.93")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if len(chart.curves) + len(chart.levels) > 1:
        for text in axis.legend(frameon=False, fontsize="small").get_texts():
            text.set_parse_math(False)


def _colour(axis: Any, chart: HeatMap) -> None:
    axis.set_xlabel(_shown(chart.x), **_AS_IT_IS)
    axis.set_ylabel(_shown(chart.y), **_AS_IT_IS)
    values = [[float("nan") if value is None else value for value in row] for row in chart.values]
    image = axis.imshow(values, cmap="viridis", aspect="auto", norm="log" if chart.log else "linear")
    axis.set_xticks(
        range(len(chart.columns)), [*map(_shown, chart.columns)], rotation=30, ha="right", **_AS_IT_IS
    )
    axis.set_yticks(
        range(len(chart.rows)),
        [*map(_shown, chart.rows)],
        fontsize="medium" if len(chart.rows) <= _FEW else "x-small",
        **_AS_IT_IS,
    )
    size = "small" if len(chart.rows) <= _FEW else "x-small"
    for row, cells in enumerate(chart.values):
        for column, value in enumerate(cells):
            if value is not None:
                light = image.norm(value) < _DARK
                axis.text(
                    column,
                    row,
                    f"{value:.3g}",
                    ha="center",
                    va="center",
                    fontsize=size,
                    color="white" if light else "black",
                )


def _mark_places(axis: Any, chart: Chart) -> None:
    """Ticks of the x axis: names; whole numbers where all places are; on a logarithmic axis the few places
    that were measured, as far as their numbers do not touch.
    """
    if chart.ticks:
        long = max(map(len, chart.ticks)) > 4 and len(chart.ticks) > 6
        names = [*map(_shown, chart.ticks)]
        size = "x-small" if long else "small"
        axis.set_xticks(range(len(names)), names, fontsize=size, **_AS_IT_IS)
        axis.tick_params(axis="x", rotation=90 if long else 0)
        return
    measured = sorted({x for curve in chart.curves for x in curve.x if x > 0 or not chart.log_x})
    if not chart.log_x:
        if all(float(x).is_integer() for x in measured):
            axis.xaxis.get_major_locator().set_params(integer=True)
        return
    places: list[float] = []
    for x in measured:
        if not places or x > places[-1] * (measured[-1] / measured[0]) ** _LABEL:
            places.append(x)
    if len(places) <= _FEW:
        axis.set_xticks(places, [f"{place:.3g}" for place in places])
        axis.set_xticks([], minor=True)


def _draw(axis: Any, curve: Curve, colour: str, mark: str) -> None:
    many = len(curve.x) > 30
    line = "--" if curve.dashed else "-"
    axis.plot(
        curve.x,
        curve.y,
        color=colour,
        linestyle=line,
        marker="" if many or curve.dashed else mark,
        markersize=4,
        label=_shown(curve.label),
    )
    if curve.half:
        low = [y - half for y, half in zip(curve.y, curve.half, strict=True)]
        high = [y + half for y, half in zip(curve.y, curve.half, strict=True)]
        axis.fill_between(curve.x, low, high, color=colour, alpha=0.2, linewidth=0)
