"""The chart of the search: validation metric of each trial, and the best so far."""

from collections.abc import Iterator, Sequence

from adq.quant.evaluate import Evaluation
from adq.search.candidate import Record
from adq.search.report.facts import Facts
from adq.search.report.svg import Key, Plot, Scale, add
from adq.search.report.theme import STEPS, WIDTHS, step_of
from adq.search.report.units import padded

HEIGHT = 230
MANY = 300
"""More trials than this, and their marks are small."""


def running_best(trials: Sequence[Record]) -> Iterator[tuple[int, float]]:
    """(trial number, highest validation metric until then), from the first success on."""
    best: float | None = None
    for record in trials:
        if record.validation is not None:
            metric = record.validation.metric
            best = metric if best is None else max(best, metric)
        if best is not None:
            yield int(record.id), best


def reached(record: Record) -> Evaluation | None:
    """What the longest training of a trial led to that did not fail."""
    if record.validation is not None or record.error is not None or not record.rungs:
        return record.validation
    return record.rungs[-1].validation


def history_keys(facts: Facts) -> list[Key]:
    """The legend: what colours, rings and crosses mean, as far as there are any."""
    low, high = _cost_ends(facts)
    unit = facts.unit
    keys = [
        Key("circle", f"b{WIDTHS[0]}", f"{unit.text(low)}"),
        Key("circle", f"b{WIDTHS[STEPS - 1]}", f"{unit.text(high)}"),
    ]
    if any(r.validation is None and reached(r) is not None for r in facts.trials):
        keys.append(Key("circle", f"b{WIDTHS[STEPS // 2]} open", "stopped early"))
    if any(r.error is not None for r in facts.trials):
        keys.append(Key("cross", "lost", "failed"))
    return keys


def _cost_ends(facts: Facts) -> tuple[float, float]:
    """The least and the largest cost of a trial, in the cost's own unit."""
    costs = [facts.cost_of(record.costs) for record in facts.trials]
    return min(costs), max(costs)


def history_chart(facts: Facts) -> Plot:
    """Trials coloured by cost, the best so far as steps, failed trials as crosses at the bottom.
    Open rings are trials that were stopped on a lower rung, where that left them."""
    name = f"validation {facts.front.metric_name}"
    found = {r.id: e for r in facts.trials if (e := reached(r)) is not None}
    up = padded((e.metric for e in found.values()), 0.14)
    last = max(int(record.id) for record in facts.trials)
    plot = Plot(Scale(-0.5, last + 0.5, whole=True), Scale(up[0], up[1]), HEIGHT)
    plot.axes("trial", name, grid=False)
    least, largest = _cost_ends(facts)
    steps: list[tuple[float, float]] = []
    for number, metric in running_best(facts.trials):
        steps += [(number, steps[-1][1])] if steps else []
        steps.append((number, metric))
    if steps:
        add(plot.frame(), "path", d=plot.path(steps), class_="curve step")
    radius = 4.0 if len(facts.trials) <= MANY else 2.5
    for record in facts.trials:
        cost, x = facts.cost_of(record.costs), plot.at_x(int(record.id))
        text, at = f"trial {int(record.id)}, {facts.unit.text(cost)}", found.get(record.id)
        if at is None:
            place = add(plot.svg, "svg", x=x, y=plot.top + HEIGHT - 10, overflow="visible")
            mark = add(place, "path", d="M-4-4L4 4M4-4L-4 4", class_="lost")
            add(mark, "title", f"{text}: {record.state}")
            continue
        step = step_of((cost - least) / ((largest - least) or 1))
        open_ = "" if record.validation is not None else " open"
        mark = add(
            plot.svg, "circle", cx=x, cy=plot.at_y(at.metric), r=radius, class_=f"b{step}{open_}"
        )
        stopped = f", {record.state}" if open_ else ""
        add(mark, "title", f"{text}: {facts.metric_text(at.metric, at.metric_stderr)}{stopped}")
    plot.described(
        f"Validation {facts.front.metric_name} of each of {len(facts.trials)} trials, and the best "
        "so far. The table of trials has the same numbers."
    )
    return plot
