"""One look for all charts: colours, fonts, and what the pictures have in common.

Colours are told apart by readers of every colour vision: the marks are from the palette of Okabe
and Ito, ordered values run along viridis without its palest end, which is lost on white.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import altair as alt

BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"
PINK, SKY, YELLOW = "#cc79a7", "#56b4e9", "#e69f00"
INK, GREY, PALE = "#222222", "#6b6b6b", "#d0d0d0"
RAMP = ["#a5db36", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#46327e", "#30073f"]
"""Light to dark, one step a bit-width from 2 to 8; also few to many of any other quantity."""

FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
"""The first is built into the PNG converter. A text with a sign that it lacks (arrows, stars,
superscripts) is drawn in another font as a whole, so texts in charts keep to Latin-1."""

FP32_BITS = 32
LONGEST_LABEL = 34

AnyAxis = TypeVar("AnyAxis", alt.X, alt.Y)
Chart = alt.LayerChart | alt.HConcatChart | alt.VConcatChart


def rows(values: Iterable[dict[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=list(values))


def colour_of(bits: int) -> str:
    """The colour of a bit-width, the same in every chart."""
    return PALE if bits == FP32_BITS else RAMP[bits - 2]


def bits_scale(widths: Sequence[int]) -> alt.Scale:
    return alt.Scale(domain=list(widths), range=[colour_of(bits) for bits in widths])


def row_height(layers: int) -> int:
    """Pixels of a layer's row: roomy for a small model, never too low for its label."""
    return max(12, min(24, 480 // layers))


def number_axis(
    channel: type[AnyAxis], field: str, title: str, domain: list[float], **axis: Any
) -> AnyAxis:
    """A linear axis from and to exactly `domain`, starting at zero only if that says so."""
    return channel(
        field,
        type="quantitative",
        title=title,
        scale=alt.Scale(domain=domain, nice=False, zero=False),
        axis=alt.Axis(**axis),
    )


def layer_axis(layers: Sequence[str], labels: bool) -> alt.Y:
    """Layers downwards in model order; a long name keeps its end, where names differ."""
    axis = alt.Axis(
        title=None,
        labels=labels,
        ticks=False,
        domain=False,
        grid=False,
        labelLimit=0,
        labelFontSize=min(12, row_height(len(layers)) - 1),
        labelExpr=cut_label(LONGEST_LABEL),
        labelOverlap=False,
    )
    return alt.Y("layer", type="nominal", scale=alt.Scale(domain=list(layers)), axis=axis)


def cut_label(longest: int) -> str:
    """The Vega expression of a label that keeps its end, `longest` characters in all."""
    cut = f"length(datum.label) > {longest}"
    return f"{cut} ? '…' + slice(datum.label, {1 - longest}) : datum.label"


def finished(chart: Chart, description: str) -> Chart:
    """The chart as a whole picture; `description` is read out where it can't be seen."""
    return (
        chart.properties(description=description)
        .configure(background="white", font=FONT, padding=8)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=INK,
            titleColor=INK,
            labelFontSize=12,
            titleFontSize=13,
            titleFontWeight="normal",
            titlePadding=8,
            gridColor="#e8e8e8",
            domainColor="#999999",
            tickColor="#999999",
        )
        .configure_title(
            anchor="start",
            color=INK,
            fontSize=15,
            subtitleColor=GREY,
            subtitleFontSize=12,
            subtitlePadding=4,
            offset=10,
        )
        .configure_legend(
            labelColor=INK,
            titleColor=INK,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            symbolSize=110,
            symbolOpacity=1,
        )
        .configure_concat(spacing=28)
    )
