"""The chart of several fronts, as a picture and in a page."""

from typing import Any

import altair as alt

from adq.search.report.charts import png
from adq.search.report.compare import Comparison
from adq.search.report.front_chart import HEIGHT, WIDTH
from adq.search.report.page import script, template
from adq.search.report.theme import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    PURPLE,
    SKY,
    YELLOW,
    finished,
    number_axis,
    rows,
)
from adq.search.report.units import UNITS, padded, reference_text

COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, PURPLE)
LINE_HEIGHT = 15
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")


def compare_picture(comparison: Comparison) -> bytes:
    """The fronts in one chart, as a PNG."""
    first = comparison.first
    title = alt.Title(
        f"{first.split.capitalize()} {first.metric_name} against {comparison.unit.title}",
        subtitle=f"task {first.task}; rings: best by validation",
    )
    return png(compare_chart(comparison).properties(title=title))


def compare_page(comparison: Comparison) -> str:
    """The chart and the table as one HTML page that needs nothing but a browser."""
    header, table = comparison.table()
    chart = finished(
        compare_chart(comparison),
        f"{comparison.metric_title} of the fronts of {len(table)} studies against "
        f"{comparison.unit.title}.",
    )
    return template("compare.html.jinja").render(
        names=list(comparison.fronts),
        task=comparison.first.task,
        split=comparison.first.split,
        metric_title=comparison.metric_title,
        cost_title=comparison.unit.title,
        header=header,
        rows=table,
        reference=reference_text(comparison.first.metric_name, comparison.reference),
        charts={"fronts": chart},
        script=script(),
    )


def compare_chart(comparison: Comparison) -> alt.LayerChart:
    """A line, a colour and a shape a study, ±1 standard error, and a ring around each best point.
    Dashed lines are the FP32 models."""
    cost, unit = comparison.costs[0], comparison.unit
    points: list[dict[str, Any]] = [
        {
            "study": name,
            "model": point.id,
            "cost": unit.value(getattr(point, cost)),
            "metric": point.metric,
            "low": point.metric - point.metric_stderr,
            "high": point.metric + point.metric_stderr,
            "metric_text": comparison.metric_text(point),
            "best": point.id == front.best.id,
            **{other: UNITS[other].number(getattr(point, other)) for other in comparison.costs},
        }
        for name, front in comparison.fronts.items()
        for point in front.points
    ]
    fp32 = {front.fp32_metric for front in comparison.fronts.values()}
    across = padded(row["cost"] for row in points)
    up = padded([*(row[end] for row in points for end in ("low", "high")), *fp32])
    x = number_axis(alt.X, "cost", unit.title, across, tickCount=8)
    y = number_axis(alt.Y, "metric", comparison.metric_title, up, tickCount=6)
    names = list(comparison.fronts)
    legend = alt.Legend(title=None, orient="top", labelLimit=0, columnPadding=18)
    colours = alt.Scale(domain=names, range=list(COLOURS[: len(names)]))
    colour = alt.Color("study", type="nominal", scale=colours, legend=legend)
    shapes = alt.Scale(domain=names, range=list(SHAPES[: len(names)]))
    shape = alt.Shape("study", type="nominal", scale=shapes, legend=legend)
    titles = {"study": "study", "model": "model", "metric_text": comparison.metric_title}
    titles |= {name: UNITS[name].title for name in comparison.costs}
    tooltip = [alt.Tooltip(key, type="nominal", title=title) for key, title in titles.items()]
    all_points = alt.Chart(rows(points))
    best = alt.Chart(rows(row for row in points if row["best"]))
    layers = [
        *_fp32_lines(fp32, up, y),
        all_points.mark_line(strokeWidth=1.5, opacity=0.6).encode(x, y, colour),
        all_points.mark_rule(strokeWidth=1.5, opacity=0.4).encode(
            x, colour, y=alt.Y("low", type="quantitative"), y2=alt.Y2("high")
        ),
        best.mark_point(size=260, strokeWidth=2.2, opacity=1).encode(x, y, colour),
        all_points.mark_point(filled=True, size=80, opacity=1).encode(
            x, y, colour, shape, tooltip=tooltip
        ),
    ]
    return alt.LayerChart(layer=layers, width=WIDTH, height=HEIGHT)


def _fp32_lines(metrics: set[float], up: list[float], y: alt.Y) -> list[alt.Chart]:
    """A dashed line for each FP32 model, with its number where that has room."""
    named: list[float] = []
    for metric in sorted(metrics):
        if not named or (metric - named[-1]) / (up[1] - up[0]) * HEIGHT > LINE_HEIGHT:
            named.append(metric)
    lines = alt.Chart(rows({"metric": metric} for metric in metrics))
    names = alt.Chart(rows({"metric": m, "name": f"FP32 {m:.4g}"} for m in named))
    text = names.mark_text(color=GREY, align="left", dx=6, fontSize=12)
    return [
        lines.mark_rule(color=GREY, strokeWidth=1.5, strokeDash=[6, 4]).encode(y),
        text.encode(y, x=alt.value(WIDTH), text=alt.Text("name", type="nominal")),
    ]
