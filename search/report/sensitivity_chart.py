"""The chart of what each layer suffers at each bit-width, beside the bits that it got."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from adq.proxies.base import Sensitivity, Table
from adq.search.report.theme import INK, bits_scale, layer_axis, row_height, rows

WIDTH = 200
DECADES = 7
"""How far the axis reaches below the largest score. What lies further down is numerical zero: a
layer with fewer weights than levels, for one, has scores of 1e-16."""


@dataclass(frozen=True)
class Panel:
    """One table of scores: what `proxy` says of the `kind` ("weights" or "inputs") of each layer;
    `chosen` are the bits to mark, of the front's best point."""

    proxy: str
    kind: str
    table: Table
    chosen: Mapping[str, int]


def sensitivity_charts(
    proxies: Sequence[Sensitivity],
    weight_bits: Mapping[str, int],
    act_bits: Mapping[str, int],
    labels: bool = True,
) -> list[alt.LayerChart]:
    """One panel a proxy and kind: layers downwards, expected loss increase across.

    All panels share one logarithmic axis. A score that is zero, negative or below the axis is an
    open triangle at its left end. Rings mark the given bits, where there are any.
    """
    panels = list(_panels(proxies, weight_bits, act_bits))
    layers = proxies[0].weight.layers
    axis = log_axis([panel.table for panel in panels])
    widths = sorted({bits for panel in panels for bits in panel.table.bits})
    return [
        _draw(panel, layers, axis, widths, labels and i == 0, i == len(panels) - 1)
        for i, panel in enumerate(panels)
    ]


def _panels(
    proxies: Sequence[Sensitivity], weight_bits: Mapping[str, int], act_bits: Mapping[str, int]
) -> Iterator[Panel]:
    for s in proxies:
        yield Panel(s.proxy, "weights", s.weight, weight_bits)
        if s.act is not None and s.act.bits:
            yield Panel(s.proxy, "inputs", s.act, act_bits)


def log_axis(tables: Sequence[Table]) -> tuple[float, float]:
    """(low, high) of an axis around all positive scores and their errors, DECADES long at most."""
    scores = [float(score) for table in tables for score in table.score.flat if score > 0]
    if not scores:
        return 10.0**-DECADES, 1.0
    ends = [float(end) for table in tables for end in (table.score + table.stderr).flat]
    return max(min(scores) / 2, max(scores) * 10.0**-DECADES), max(*ends, *scores) * 1.5


def _marks(panel: Panel, axis: tuple[float, float]) -> Iterator[dict[str, Any]]:
    """One mark a layer and bit-width: `value` as measured, `score` where it is drawn."""
    table, (low, high) = panel.table, axis
    for i, layer in enumerate(table.layers):
        for j, bits in enumerate(table.bits):
            value, stderr = float(table.score[i, j]), float(table.stderr[i, j])
            yield {
                "layer": layer,
                "bits": bits,
                "value": value,
                "stderr": stderr,
                "score": max(value, low),
                "from": max(value - stderr, low),
                "to": min(max(value + stderr, low), high),
                "inside": value >= low,
                "chosen": panel.chosen.get(layer) == bits,
            }


def _draw(
    panel: Panel,
    layers: Sequence[str],
    axis: tuple[float, float],
    widths: Sequence[int],
    labels: bool,
    legend: bool,
) -> alt.LayerChart:
    marks = list(_marks(panel, axis))
    low, high = axis
    edge = low * (low / high) ** 0.04  # room for the triangles inside the plot
    scale = alt.Scale(type="log", domain=[edge, high], nice=False)
    x = alt.X(
        "score",
        type="quantitative",
        title="expected loss increase",
        scale=scale,
        axis=alt.Axis(format=".0e", tickCount=4, labelOverlap=True),
    )
    y = layer_axis(layers, labels)
    colour = alt.Color(
        "bits",
        type="ordinal",
        scale=bits_scale(widths),
        legend=alt.Legend(title="bits", orient="right") if legend else None,
    )
    tooltip = [
        alt.Tooltip("layer", type="nominal"),
        alt.Tooltip("bits", type="quantitative"),
        alt.Tooltip("value", type="quantitative", title="expected loss increase", format=".3e"),
        alt.Tooltip("stderr", type="quantitative", title="standard error", format=".1e"),
    ]
    lines = alt.Chart(rows({"layer": layer} for layer in layers))
    inside = alt.Chart(rows(m for m in marks if m["inside"]))
    below = alt.Chart(rows(m for m in marks if not m["inside"]))
    ringed = alt.Chart(rows(m for m in marks if m["chosen"]))
    bar = {"x": alt.X("from", type="quantitative", scale=scale), "x2": alt.X2("to")}
    off_axis = not all(m["inside"] for m in marks)
    ring = ["ring: best point"] if panel.chosen else []
    key = ", ".join(ring + (["triangle: off the axis"] if off_axis else []))
    return alt.LayerChart(
        layer=[
            lines.mark_rule(color="#ececec").encode(y),
            inside.mark_rule(strokeWidth=1.5, opacity=0.7).encode(y, colour, **bar),
            inside.mark_point(filled=True, size=50, opacity=1).encode(
                x, y, colour, tooltip=tooltip
            ),
            below.mark_point(shape="triangle-left", size=50, strokeWidth=1.6).encode(
                x, y, colour, tooltip=tooltip
            ),
            ringed.mark_point(size=120, color=INK, strokeWidth=1.4).encode(x, y),
        ],
        width=WIDTH,
        height=row_height(len(layers)) * len(layers),
        title=alt.Title(f"Sensitivity of the {panel.kind}", subtitle=[panel.proxy, key]),
    )
