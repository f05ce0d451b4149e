"""The Pareto front of a finished study, and its JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from adq.search.candidate import Record
from adq.search.pareto import non_dominated

SCHEMA = "adq-front/1"


@dataclass(frozen=True)
class Point:
    """One model of the front. `metric` is measured on the test split and never chose anything;
    `weights` is the packed file's path inside the study folder."""

    id: str
    metric: float
    metric_stderr: float
    average_bits: float
    average_bits_searched: float
    size_bytes: int
    bops: int
    latency_s: float | None
    weight_bits: dict[str, int]
    act_bits: dict[str, int]
    seed: int
    weights: str


@dataclass(frozen=True)
class Front:
    """The models that no other final model beats in both validation metric and every cost.

    `points` go from cheap to dear. `best` has the highest validation metric (then the lowest
    validation loss). `uniform` are fine-tuned as long as the points, with the same bits in every
    searched layer, for comparison: they may lie outside the budget and are no part of the front.
    """

    study: str
    task: str
    metric_name: str
    fp32_metric: float
    points: tuple[Point, ...]
    best: Point
    uniform: tuple[Point, ...] = ()
    folder: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        """The content of front.json, schema `adq-front/1`."""
        return {
            "schema": SCHEMA,
            "study": self.study,
            "task": self.task,
            "metric_name": self.metric_name,
            "fp32_metric": self.fp32_metric,
            "points": [asdict(point) for point in self.points],
        }


def point_of(record: Record) -> Point:
    """A final record (trained, tested and saved) as a point."""
    assert record.test is not None
    assert record.weights is not None
    costs = record.costs
    return Point(
        id=record.id,
        metric=record.test.metric,
        metric_stderr=record.test.metric_stderr,
        average_bits=costs.average_bits,
        average_bits_searched=costs.average_bits_searched,
        size_bytes=costs.size_bytes,
        bops=costs.bops,
        latency_s=costs.latency_s,
        weight_bits=dict(record.bits.weight),
        act_bits=dict(record.bits.act),
        seed=record.seed,
        weights=record.weights,
    )


def front_records(records: list[Record], objectives: tuple[str, ...]) -> list[Record]:
    """The records not dominated in (validation metric, costs), cheapest first; failed ones never.

    Equal metrics and costs are told apart by the validation loss: the lower one stays.
    """
    done = [r for r in records if r.validation is not None]
    done.sort(key=lambda r: r.validation.loss if r.validation else 0.0)
    values = [
        [-r.validation.metric, *(getattr(r.costs, name) for name in objectives)]
        for r in done
        if r.validation is not None
    ]
    kept = [done[i] for i in non_dominated(values)] if done else []
    return sorted(kept, key=lambda r: [getattr(r.costs, name) for name in objectives])


def best_record(records: list[Record]) -> Record:
    """Highest validation metric; ties go to the lowest validation loss."""

    def rank(record: Record) -> tuple[float, float]:
        assert record.validation is not None
        return -record.validation.metric, record.validation.loss

    return min(records, key=rank)
