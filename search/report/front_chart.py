"""The chart of the front: metric against the first cost."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import altair as alt

from adq.quant.spec import MAX_BITS
from adq.search.front import Front, Point
from adq.search.report.facts import Facts
from adq.search.report.theme import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    bits_scale,
    cut_label,
    number_axis,
    rows,
)
from adq.search.report.units import UNITS, padded

WIDTH, HEIGHT, BITS_HEIGHT = 640, 300, 80
FEW_LAYERS = 24
"""More layers than this, and their names are in the tooltips alone."""
SYMBOL = "item().mark && item().mark.marktype == 'symbol' && item().mark.role == 'mark'"
"""Vega: the pointer is over a model, not over a line, a bar or the legend."""
Pixel = tuple[float, float]
HALO = {"stroke": "white", "strokeWidth": 4, "strokeJoin": "round"}
"""Drawn under a text, so that it can be read across lines."""


def interactive_front(facts: Facts) -> alt.VConcatChart:
    """The chart, and below it the bits of every layer of the model under the pointer; of the best
    one until then."""
    pointed = alt.selection_point(
        name="model",
        fields=["point"],
        on=f"pointerover[{SYMBOL}]",
        clear=False,
        value=[{"point": facts.front.best.id}],
        empty=False,
    )
    both = alt.vconcat(front_chart(facts, pointed=pointed), _bits_of(facts, pointed), spacing=10)
    return both.resolve_scale(color="independent", shape="independent")


def _bits_of(facts: Facts, pointed: alt.Parameter) -> alt.LayerChart:
    """Layers across, weight bits as bars; where input bits vary, those as ticks."""
    cells = list(_cells(facts))
    inputs = facts.input_bits_vary
    key = " (bars: weights, ticks: inputs)" if inputs else ""
    names = [
        {"point": p.id, "name": f"{p.id}: {facts.unit.text(facts.cost_of(p))}{key}"}
        for p in (*facts.front.points, *facts.front.uniform)
    ]
    widths = sorted({cell["bits"] for cell in cells})
    few = len(facts.layers) <= FEW_LAYERS
    across = alt.Axis(
        title=None if few else f"{len(facts.layers)} layers in model order",
        labels=few,
        ticks=False,
        labelAngle=-35,
        labelLimit=0,
        labelOverlap=False,
        labelExpr=cut_label(16),
    )
    x = alt.X("layer", type="nominal", scale=alt.Scale(domain=facts.layers), axis=across)
    scale = alt.Scale(domain=[0, MAX_BITS])
    y = alt.Y("bits", type="quantitative", title="bits", scale=scale, axis=alt.Axis(tickCount=4))
    texts = {"layer": "layer", "bits": "bits of the weights", "inputs": "bits of the inputs"}
    bars = alt.Chart(rows(cells)).transform_filter(pointed)
    layers = [
        bars.mark_bar().encode(
            x,
            y,
            color=alt.Color("bits", type="ordinal", scale=bits_scale(widths), legend=None),
            tooltip=[alt.Tooltip(key, type="nominal", title=text) for key, text in texts.items()],
        ),
        alt.Chart(rows(names))
        .transform_filter(pointed)
        .mark_text(align="left", baseline="bottom", dy=-5, fontSize=12, color=INK)
        .encode(x=alt.value(0), y=alt.value(0), text=alt.Text("name", type="nominal")),
    ]
    if inputs:
        ticks = bars.transform_filter("isNumber(datum.inputs)")
        layers.append(ticks.mark_tick(color=ORANGE, thickness=3, opacity=1).encode(x, y="inputs:Q"))
    return alt.LayerChart(layer=layers, width=WIDTH, height=BITS_HEIGHT)


def _cells(facts: Facts) -> Iterator[dict[str, Any]]:
    for point in (*facts.front.points, *facts.front.uniform):
        for layer, bits in point.weight_bits.items():
            inputs = point.act_bits.get(layer, "FP32")
            yield {"point": point.id, "layer": layer, "bits": bits, "inputs": inputs}


def front_chart(
    facts: Facts, width: int = WIDTH, pointed: alt.Parameter | None = None
) -> alt.LayerChart:
    """Points with ±1 standard error, the best one, the knee, uniform models, FP32 and the budget.
    `pointed` selects the model under the pointer.

    The names of marks stand where they can't meet: in the legend above, FP32's right of the plot,
    the budget's on top of it, uniform models' beside them (those differ by a whole bit).
    """
    front, unit = facts.front, facts.unit
    names = _names_of(front)
    points = [_row(facts, p, names.get(p.id, "front")) for p in front.points]
    uniform = [_row(facts, p, "the same bits in every searched layer") for p in front.uniform]
    costs = [row["cost"] for row in points + uniform]
    metrics = [row[end] for row in points + uniform for end in ("low", "high")]
    across = padded([*costs, unit.value(facts.limit)])
    x = number_axis(alt.X, "cost", unit.title, across, tickCount=8)
    up = padded([*metrics, facts.fp32.metric])
    y = number_axis(alt.Y, "metric", facts.metric_title, up, tickCount=6)

    def pixel(row: dict[str, Any]) -> Pixel:
        return _share(row["cost"], across) * width, (1 - _share(row["metric"], up)) * HEIGHT

    taken = [pixel(row) for row in uniform] + _along([pixel(row) for row in points])
    layers = [
        *_reference_lines(facts, x, y, width),
        *_models(facts, points, uniform, x, y, pointed),
        *_names(uniform, taken, width, x, y),
    ]
    return alt.LayerChart(layer=layers, width=width, height=HEIGHT)


def _names_of(front: Front) -> dict[str, str]:
    """Id -> what the legend calls it: the best point first, then the knee, where there is one."""
    best, knee = front.best.id, front.knee
    if knee is None:
        return {best: f"best by validation, {best}"}
    if knee.id == best:
        return {best: f"best by validation and knee, {best}"}
    return {best: f"best by validation, {best}", knee.id: f"knee, {knee.id}"}


def _row(facts: Facts, point: Point, kind: str) -> dict[str, Any]:
    return {
        "point": point.id,
        "kind": kind,
        "cost": facts.unit.value(facts.cost_of(point)),
        "metric": point.metric,
        "low": point.metric - point.metric_stderr,
        "high": point.metric + point.metric_stderr,
        "metric_text": facts.metric_text(point.metric, point.metric_stderr),
    } | {
        name: unit.number(cost)
        for name, unit in UNITS.items()
        if (cost := getattr(point, name)) is not None
    }


def _models(
    facts: Facts,
    points: list[dict[str, Any]],
    uniform: list[dict[str, Any]],
    x: alt.X,
    y: alt.Y,
    pointed: alt.Parameter | None,
) -> list[alt.Chart]:
    """The line of the front, error bars, and one mark a model."""
    best, *knee = _names_of(facts.front).values()
    looks = {"front": (BLUE, "circle"), best: (ORANGE, "circle")}
    looks |= dict.fromkeys(knee, (BLUE, "square"))
    looks |= {row["kind"]: (GREEN, "diamond") for row in uniform}
    if all(row["kind"] != "front" for row in points):
        del looks["front"]  # the only point is the best one
    colours, shapes = zip(*looks.values(), strict=True)
    legend = alt.Legend(title=None, orient="top", labelLimit=0, columnPadding=18, offset=24)

    def domain(range: tuple[str, ...]) -> dict[str, Any]:
        return {"legend": legend, "scale": alt.Scale(domain=list(looks), range=list(range))}

    colour = alt.Color("kind", type="nominal", **domain(colours))
    shape = alt.Shape("kind", type="nominal", **domain(shapes))
    texts = {"point": "model", "metric_text": facts.metric_title}
    texts |= {name: unit.title for name, unit in UNITS.items() if name in points[0]}
    tooltip = [alt.Tooltip(name, type="nominal", title=title) for name, title in texts.items()]

    on_front, beside = alt.Chart(rows(points)), alt.Chart(rows(uniform))
    the_best = alt.Chart(rows(row for row in points if row["kind"] == best))
    bar = {"y": alt.Y("low", type="quantitative"), "y2": alt.Y2("high")}
    # below the marks, whose tooltips they would hide
    rings = [the_best.mark_point(size=260, strokeWidth=2.2, color=ORANGE, opacity=1).encode(x, y)]
    marks = [
        on_front.mark_line(color=BLUE, strokeWidth=1.5, opacity=0.6).encode(x, y),
        alt.Chart(rows(points + uniform))
        .mark_rule(strokeWidth=1.5, opacity=0.55)
        .encode(x, colour, **bar),
        beside.mark_point(size=280, strokeWidth=2.2, opacity=1).encode(
            x, y, colour, shape, tooltip=tooltip
        ),
        on_front.mark_point(filled=True, size=90, opacity=1).encode(
            x, y, colour, shape, tooltip=tooltip
        ),
    ]
    if pointed is None:
        return [*rings, *marks]
    ring = alt.Chart(rows(points + uniform)).transform_filter(pointed)
    rings.append(ring.mark_point(size=520, strokeWidth=1.2, color=INK, opacity=1).encode(x, y))
    return [*rings, *marks[:-1], marks[-1].add_params(pointed)]


def _share(value: float, domain: list[float]) -> float:
    return (value - domain[0]) / (domain[1] - domain[0])


def _along(corners: list[Pixel], pieces: int = 20) -> list[Pixel]:
    """The corners of a line, and places on it between them."""
    between = [
        (a[0] + (b[0] - a[0]) * i / pieces, a[1] + (b[1] - a[1]) * i / pieces)
        for a, b in pairwise(corners)
        for i in range(1, pieces)
    ]
    return corners + between


def _names(
    uniform: list[dict[str, Any]], taken: list[Pixel], width: int, x: alt.X, y: alt.Y
) -> list[alt.Chart]:
    """Names beside the uniform models, whose marks are the first of the places `taken`."""
    charts = []
    for row, place in zip(uniform, taken, strict=False):
        right, down = free_corner(place, len(row["point"]) * 7, taken, width)
        for style in (HALO, {"color": GREEN}):
            mark = alt.Chart(rows([row])).mark_text(
                align="left" if right > 0 else "right",
                baseline="middle",
                dx=13 * right,
                dy=12 * down,
                fontSize=12,
                **style,
            )
            charts.append(mark.encode(x, y, text=alt.Text("point", type="nominal")))
    return charts


def free_corner(place: Pixel, length: int, marks: list[Pixel], width: int) -> tuple[int, int]:
    """(right or left, below or above) as ±1: where a name of `length` pixels meets fewest marks.

    Corners where it would leave the plot are not considered; both sides of a plot never are.
    """

    def met(corner: tuple[int, int]) -> int:
        right, down = corner
        middle = place[0] + right * (13 + length / 2), place[1] + down * 12
        return sum(
            abs(mark[0] - middle[0]) < length / 2 + 10 and abs(mark[1] - middle[1]) < 16
            for mark in marks
            if mark != place
        )

    sides = [right for right in (1, -1) if 0 < place[0] + right * (13 + length) < width]
    return min(((right, down) for right in sides for down in (1, -1)), key=met)


def _reference_lines(facts: Facts, x: alt.X, y: alt.Y, width: int) -> list[alt.Chart]:
    """FP32 as a line across, the budget as a line down, each with its name outside the plot."""
    metric, limit = facts.fp32.metric, facts.unit.value(facts.limit)
    fp32 = alt.Chart(rows([{"metric": metric, "name": f"FP32 {metric:{facts.metric_format}}"}]))
    budget = alt.Chart(rows([{"cost": limit, "name": f"budget {limit:,.10g}"}]))
    name = alt.Text("name", type="nominal")
    return [
        fp32.mark_rule(color=GREY, strokeWidth=1.5, strokeDash=[6, 4]).encode(y),
        fp32.mark_text(color=GREY, align="left", dx=6, fontSize=12).encode(
            y, x=alt.value(width), text=name
        ),
        budget.mark_rule(color=PURPLE, strokeWidth=1.5, strokeDash=[2, 3]).encode(x),
        budget.mark_text(color=PURPLE, baseline="bottom", dy=-4, fontSize=12).encode(
            x, y=alt.value(0), text=name
        ),
    ]
