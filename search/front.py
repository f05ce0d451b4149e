"""The Pareto front of a study, and its JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal, get_args

from adq.quant.errors import InputError
from adq.search.budget import OPTION_OF
from adq.search.candidate import Record
from adq.search.pareto import hypervolume, knee, non_dominated

SCHEMA = "adq-front/2"

BEYOND = 1.1
"""The reference cost of a hypervolume as a multiple of the budget: a tenth beyond it, so that a
model right at the budget counts as well."""

TOLERANCE = 1e-9
"""A cost may exceed its limit by this share, as in a search (`CostModel.limits`)."""

Split = Literal["test", "validation"]


@dataclass(frozen=True)
class Point:
    """One model of a front.

    `metric` with its standard error was measured on `samples` samples of the front's split.
    `validation_metric` and `validation_loss` are what models are chosen by. The costs are those of
    `adq.proxies.costs.Costs`. `weights` is the packed file's path inside the study folder, None
    where none was packed.
    """

    id: str
    metric: float
    metric_stderr: float
    samples: int
    validation_metric: float
    validation_loss: float
    average_bits: float
    average_bits_searched: float
    average_act_bits: float
    size_bytes: int
    bops: int
    latency_s: float | None
    weight_bits: dict[str, int]
    act_bits: dict[str, int]
    seed: int
    weights: str | None


@dataclass(frozen=True)
class Front:
    """The models that no other one of the study beats in both validation metric and every cost.

    `points` go from cheap to dear. `split` is where their metric was measured: `test`, which chose
    nothing, or `validation` for a partial front, of a search that was stopped before its final
    training. `budget` maps a cost to its limit, `objectives` each cost that the study minimised to
    its limit or, where it has none, to the largest that its choices of bits reach. `uniform` are
    fine-tuned as long as the points, with the same bits in every searched layer, for comparison:
    they may lie outside the budget and are no part of the front.
    """

    study: str
    task: str
    metric_name: str
    fp32_metric: float
    budget: dict[str, float]
    objectives: dict[str, float]
    points: tuple[Point, ...]
    uniform: tuple[Point, ...] = ()
    split: Split = "test"
    folder: str = field(default="", compare=False)

    @property
    def best(self) -> Point:
        """The point with the highest validation metric, then the lowest validation loss."""
        return min(self.points, key=_by_validation)

    def within(self, limits: Mapping[str, float]) -> "Front":
        """The part of the front under tighter limits, cost name -> limit as in `budget`.

        Raises InputError when no point is within them, or when the points lack a cost.
        """
        found = self.points
        for name, limit in limits.items():
            option, unit = OPTION_OF[name]
            costs = [getattr(point, name) for point in found]
            if None in costs:
                raise InputError(
                    f"{option}: study {self.study!r} has no {name}, it was run without --latency"
                )
            kept = tuple(
                p for p, c in zip(found, costs, strict=True) if c <= limit * (1 + TOLERANCE)
            )
            if not kept:
                raise InputError(
                    f"{option} {limit / unit:g}: no model of study {self.study!r} is within it; "
                    f"the cheapest needs {min(costs) / unit:.4g}"
                )
            found = kept
        tighter = {n: min(limit, self.budget.get(n, limit)) for n, limit in limits.items()}
        objectives = {name: tighter.get(name, end) for name, end in self.objectives.items()}
        return replace(self, points=found, budget=self.budget | tighter, objectives=objectives)

    def best_under(self, limits: Mapping[str, float]) -> Point:
        """The best point of those `within` the limits."""
        return self.within(limits).best

    @property
    def knee(self) -> Point | None:
        """The point where the front bends most, see `pareto.knee`; None where it does not bend.

        The front is that of validation metric against cost, the mean share of `objectives` that a
        point takes: several costs mostly rise together, and count as one.
        """
        shares = [
            fmean(getattr(p, name) / end for name, end in self.objectives.items())
            for p in self.points
        ]
        values = [(-p.validation_metric, s) for p, s in zip(self.points, shares, strict=True)]
        kept = non_dominated(values)
        index = knee([values[i] for i in kept])
        return None if index is None else self.points[kept[index]]

    @property
    def reference(self) -> dict[str, float]:
        """The reference point of the hypervolume: `metric`, and each of the costs `objectives`.

        The metric is zero where FP32's is positive, otherwise as far below FP32's as that is below
        zero: fp32 − |fp32|. A cost is BEYOND times its value in `objectives`.
        """
        costs = {name: end * BEYOND for name, end in self.objectives.items()}
        return {"metric": self.fp32_metric - abs(self.fp32_metric), **costs}

    def hypervolume(self, reference: Mapping[str, float] | None = None) -> float:
        """What the points dominate up to `reference` (`self.reference` if not given).

        Costs are divided by their reference first. With one cost and a metric of reference zero
        the hypervolume is then the mean metric of the best point under a budget that is drawn
        evenly between nothing and the reference (zero where no point is within it).
        """
        corner = self.reference if reference is None else reference
        costs = [name for name in corner if name != "metric"]
        values = [
            [-p.metric, *(getattr(p, name) / corner[name] for name in costs)] for p in self.points
        ]
        return hypervolume(values, [-corner["metric"], *[1.0] * len(costs)])

    def to_json(self) -> dict[str, Any]:
        """The content of front.json, schema `adq-front/2`."""
        return {
            "schema": SCHEMA,
            "study": self.study,
            "task": self.task,
            "split": self.split,
            "metric_name": self.metric_name,
            "fp32_metric": self.fp32_metric,
            "budget": self.budget,
            "objectives": self.objectives,
            "best": self.best.id,
            "knee": None if self.knee is None else self.knee.id,
            "hypervolume": {"value": self.hypervolume(), "reference": self.reference},
            "points": [asdict(point) for point in self.points],
            "uniform": [asdict(point) for point in self.uniform],
        }

    @staticmethod
    def from_json(data: Any, folder: str = "") -> "Front":
        """The inverse of `to_json`; what follows from the points is computed anew.

        Raises InputError for another schema, KeyError, TypeError or ValueError for damage.
        """
        if data["schema"] != SCHEMA:
            raise InputError(
                f"expected schema {SCHEMA}, got {data['schema']!r}, of another version of ADQ: run "
                "the study again"
            )
        front = Front(
            study=data["study"],
            task=data["task"],
            metric_name=data["metric_name"],
            fp32_metric=float(data["fp32_metric"]),
            budget={name: float(limit) for name, limit in data["budget"].items()},
            objectives={name: float(end) for name, end in data["objectives"].items()},
            points=tuple(_point(point) for point in data["points"]),
            uniform=tuple(_point(point) for point in data["uniform"]),
            split=data["split"],
            folder=folder,
        )
        if not front.points or front.split not in get_args(Split):
            raise ValueError("no points, or an unknown split")
        return front


def _point(data: dict[str, Any]) -> Point:
    point = Point(**data)
    whole = (point.samples, point.size_bytes, point.bops, point.seed)
    real = [
        *(point.metric, point.metric_stderr, point.validation_metric, point.validation_loss),
        *(point.average_bits, point.average_bits_searched, point.average_act_bits),
        0.0 if point.latency_s is None else point.latency_s,
    ]
    if not all(type(number) is int for number in whole) or not all(map(math.isfinite, real)):
        raise TypeError(f"point {point.id} has something else where a number belongs")
    return point


def point_of(record: Record, split: Split = "test") -> Point:
    """A record as a point, with what was measured on `split`; a final record has both splits."""
    measured = record.test if split == "test" else record.validation
    assert measured is not None
    assert record.validation is not None
    return Point(
        id=record.id,
        metric=measured.metric,
        metric_stderr=measured.metric_stderr,
        samples=measured.samples,
        validation_metric=record.validation.metric,
        validation_loss=record.validation.loss,
        **asdict(record.costs),
        weight_bits=dict(record.bits.weight),
        act_bits=dict(record.bits.act),
        seed=record.seed,
        weights=record.weights,
    )


def front_records(records: Sequence[Record], objectives: tuple[str, ...]) -> list[Record]:
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
    kept = [done[i] for i in non_dominated(values)]
    return sorted(kept, key=lambda r: [getattr(r.costs, name) for name in objectives])


def best_record(records: Sequence[Record]) -> Record:
    """Highest validation metric; ties go to the lowest validation loss."""

    def rank(record: Record) -> tuple[float, float]:
        assert record.validation is not None
        return -record.validation.metric, record.validation.loss

    return min(records, key=rank)


def _by_validation(point: Point) -> tuple[float, float]:
    return -point.validation_metric, point.validation_loss
