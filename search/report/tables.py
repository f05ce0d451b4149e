"""The tables of a page, as texts: models, trials, losses, and what failed and why."""

from collections.abc import Iterator
from dataclasses import dataclass

from adq.quant.evaluate import Evaluation
from adq.search.candidate import Record
from adq.search.front import TOLERANCE, Point
from adq.search.report.facts import Facts
from adq.search.report.history_chart import reached
from adq.search.report.units import UNITS

NAMED = 20
"""As many trials as a row of failures names."""


@dataclass(frozen=True)
class Model:
    """A row of the table of models: cells as text, empty where there is nothing to say.

    `metric` was measured on the front's split, `at` is the first cost with its unit.
    """

    id: str
    at: str
    metric: str
    validation: str
    costs: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """A row of the table of trials, in the same way; `rungs` says what shorter trainings led to,
    `state` how it ended."""

    number: int
    cost: str
    metric: str
    loss: str
    rungs: str
    seconds: str
    state: str


@dataclass(frozen=True)
class Loss:
    """Candidates that came to the same end: `what` they are, `which`, and the `reason`."""

    what: str
    which: str
    count: int
    reason: str


def shown_costs(facts: Facts) -> list[str]:
    return [name for name in UNITS if getattr(facts.front.best, name) is not None]


def model_row(facts: Facts, point: Point) -> Model:
    final = facts.record_of(point)
    costs = shown_costs(facts)
    values = [getattr(point, name) for name in costs]
    return Model(
        id=point.id,
        at=facts.unit.text(facts.cost_of(point)),
        metric=facts.metric_text(point.metric, point.metric_stderr),
        validation="" if final is None else evaluation_text(facts, final.validation),
        costs=tuple(
            "" if value is None else UNITS[name].number(value)
            for name, value in zip(costs, values, strict=True)
        ),
    )


def fp32_row(facts: Facts) -> Model:
    known = {"average_bits": "32", "average_bits_searched": "32"}
    if facts.breakdown is not None:
        layers = facts.breakdown.layers
        size = sum(la.fp32.size_bytes for la in layers) + facts.breakdown.rest.size_bytes
        known["size_bytes"] = UNITS["size_bytes"].number(size)
        known["bops"] = UNITS["bops"].number(sum(layer.fp32.bops for layer in layers))
        known["average_act_bits"] = "32"
    return Model(
        "FP32",
        "32 bits a weight",
        evaluation_text(facts, facts.fp32),
        evaluation_text(facts, facts.fp32_validation),
        tuple(known.get(name, "") for name in shown_costs(facts)),
    )


def trial_row(facts: Facts, record: Record) -> Trial:
    found = reached(record)
    shorter = [f"{rung.epochs}: {_short(facts, rung.validation)}" for rung in record.rungs[:-1]]
    return Trial(
        number=int(record.id),
        cost=facts.unit.number(facts.cost_of(record.costs)),
        metric=evaluation_text(facts, found),
        loss="" if found is None else f"{found.loss:#.4g}",
        rungs=", ".join(shorter),
        seconds=f"{record.seconds:.1f}",
        state=record.state,
    )


def _short(facts: Facts, found: Evaluation | None) -> str:
    return "failed" if found is None else f"{found.metric:{facts.metric_format}}"


def evaluation_text(facts: Facts, found: Evaluation | None) -> str:
    return "" if found is None else facts.metric_text(found.metric, found.metric_stderr)


def loss_rows(facts: Facts) -> list[tuple[str, list[str]]]:
    """(name, training loss after each epoch) of FP32 and of the models of the front's chart."""
    curves = [("FP32", facts.fp32_losses)]
    for point in (*facts.front.points, *facts.front.uniform):
        record = facts.record_of(point)
        curves.append((point.id, () if record is None else record.train_losses))
    longest = max(len(losses) for _, losses in curves)
    return [
        (name, [f"{loss:.4g}" for loss in losses] + [""] * (longest - len(losses)))
        for name, losses in curves
    ]


def losses(facts: Facts) -> list[Loss]:
    """What was tried and is not on the front for another reason than its numbers: failed, stopped
    early, over the budget; and the final models that others beat. Equal ends are one row."""
    ends: dict[tuple[str, str], list[str]] = {}
    for id, what, reason in _ends(facts):
        ends.setdefault((what, reason), []).append(id)
    return [Loss(what, _listed(ids), len(ids), reason) for (what, reason), ids in ends.items()]


def _listed(ids: list[str]) -> str:
    """The ids, or the first of many: the table of trials says how each ended."""
    more = len(ids) - NAMED
    return ", ".join(ids[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _ends(facts: Facts) -> Iterator[tuple[str, str, str]]:
    """(which, what happened, why) of each."""
    top = facts.config.epochs
    for record in facts.trials:
        number = str(int(record.id))
        if record.error is not None:
            yield number, _kind(record.error), record.error
        elif record.validation is None:
            reason = f"after {record.epochs} of {top} epochs, as others of its cost were better"
            yield number, "trial stopped early", reason
        elif over_budget(facts, record):
            yield number, "trial over the budget", "it is dearer than this page's budget allows"
    for id, reason in left_out(facts):
        yield id, "final model not on the front", reason


def _kind(error: str) -> str:
    """Whether a trial's loss became nan or infinite, or something else went wrong."""
    words = error.lower().replace(",", " ").split()
    non_finite = any(word in ("nan", "inf", "infinite", "non-finite") for word in words)
    return "trial failed: non-finite" if non_finite else "trial failed: error"


def over_budget(facts: Facts, record: Record) -> bool:
    limits = facts.front.budget.items()
    return any(getattr(record.costs, n) > limit * (1 + TOLERANCE) for n, limit in limits)


def left_out(facts: Facts) -> list[tuple[str, str]]:
    """(id, why) of each final model that is not on the front."""
    front = facts.front
    if front.split != "test":
        return []
    shown = {p.id for p in (*front.points, *front.uniform)}

    def why(record: Record) -> str:
        if record.error is not None:
            return record.error
        return "over the budget" if over_budget(facts, record) else "beaten by others"

    return [(id, why(record)) for id, record in facts.finals.items() if id not in shown]
