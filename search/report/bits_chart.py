"""The chart of the bits that each point of the front gives to each layer."""

import json
from collections.abc import Mapping
from typing import Any

import altair as alt

from adq.search.front import Point
from adq.search.report.facts import Facts
from adq.search.report.theme import FP32_BITS, bits_scale, layer_axis, row_height, rows

MANY = 6
"""More points than this, and their labels stand upright."""
LEAST_WIDTH = 190


def bits_charts(facts: Facts) -> list[alt.LayerChart]:
    """Layers downwards, points across, weight bits in the cells; where input bits vary, a second
    map with those beside it."""
    maps = [_heat_map(facts, "weights", {p.id: p.weight_bits for p in facts.front.points}, True)]
    if facts.input_bits_vary:
        inputs = {p.id: _input_bits(p) for p in facts.front.points}
        maps.append(_heat_map(facts, "inputs", inputs, False))
    return maps


def _input_bits(point: Point) -> dict[str, int]:
    return {layer: point.act_bits.get(layer, FP32_BITS) for layer in point.weight_bits}


def _heat_map(
    facts: Facts, kind: str, bits: Mapping[str, Mapping[str, int]], labels: bool
) -> alt.LayerChart:
    points, layers = facts.front.points, facts.layers
    costs = {p.id: facts.unit.number(facts.cost_of(p)) for p in points}
    cells: list[dict[str, Any]] = [
        {"layer": layer, "point": p.id, "bits": bits[p.id][layer], "cost": costs[p.id]}
        for p in points
        for layer in layers
    ]
    widths = sorted({cell["bits"] for cell in cells})
    height = row_height(len(layers))
    base = alt.Chart(rows(cells)).encode(
        x=_point_axis(facts, costs),
        y=layer_axis(layers, labels),
        tooltip=[
            alt.Tooltip("layer", type="nominal"),
            alt.Tooltip("point", type="nominal"),
            alt.Tooltip("cost", type="nominal", title=facts.unit.title),
            alt.Tooltip("bits", type="quantitative", title=f"bits of the {kind}"),
        ],
    )
    pale = alt.FieldOneOfPredicate(field="bits", oneOf=[2, 3, FP32_BITS])
    fp32 = ", 32 is FP32" if FP32_BITS in widths else ""
    marks = [
        base.mark_rect(stroke="white", strokeWidth=1).encode(
            color=alt.Color("bits", type="ordinal", scale=bits_scale(widths), legend=None)
        ),
        base.mark_text(fontSize=min(12, height - 2)).encode(
            text=alt.Text("bits", type="quantitative"),
            color=alt.when(pale).then(alt.value("black")).otherwise(alt.value("white")),
        ),
    ]
    return alt.LayerChart(
        layer=marks,
        width=column_width(len(points)) * len(points),
        height=height * len(layers),
        title=alt.Title(
            f"Bits of the {kind}", subtitle=[f"points, cheap to dear{fp32}", "best in bold"]
        ),
    )


def _point_axis(facts: Facts, costs: Mapping[str, str]) -> alt.X:
    """Ids with their costs, the best one bold; turned when there are many."""
    wide = len(costs) <= MANY
    texts = {id: [id, cost] if wide else f"{id}   {cost}" for id, cost in costs.items()}
    best = f"datum.value == {json.dumps(facts.front.best.id)}"
    axis = alt.Axis(
        title=facts.unit.title,
        labelAngle=0 if wide else -90,
        labelExpr=f"{json.dumps(texts)}[datum.value]",
        labelFontWeight=alt.condition(best, alt.value("bold"), alt.value("normal")),
        labelLimit=0,
        labelOverlap=False,
        ticks=False,
        domain=False,
    )
    return alt.X("point", type="nominal", scale=alt.Scale(domain=list(costs)), axis=axis)


def column_width(points: int) -> int:
    """Pixels of a point's column: room for its label, and for the title above them all."""
    return max(LEAST_WIDTH // points, 56 if points <= MANY else 22)
