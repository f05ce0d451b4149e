"""One model at a time: the bits of its layers, and what each of them costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from adq.proxies.base import Table
from adq.quant.spec import MAX_BITS
from adq.search.breakdown import Breakdown, LayerCost
from adq.search.front import Point
from adq.search.report.bits_chart import input_bits
from adq.search.report.facts import Facts
from adq.search.report.svg import add, written
from adq.search.report.units import UNITS

BAR = 9
"""Pixels of a bit."""
Row = list[str]


@dataclass(frozen=True)
class Panel:
    """What a page shows of a model: a sentence, and a table of cells as text, a row a layer and
    below them `rest`. Cells of the columns `shares` are percentages of the whole model."""

    title: str
    summary: str
    weight: list[int]
    act: list[int]
    rows: list[Row]
    rest: list[Row]


def columns(facts: Facts) -> list[str]:
    """Titles of the table, after that of the layers."""
    known, score = facts.breakdown, f"expected loss increase, {facts.proxies[-1].proxy}"
    titles = ["bits of the weights", "bits of the inputs"]
    if known is not None:
        titles += ["weights", "kB", "% of kB", "kB in FP32", "GBOPs", "% of GBOPs"]
        titles += ["ms a sample", "% of ms"] if known.rest.latency_s is not None else []
    return [*titles, score]


def panels(facts: Facts) -> dict[str, Panel]:
    """Id -> panel, of every model in the chart of the front."""
    models = (*facts.front.points, *facts.front.uniform)
    return {point.id: _panel(facts, point) for point in models}


def _panel(facts: Facts, point: Point) -> Panel:
    front, known = facts.front, facts.breakdown
    best = " (best)" if point.id == front.best.id else ""
    costs = [
        UNITS[name].text(getattr(point, name))
        for name in UNITS
        if name != "average_bits_searched" and getattr(point, name) is not None
    ]
    metric = facts.metric_text(point.metric, point.metric_stderr)
    act = input_bits(point)
    rows: list[Row] = [
        [str(point.weight_bits[layer]), "FP32" if act[layer] > MAX_BITS else str(act[layer])]
        for layer in facts.layers
    ]
    rest: list[Row] = []
    if known is not None:
        cells, rest = _cost_cells(known, point)
        rows = [row + cell for row, cell in zip(rows, cells, strict=True)]
    weight_score = facts.proxies[-1].weight
    for layer, row in zip(facts.layers, rows, strict=True):
        row.append(_score(weight_score, layer, point.weight_bits[layer]))
    return Panel(
        title=f"{point.id}{best}",
        summary=f"{facts.metric_title} {metric}; {', '.join(costs)}",
        weight=[point.weight_bits[layer] for layer in facts.layers],
        act=[act[layer] for layer in facts.layers],
        rows=rows,
        rest=[[name, "", "", *cells, ""] for name, *cells in rest],
    )


def _cost_cells(known: Breakdown, point: Point) -> tuple[list[Row], list[Row]]:
    """Cells of each layer, and rows of all else, of the whole model and of FP32."""
    costs = [
        layer.costs.get((point.weight_bits[layer.name], point.act_bits.get(layer.name)))
        for layer in known.layers
    ]
    whole = LayerCost(point.size_bytes, point.bops, point.latency_s)
    rows = [
        [f"{layer.weights:,}", *_cells(cost, whole, layer.fp32.size_bytes)]
        for layer, cost in zip(known.layers, costs, strict=True)
    ]
    weights = f"{sum(layer.weights for layer in known.layers):,}"
    fixed = known.rest.size_bytes
    fp32 = LayerCost(
        fixed + sum(layer.fp32.size_bytes for layer in known.layers),
        sum(layer.fp32.bops for layer in known.layers),
    )
    rest = [
        ["all else", "", *_cells(known.rest, whole, fixed)],
        ["whole model", weights, *_cells(whole, whole, fp32.size_bytes)],
        ["FP32", weights, *_cells(fp32, whole, fp32.size_bytes)],
    ]
    return rows, rest


def _cells(cost: LayerCost | None, whole: LayerCost, fp32_bytes: int) -> Row:
    """Each cost and its share of the whole; empty where it is not known."""
    timed = whole.latency_s is not None
    if cost is None:
        return ["", "", UNITS["size_bytes"].number(fp32_bytes), *[""] * (4 if timed else 2)]
    cells = []
    for name in ("size_bytes", "bops", *(["latency_s"] if timed else [])):
        value, all_of_it = getattr(cost, name), getattr(whole, name)
        cells.append("" if value is None else UNITS[name].number(value))
        cells.append("" if value is None or not all_of_it else f"{100 * value / all_of_it:.1f}")
        if name == "size_bytes":
            cells.append(UNITS[name].number(fp32_bytes))
    return cells


def _score(table: Table, layer: str, bits: int) -> str:
    if layer not in table.layers or bits not in table.bits:
        return ""
    i, j = table.layers.index(layer), table.bits.index(bits)
    return f"{table.score[i, j]:.1e} ± {table.stderr[i, j]:.0e}"


def bars(layers: Sequence[str], panel: Panel, inputs: bool) -> Markup:
    """The bits of each layer as bars, in model order; with `inputs`, theirs as ticks."""
    count = len(layers)
    top = 10
    bottom = top + BAR * MAX_BITS
    svg = add(None, "svg", id="bars", class_="plot", height=bottom + 4, overflow="visible",
              role="img", aria_label="Bits of the layers, in model order")  # fmt: skip
    for bits in range(2, MAX_BITS + 1, 2):
        y = bottom - BAR * bits
        add(svg, "line", x1=0, x2="100%", y1=y, y2=y, class_="grid")
        add(svg, "text", str(bits), x=-6, y=y + 4, class_="end quiet")
    for i, (layer, weight, act) in enumerate(zip(layers, panel.weight, panel.act, strict=True)):
        x, width = 100 * i / count, 100 / count
        bar = add(svg, "rect", x=f"{x + width * 0.05:.4g}%", width=f"{width * 0.9:.4g}%",
                  y=bottom - BAR * weight, height=BAR * weight, class_=f"b{weight}",
                  data_name=layer)  # fmt: skip
        add(bar, "title", f"{layer}: {weight} bits")
        if inputs:
            y = bottom - BAR * min(act, MAX_BITS + 1)
            add(svg, "line", x1=f"{x:.4g}%", x2=f"{x + width:.4g}%", y1=y, y2=y, class_="tick")
    return Markup(written(svg))


def data(facts: Facts, found: dict[str, Panel]) -> dict[str, Any]:
    """What the page's script needs to show another model."""
    return {
        "best": facts.front.best.id,
        "bit": BAR,
        "models": {id: vars(panel) for id, panel in found.items()},
    }
