"""The chart of the search: validation metric of each trial, and the best so far."""

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from adq.quant.evaluate import Evaluation
from adq.search.candidate import Record
from adq.search.report.facts import Facts
from adq.search.report.theme import INK, ORANGE, RAMP, number_axis, rows
from adq.search.report.units import padded

WIDTH, HEIGHT = 640, 260


def running_best(trials: Sequence[Record]) -> Iterator[tuple[int, float]]:
    """(trial number, highest validation metric until then), from the first success on."""
    best: float | None = None
    for record in trials:
        if record.validation is not None:
            metric = record.validation.metric
            best = metric if best is None else max(best, metric)
        if best is not None:
            yield int(record.id), best


def history_chart(facts: Facts) -> alt.LayerChart:
    """Trials coloured by cost, the best so far as steps, failed trials as crosses at the bottom.
    Open rings are trials that were stopped on a lower rung, where that left them."""
    unit, name = facts.unit, f"validation {facts.front.metric_name}"
    done = [_row(facts, r) for r in facts.trials if r.validation is not None]
    failed = [_row(facts, r) for r in facts.trials if r.error is not None]
    stopped = [
        _row(facts, r) | {"state": r.state}
        for r in facts.trials
        if r.validation is None and reached(r) is not None
    ]
    best = [{"trial": number, "metric": metric} for number, metric in running_best(facts.trials)]
    last = max(int(record.id) for record in facts.trials)
    x = number_axis(
        alt.X, "trial", "trial", [-0.5, last + 0.5], format="d", tickMinStep=1, grid=False
    )
    y = number_axis(
        alt.Y, "metric", name, padded((r["metric"] for r in done + stopped), 0.14), tickCount=6
    )
    colour = alt.Color(
        "cost",
        type="quantitative",
        scale=alt.Scale(domain=padded((r["cost"] for r in done + stopped), 0.0), range=RAMP),
        legend=alt.Legend(title=unit.title, orient="top", gradientLength=260),
    )

    def tooltip(**others: str) -> list[alt.Tooltip]:
        texts = {"trial": "trial", "cost_text": unit.title} | others
        return [alt.Tooltip(key, type="nominal", title=title) for key, title in texts.items()]

    steps = alt.Chart(rows(best)).mark_line(interpolate="step-after", color=INK, opacity=0.6)
    dots = alt.Chart(rows(done)).mark_point(filled=True, size=75, opacity=1)
    crosses = alt.Chart(rows(failed)).mark_point(
        shape="M-1,-1L1,1M1,-1L-1,1", size=50, strokeWidth=2.5, color=ORANGE, opacity=1
    )
    rings = alt.Chart(rows(stopped)).mark_point(size=55, strokeWidth=1.6, opacity=1)
    layers = [
        rings.encode(x, y, colour, tooltip=tooltip(metric_text=name, state="state")),
        steps.encode(x, y),
        dots.encode(x, y, colour, tooltip=tooltip(metric_text=name)),
        crosses.encode(x, y=alt.value(HEIGHT - 10), tooltip=tooltip(error="error")),
    ]
    return alt.LayerChart(layer=layers, width=WIDTH, height=HEIGHT)


def reached(record: Record) -> Evaluation | None:
    """What the longest training of a trial led to that did not fail."""
    if record.validation is not None or record.error is not None or not record.rungs:
        return record.validation
    return record.rungs[-1].validation


def _row(facts: Facts, record: Record) -> dict[str, Any]:
    cost, found = facts.cost_of(record.costs), reached(record)
    row = {
        "trial": int(record.id),
        "cost": facts.unit.value(cost),
        "cost_text": facts.unit.number(cost),
    }
    if found is None:
        return row | {"error": record.error}
    text = facts.metric_text(found.metric, found.metric_stderr)
    return row | {"metric": found.metric, "metric_text": text}
