"""Charts put together: for the page one by one, for the picture on one sheet."""

from collections.abc import Sequence
from dataclasses import dataclass

import vl_convert
from markupsafe import Markup

from adq.proxies.base import Sensitivity
from adq.search.report.bits_chart import HEAD, Panel, bits_panels, row_height
from adq.search.report.curves_chart import loss_chart, loss_keys, rung_chart
from adq.search.report.facts import Facts
from adq.search.report.front_chart import front_chart, front_keys
from adq.search.report.history_chart import history_chart, history_keys
from adq.search.report.sensitivity_chart import all_scores, log_axis, sensitivity_chart
from adq.search.report.svg import Element, Key, Plot, add, key_line, written
from adq.search.report.theme import WIDTHS, picture_rules

MARGIN, GAP = 20, 30
LARGE = 2.5e6
"""Square pixels from which a picture is drawn one to one instead of two to one."""
LEFT, LEAST_WIDTH = 60, 640
SENSITIVITY_WIDTH = 200


@dataclass(frozen=True)
class Chart:
    """A chart of a page: its drawing, ready to stand in HTML, and its legend."""

    svg: Markup
    keys: tuple[Key, ...] = ()
    title: str = ""


def page_charts(facts: Facts) -> dict[str, Chart | None]:
    """`front`, `losses`, `rungs` and `history`; None where there is nothing to draw."""
    losses, rungs = loss_chart(facts), rung_chart(facts)
    return {
        "front": chart(front_chart(facts), front_keys(facts)),
        "losses": None if losses is None else chart(losses, loss_keys(facts)),
        "rungs": None if rungs is None else chart(rungs),
        "history": chart(history_chart(facts), history_keys(facts)),
    }


def chart(plot: Plot, keys: Sequence[Key] = (), title: str = "") -> Chart:
    return Chart(Markup(written(plot.svg)), tuple(keys), title)


def page_sensitivities(proxies: Sequence[Sensitivity]) -> list[Chart]:
    """One chart a proxy and kind, on one axis."""
    panels = list(all_scores(proxies))
    axis = log_axis([panel.table for panel in panels])
    return [
        chart(sensitivity_chart(panel, axis), (), f"{panel.proxy}, {panel.kind}")
        for panel in panels
    ]


def width_keys(widths: Sequence[int]) -> list[Key]:
    """The legend of bit-widths."""
    return [Key("circle", f"b{bits}", f"{bits} bits") for bits in WIDTHS if bits in widths]


def picture(facts: Facts) -> bytes:
    """front.png: the front above; below, the layers' bits beside their sensitivities."""
    front = facts.front
    partial = "" if front.split == "test" else ", stopped before the final training"
    panels = [*bits_panels(facts), *_panels(facts.proxies, facts)]
    width = max(sum(p.width + GAP for p in panels) - GAP, LEAST_WIDTH + LEFT)
    above = front_chart(facts, width - LEFT)
    title = f"{facts.metric_title.capitalize()} against {facts.unit.title}"
    return sheet(above, front_keys(facts), title, f"study {front.study}{partial}", width, panels)


def sheet(
    above: Plot,
    keys: Sequence[Key],
    title: str,
    subtitle: str,
    width: float,
    panels: Sequence[Panel] = (),
) -> bytes:
    """A titled chart with its legend, and panels in a row below it, as a PNG."""
    root = add(None, "svg")
    add(root, "text", title, x=MARGIN, y=30, class_="head")
    add(root, "text", subtitle, x=MARGIN, y=48, class_="quiet")
    key_line(root, keys, MARGIN + LEFT, 74)
    height = above.top + above.height + 40
    _put(root, above.svg, MARGIN + LEFT, 84)
    x, y = float(MARGIN), 84 + height + GAP
    for panel in panels:
        _put(root, panel.svg, x, y)
        x += panel.width + GAP
    lowest = max((panel.height for panel in panels), default=-GAP)
    return png(root, width + 2 * MARGIN, y + lowest)


def sensitivity_picture(proxies: Sequence[Sensitivity]) -> bytes:
    """The scores alone, as a PNG."""
    panels, root, x = _panels(proxies, None), add(None, "svg"), float(MARGIN)
    for panel in panels:
        _put(root, panel.svg, x, MARGIN)
        x += panel.width + GAP
    return png(root, x, MARGIN + panels[0].height)


def _panels(proxies: Sequence[Sensitivity], facts: Facts | None) -> list[Panel]:
    """Panels of scores whose layers stand on the same height as in the maps of bits; without
    those, the first one names the layers. Rings mark the bits of the best point."""
    scores = list(all_scores(proxies))
    axis = log_axis([each.table for each in scores])
    layers = len(proxies[0].weight.layers)
    found = []
    for i, each in enumerate(scores):
        named = facts is None
        row = 34 if named else row_height(layers)
        plot = sensitivity_chart(each, axis, SENSITIVITY_WIDTH, row, named, HEAD)
        add(plot.svg, "text", f"Sensitivity of the {each.kind}", x=0, y=14, class_="head")
        ring = "" if facts is None else "; ring: best point"
        add(plot.svg, "text", each.proxy + ring, x=0, y=31, class_="quiet")
        height = plot.top + plot.height + 44
        if facts is not None:
            best = facts.front.best
            bits = best.weight_bits if each.kind == "weights" else best.act_bits
            _ring(plot.svg, [bits.get(layer) for layer in facts.layers])
        if i == 0:
            key_line(plot.svg, width_keys(each.table.bits), 0, height + 16)
        found.append(Panel(plot.svg, SENSITIVITY_WIDTH, height + 30))
    return found


def _ring(svg: Element, bits: Sequence[int | None]) -> None:
    """Ring the marks of these bits, one for each layer."""
    for mark in svg.iter("g"):
        layer = mark.get("data-layer")
        if layer is not None and mark.get("data-bits") == str(bits[int(layer)]):
            mark.set("class", "score chosen")


def _put(root: Element, part: Element, x: float, y: float) -> None:
    part.set("x", f"{x:.6g}")
    part.set("y", f"{y:.6g}")
    root.append(part)


def png(root: Element, width: float, height: float) -> bytes:
    """A drawing on white as a picture."""
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("width", f"{width:.6g}")
    root.set("height", f"{height:.6g}")
    rules = Element("style")
    rules.text = picture_rules()
    root.insert(0, rules)
    back = Element("rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
    root.insert(1, back)
    scale = 2 if width * height < LARGE else 1
    return bytes(vl_convert.svg_to_png(written(root), scale=scale))
