"""The chart of the front: metric against the first cost."""

from typing import Any

from adq.search.front import Point
from adq.search.report.facts import Facts
from adq.search.report.svg import Element, Key, Plot, Scale, add
from adq.search.report.units import padded

HEIGHT = 280
NEAR = 0.12
"""Closer to an end of the plot than this share of it, and a name stands inwards of its mark."""


def front_keys(facts: Facts) -> list[Key]:
    """The legend: best point, knee, the others and the uniform models, as far as there are any;
    FP32 and the budget."""
    points = (*facts.front.points, *facts.front.uniform)
    kinds = dict.fromkeys(kind_of(facts, point) for point in points)
    return [
        *(Key(shape, class_, text) for shape, class_, text in kinds),
        Key("line", "dash", f"FP32 {facts.fp32.metric:{facts.metric_format}}"),
        Key("line", "budget", f"budget {facts.unit.limit(facts.limit)}"),
    ]


def kind_of(facts: Facts, point: Point) -> tuple[str, str, str]:
    """(shape, class, what the legend says) of a model."""
    front = facts.front
    best, knee = front.best.id, None if front.knee is None else front.knee.id
    if point not in front.points:
        return "diamond", "uniform", "the same bits in every searched layer"
    if point.id == best:
        return "circle", "best", f"best by validation{' and knee' if knee == best else ''}, {best}"
    if point.id == knee:
        return "square", "front", f"knee, {knee}"
    return "circle", "front", "front"


def front_chart(facts: Facts, width: float | None = None) -> Plot:
    """Points with ±1 standard error, uniform models, FP32 and the budget. Each model is a radio
    button: `data-point` is its id."""
    front, unit = facts.front, facts.unit
    points = (*front.points, *front.uniform)
    costs = [unit.value(facts.cost_of(p)) for p in points]
    ends = [p.metric + sign * p.metric_stderr for p in points for sign in (-1, 1)]
    across = padded([*costs, unit.value(facts.limit)])
    up = padded([*ends, facts.fp32.metric])
    plot = Plot(Scale(across[0], across[1]), Scale(up[0], up[1]), HEIGHT, width)
    plot.axes(unit.title, facts.metric_title)
    _reference_lines(facts, plot)
    line = [(unit.value(facts.cost_of(p)), p.metric) for p in front.points]
    add(plot.frame(), "path", d=plot.path(line), class_="curve line")
    group = add(plot.svg, "g", role="radiogroup", aria_label="Models of the chart")
    for point in sorted(points, key=facts.cost_of):  # as arrow keys go through them
        _model(facts, plot, group, point)
    plot.described(
        f"{facts.metric_title} of {len(points)} models against {unit.title}. The table below has "
        "the same numbers.",
        role="group",
    )
    return plot


def _model(facts: Facts, plot: Plot, group: Element, point: Point) -> None:
    chosen = point.id == facts.front.best.id
    shape, class_, _ = kind_of(facts, point)
    x, stderr = facts.unit.value(facts.cost_of(point)), point.metric_stderr
    label = f"{point.id}: {facts.metric_title} {facts.metric_text(point.metric, stderr)}, "
    label += facts.unit.text(facts.cost_of(point))
    radio: dict[str, Any] = {
        "role": "radio",
        "aria_checked": "true" if chosen else "false",
        "aria_label": label,
        "tabindex": 0 if chosen else -1,
        "data_point": point.id,
    }
    mark = add(group, "g", class_="model", **radio)
    add(mark, "title", label)
    plot.bar(mark, x, point.metric - stderr, point.metric + stderr, class_)
    place = plot.mark(mark, x, point.metric, shape, f"{class_} dot")
    add(place, "circle", r=10, class_="ring")
    add(place, "circle", r=13, class_="touch", fill="transparent")
    if class_ == "uniform":
        share = plot.x.share(x)
        side = " end" if share > 1 - NEAR else "" if share < NEAR else " middle"
        add(place, "text", point.id, y=-15, class_=f"halo{side}")


def _reference_lines(facts: Facts, plot: Plot) -> None:
    """FP32 as a line across, the budget as a line down."""
    lines = add(plot.svg, "g", aria_hidden="true")
    y, x = plot.at_y(facts.fp32.metric), plot.at_x(facts.unit.value(facts.limit))
    add(lines, "line", x1=0, x2=plot.across(1), y1=y, y2=y, class_="dash")
    add(lines, "line", x1=x, x2=x, y1=plot.top, y2=plot.top + plot.height, class_="budget")
