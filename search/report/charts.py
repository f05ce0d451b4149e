"""The charts of a report, each drawn once: for the page one by one, for the picture together."""

import io
from collections.abc import Sequence

import altair as alt

from adq.proxies.base import Sensitivity
from adq.search.report.bits_chart import bits_charts
from adq.search.report.facts import Facts
from adq.search.report.front_chart import front_chart, interactive_front
from adq.search.report.history_chart import history_chart
from adq.search.report.sensitivity_chart import sensitivity_charts
from adq.search.report.theme import Chart, finished

SCALE, SPACING = 2, 24


def page_charts(facts: Facts) -> dict[str, Chart]:
    """Name -> chart; the names are `front`, `bits`, `sensitivity` and `history`."""
    front, metric = facts.front, facts.front.metric_name
    return {
        "front": finished(
            interactive_front(facts),
            f"{front.split.capitalize()} {metric} of the {len(front.points)} models of the front "
            f"against {facts.unit.title}, beside FP32 and models with the same bits in every "
            "layer; below it the bits of one model's layers.",
        ),
        "bits": finished(
            _beside(bits_charts(facts)),
            f"Bits of each of {len(facts.layers)} layers in each model of the front.",
        ),
        "sensitivity": finished(
            _beside(_sensitivities(facts)),
            f"Expected loss increase when one of {len(facts.layers)} layers alone is quantized, "
            "by bit-width.",
        ),
        "history": finished(
            history_chart(facts),
            f"Validation {metric} of each of {len(facts.trials)} trials, and the best so far.",
        ),
    }


def picture(facts: Facts) -> bytes:
    """front.png: the front above; below, the layers' bits beside their sensitivities."""
    front = facts.front
    partial = "" if front.split == "test" else ", stopped before the final training"
    title = alt.Title(
        f"{front.split.capitalize()} {front.metric_name} against {facts.unit.title}",
        subtitle=f"study {front.study}{partial}",
    )
    panels = [*bits_charts(facts), *_sensitivities(facts, labels=False)]
    width = sum(panel.width for panel in panels) + SPACING * (len(panels) - 1)
    above = front_chart(facts, width).properties(title=title)
    whole = alt.vconcat(above, _beside(panels), spacing=34)
    whole = whole.resolve_scale(color="independent", shape="independent")
    return png(whole)


def sensitivity_picture(proxies: Sequence[Sensitivity]) -> bytes:
    """The scores alone, as a PNG."""
    return png(_beside(sensitivity_charts(proxies, {}, {})))


def _sensitivities(facts: Facts, labels: bool = True) -> list[alt.LayerChart]:
    best = facts.front.best
    return sensitivity_charts(facts.proxies, best.weight_bits, best.act_bits, labels)


def png(chart: Chart) -> bytes:
    """A chart as a picture."""
    out = io.BytesIO()
    finished(chart, "").save(out, format="png", scale_factor=SCALE)
    return out.getvalue()


def _beside(charts: list[alt.LayerChart]) -> alt.HConcatChart:
    """Charts in a row whose layers stand on the same height."""
    row = alt.hconcat(*charts, spacing=SPACING, bounds="flush")
    return row.resolve_scale(color="independent")
