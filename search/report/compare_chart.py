"""The chart of several fronts, as a picture and in a page."""

from adq.search.front import Point
from adq.search.report.charts import LEAST_WIDTH, LEFT, chart, sheet
from adq.search.report.compare import Comparison
from adq.search.report.front_chart import HEIGHT
from adq.search.report.page import render
from adq.search.report.svg import Key, Plot, Scale, add
from adq.search.report.units import UNITS, padded, reference_text

SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus", "right")
LINE_HEIGHT = 15


def compare_picture(comparison: Comparison) -> bytes:
    """The fronts in one chart, as a PNG."""
    title = f"{comparison.metric_title.capitalize()} against {comparison.unit.title}"
    subtitle = f"task {comparison.first.task}; rings: best by validation"
    plot = compare_chart(comparison, LEAST_WIDTH)
    return sheet(plot, compare_keys(comparison), title, subtitle, LEAST_WIDTH + LEFT)


def compare_page(comparison: Comparison) -> str:
    """The chart and the tables as one HTML page that needs nothing but a browser."""
    header, table = comparison.table()
    model_header, models = comparison.models()
    return render(
        "compare.html.jinja",
        names=list(comparison.fronts),
        task=comparison.first.task,
        split=comparison.first.split,
        metric_title=comparison.metric_title,
        cost_title=comparison.unit.title,
        header=header,
        rows=table,
        model_header=model_header,
        models=models,
        reference=reference_text(comparison.first.metric_name, comparison.reference),
        fronts=chart(compare_chart(comparison), compare_keys(comparison)),
    )


def compare_keys(comparison: Comparison) -> list[Key]:
    return [Key(SHAPES[i], f"s{i}", name) for i, name in enumerate(comparison.fronts)]


def compare_chart(comparison: Comparison, width: float | None = None) -> Plot:
    """A line, a colour and a shape a study, ±1 standard error, and a ring around each best point.
    Dashed lines are the FP32 models."""
    cost, unit = comparison.costs[0], comparison.unit

    def place(point: Point) -> tuple[float, float]:
        return unit.value(getattr(point, cost)), point.metric

    points = [point for front in comparison.fronts.values() for point in front.points]
    fp32 = {front.fp32_metric for front in comparison.fronts.values()}
    across = padded(place(point)[0] for point in points)
    ends = [p.metric + sign * p.metric_stderr for p in points for sign in (-1, 1)]
    up = padded([*ends, *fp32])
    plot = Plot(Scale(across[0], across[1]), Scale(up[0], up[1]), HEIGHT, width)
    plot.axes(unit.title, comparison.metric_title)
    _fp32_lines(plot, fp32)
    frame = plot.frame()
    for i, front in enumerate(comparison.fronts.values()):
        line = plot.path(map(place, front.points))
        add(frame, "path", d=line, class_=f"curve s{i}")
    for i, (name, front) in enumerate(comparison.fronts.items()):
        for point in front.points:
            best = " chosen" if point.id == front.best.id else ""
            mark = add(plot.svg, "g", class_=f"point{best}", data_study=name, data_point=point.id)
            costs = [UNITS[c].text(getattr(point, c)) for c in comparison.costs]
            text = f"{name}, {point.id}: {comparison.metric_text(point)}, {', '.join(costs)}"
            add(mark, "title", text)
            x, low, high = place(point)[0], -point.metric_stderr, point.metric_stderr
            plot.bar(mark, x, point.metric + low, point.metric + high, f"s{i}")
            shape = plot.mark(mark, *place(point), SHAPES[i], f"s{i}")
            add(shape, "circle", r=10, class_="ring")
    plot.described(
        f"{comparison.metric_title} of the fronts of {len(comparison.fronts)} studies against "
        f"{unit.title}. The table of models has the same numbers."
    )
    return plot


def _fp32_lines(plot: Plot, metrics: set[float]) -> None:
    """A dashed line for each FP32 model, with its number where that has room."""
    named: list[float] = []
    for metric in sorted(metrics):
        y = plot.at_y(metric)
        add(plot.svg, "line", x1=0, x2=plot.across(1), y1=y, y2=y, class_="dash")
        if not named or abs(named[-1] - y) > LINE_HEIGHT:
            named.append(y)
            add(plot.svg, "text", f"FP32 {metric:.4g}", x=4, y=y - 5, class_="halo quiet")
