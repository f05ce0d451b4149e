"""The chart of what each layer suffers at each bit-width, beside the bits that it got."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adq.proxies.base import Sensitivity, Table
from adq.search.report.svg import Plot, Scale, add
from adq.search.report.theme import cut

DECADES = 7
"""How far the axis reaches below the largest score. What lies further down is numerical zero: a
layer with fewer weights than levels, for one, has scores of 1e-16."""
ROW = 34
"""Pixels of a layer with its name above its marks."""


@dataclass(frozen=True)
class Scores:
    """One table of scores: what `proxy` says of the `kind` ("weights" or "inputs") of layers."""

    proxy: str
    kind: str
    table: Table


def all_scores(proxies: Sequence[Sensitivity]) -> Iterator[Scores]:
    """The tables of all proxies, of weights and then of inputs."""
    for s in proxies:
        yield Scores(s.proxy, "weights", s.weight)
        if s.act is not None and s.act.bits:
            yield Scores(s.proxy, "inputs", s.act)


def log_axis(tables: Sequence[Table]) -> tuple[float, float]:
    """(low, high) of an axis around all positive scores and their errors, DECADES long at most."""
    scores = [float(score) for table in tables for score in table.score.flat if score > 0]
    if not scores:
        return 10.0**-DECADES, 1.0
    ends = [float(end) for table in tables for end in (table.score + table.stderr).flat]
    return max(min(scores) / 2, max(scores) * 10.0**-DECADES), max(*ends, *scores) * 1.5


def sensitivity_chart(
    scores: Scores,
    axis: tuple[float, float],
    width: float | None = None,
    row: float = ROW,
    named: bool = True,
    top: float = 0,
) -> Plot:
    """Layers downwards in model order, expected loss increase across, a mark a bit-width.

    A score that is zero, negative or below the axis is an open triangle at its left end. Marks
    carry `data-layer` (its place), `data-kind` and `data-bits`, so that a page may ring some.
    """
    table, (low, high) = scores.table, axis
    edge = low * (low / high) ** 0.04  # room for the triangles inside the plot
    layers = len(table.layers)
    plot = Plot(Scale(edge, high, log=True), Scale(layers, 0), row * layers, width, top=top)
    plot.axes("expected loss increase", "", ticks=4)
    for i, layer in enumerate(table.layers):
        middle = top + row * i + (row - 10 if named else row / 2)
        if named:
            add(plot.svg, "text", cut(layer, 38), x=0, y=middle - 11)
        add(plot.svg, "line", x1=0, x2=plot.across(1), y1=middle, y2=middle, class_="grid")
        for j, bits in enumerate(table.bits):
            value, stderr = float(table.score[i, j]), float(table.stderr[i, j])
            mark = add(plot.svg, "g", class_="score", data_layer=i, data_kind=scores.kind,
                       data_bits=bits)  # fmt: skip
            add(mark, "title", f"{layer}, {bits} bits: {value:.3g} ± {stderr:.1g}")
            inside = value >= low
            ends = [min(max(end, low), high) for end in (value - stderr, value + stderr)]
            if inside:
                add(mark, "line", x1=plot.at_x(ends[0]), x2=plot.at_x(ends[1]), y1=middle,
                    y2=middle, class_=f"bar b{bits}")  # fmt: skip
            place = add(mark, "svg", x=plot.at_x(max(value, low)), y=middle, overflow="visible")
            shape = {"r": 4} if inside else {"d": "M-5 0L4-5V5z"}
            add(place, "circle" if inside else "path", **shape,
                class_=f"b{bits}" + ("" if inside else " open"))  # fmt: skip
            add(place, "circle", r=7, class_="ring")
    plot.described(
        f"Expected loss increase, {scores.proxy}, when one of {layers} layers alone has its "
        f"{scores.kind} quantized, by bit-width. A table follows."
    )
    return plot
