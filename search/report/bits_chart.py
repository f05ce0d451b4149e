"""The bits that each point of the front gives to each layer, for the picture."""

from collections.abc import Mapping
from typing import NamedTuple

from adq.quant.spec import FP32_BITS
from adq.search.front import Point
from adq.search.report.facts import Facts
from adq.search.report.svg import Element, add
from adq.search.report.theme import cut

LONGEST_LABEL = 34
LETTER = 6.2
"""Pixels of a letter of a label, about."""
MANY = 6
"""More points than this, and their labels stand upright."""
HEAD, FOOT = 44, 110


class Panel(NamedTuple):
    """A part of a picture."""

    svg: Element
    width: float
    height: float


def input_bits(point: Point) -> dict[str, int]:
    """Bits of the input of each layer, FP32 as 32."""
    return {layer: point.act_bits.get(layer, FP32_BITS) for layer in point.weight_bits}


def bits_maps(facts: Facts) -> dict[str, dict[str, Mapping[str, int]]]:
    """ "weights", and "inputs" where those vary -> id -> layer -> bits, for each point."""
    points = facts.front.points
    maps: dict[str, dict[str, Mapping[str, int]]] = {
        "weights": {p.id: p.weight_bits for p in points}
    }
    if facts.input_bits_vary:
        maps["inputs"] = {p.id: input_bits(p) for p in points}
    return maps


def row_height(layers: int) -> float:
    """Pixels of a layer's row: roomy for a small model, never too low for its label."""
    return max(12, min(24, 480 // layers))


def bits_panels(facts: Facts) -> list[Panel]:
    """Layers downwards, points across, cheap to dear, bits in the cells."""
    return [
        _panel(facts, kind, bits, labels=i == 0)
        for i, (kind, bits) in enumerate(bits_maps(facts).items())
    ]


def _panel(facts: Facts, kind: str, bits: Mapping[str, Mapping[str, int]], labels: bool) -> Panel:
    layers, points = facts.layers, facts.front.points
    names = [cut(layer, LONGEST_LABEL) for layer in layers]
    left = LETTER * max(map(len, names)) + 10 if labels else 0
    column = max(190 / len(points), 56 if len(points) <= MANY else 22)
    row = row_height(len(layers))
    svg = add(None, "svg", overflow="visible")
    add(svg, "text", f"Bits of the {kind}", x=left, y=14, class_="head")
    fp32 = ", 32 is FP32" if any(FP32_BITS in of.values() for of in bits.values()) else ""
    add(svg, "text", f"points, cheap to dear{fp32}; best in bold", x=left, y=31, class_="quiet")
    for i, (layer, name) in enumerate(zip(layers, names, strict=True)):
        y = HEAD + row * i
        if labels:
            add(svg, "text", name, x=left - 6, y=y + row / 2 + 4, class_="end")
        for j, point in enumerate(points):
            x, width = left + column * j, bits[point.id][layer]
            add(
                svg,
                "rect",
                x=x,
                y=y,
                width=column - 1,
                height=row - 1,
                class_=f"b{width}",
                stroke_width=0,
            )
            add(svg, "text", str(width), x=x + column / 2, y=y + row / 2 + 4,
                class_=f"middle t{width}")  # fmt: skip
    bottom = HEAD + row * len(layers)
    for j, point in enumerate(points):
        x = left + column * (j + 0.5)
        best = " strong" if point.id == facts.front.best.id else ""
        cost = facts.unit.number(facts.cost_of(point))
        if len(points) <= MANY:
            add(svg, "text", point.id, x=x, y=bottom + 16, class_=f"middle{best}")
            add(svg, "text", cost, x=x, y=bottom + 32, class_=f"middle{best}")
        else:
            turned = f"rotate(-90 {x + 4:.4g} {bottom + 8:.4g})"
            add(svg, "text", f"{point.id}   {cost}", x=x + 4, y=bottom + 8, transform=turned,
                class_=f"end{best}")  # fmt: skip
    return Panel(svg, left + column * len(points), bottom + FOOT)
