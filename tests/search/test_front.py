"""The front of final records against the definition, and the JSON that others read."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from adq.proxies.costs import Costs
from adq.quant.errors import InputError
from adq.quant.evaluate import Evaluation
from adq.quant.spec import BitVector
from adq.search.candidate import Record
from adq.search.front import Front, best_record, front_records, point_of


def record(
    id: str, metric: float | None, bits: float, bops: int = 1, loss: float = 1.0, **more: Any
) -> Record:
    failed = metric is None
    return Record(
        id=id,
        bits=BitVector({"a": 3, "b": 4}, {"b": 8}),
        seed=3,
        epochs=2,
        costs=Costs(bits, bits - 0.5, 8.0, 1000, bops),
        train_losses=(),
        flips=(),
        dead_levels=(),
        validation=None if failed else Evaluation(loss, metric or 0.0, 0.1, 50),
        test=Evaluation(loss, 0.5, 0.125, 60),
        seconds=1.0,
        weights=f"models/{id}.safetensors",
        error="nan" if failed else None,
        **more,
    )


def dominated(a: Record, b: Record, objectives: tuple[str, ...]) -> bool:
    """b is nowhere worse than a and somewhere better."""
    assert a.validation is not None
    assert b.validation is not None
    pairs = [(-a.validation.metric, -b.validation.metric)]
    pairs += [(getattr(a.costs, name), getattr(b.costs, name)) for name in objectives]
    return all(y <= x for x, y in pairs) and any(y < x for x, y in pairs)


@pytest.mark.parametrize("objectives", [("average_bits",), ("average_bits", "bops"), ("bops",)])
@pytest.mark.parametrize("seed", range(6))
def test_the_front_is_what_nothing_dominates_cheapest_first(
    seed: int, objectives: tuple[str, ...]
) -> None:
    rng = np.random.default_rng(seed)
    records = [
        record(
            str(i),
            None if rng.random() < 0.2 else int(rng.integers(4)) / 4,
            float(rng.integers(2, 6)),
            int(rng.integers(1, 4)),
            loss=float(rng.random()),
        )
        for i in range(14)
    ]
    done = [r for r in records if r.validation is not None]
    front = front_records(records, objectives)
    best_of_equals: dict[Any, Record] = {}
    for r in done:
        assert r.validation is not None
        if not any(dominated(r, other, objectives) for other in done):
            key = (r.validation.metric, *(getattr(r.costs, name) for name in objectives))
            rival = best_of_equals.setdefault(key, r)
            assert rival.validation is not None
            if r.validation.loss < rival.validation.loss:
                best_of_equals[key] = r
    assert {r.id for r in front} == {r.id for r in best_of_equals.values()}
    costs = [[getattr(r.costs, name) for name in objectives] for r in front]
    assert costs == sorted(costs)


def test_the_test_split_chooses_nothing() -> None:
    """The same records with other test results give the same front and the same best."""
    records = [record("a", 0.5, 3.0), record("b", 0.75, 4.0), record("c", 0.25, 5.0)]
    swapped = [
        Record(**{**vars(r), "test": Evaluation(9.0 - i, 0.1 * i, 0.0, 60)})
        for i, r in enumerate(records)
    ]
    for given in (records, swapped):
        assert [r.id for r in front_records(given, ("average_bits",))] == ["a", "b"]
        assert best_record(given).id == "b"


def test_failed_records_are_on_no_front() -> None:
    assert front_records([record("a", None, 2.0)], ("average_bits",)) == []
    assert front_records([], ("average_bits",)) == []


def test_the_best_has_the_highest_metric_then_the_lowest_loss() -> None:
    pairs = [(0.25, 0.1), (0.75, 0.4), (0.5, 0.1), (0.75, 0.3), (0.75, 0.5), (0.5, 0.2)]
    cases = [record(f"{metric}-{loss}", metric, 3.0, loss=loss) for metric, loss in pairs]
    assert best_record(cases).id == "0.75-0.3"
    assert best_record(cases[::-1]).id == "0.75-0.3"


def test_a_point_says_what_its_record_says() -> None:
    tested = {
        "id": "a",
        "metric": 0.5,
        "metric_stderr": 0.125,
        "samples": 60,
        "validation_metric": 0.75,
        "validation_loss": 1.0,
        "average_bits": 3.0,
        "average_bits_searched": 2.5,
        "average_act_bits": 8.0,
        "size_bytes": 1000,
        "bops": 77,
        "latency_s": None,
        "weight_bits": {"a": 3, "b": 4},
        "act_bits": {"b": 8},
        "seed": 3,
        "weights": "models/a.safetensors",
    }
    made = record("a", 0.75, 3.0, bops=77)
    assert asdict(point_of(made)) == tested
    validated = {"metric": 0.75, "metric_stderr": 0.1, "samples": 50}
    partial = replace(made, test=None, weights=None)
    assert asdict(point_of(partial, "validation")) == tested | validated | {"weights": None}


def make_front(*models: tuple[float, float, float], **more: Any) -> Front:
    """Points a, b, ... of (average bits, validation metric, test metric), budget 4 bits."""
    points = []
    for id, (bits, validation, test) in zip("abcdefgh", models, strict=False):
        made = record(id, validation, bits, loss=2 - validation)
        points.append(point_of(replace(made, test=Evaluation(1.0, test, 0.125, 60))))
    usual = {"fp32_metric": 0.875, "budget": {"average_bits": 4.0}, "folder": "/x/s"}
    given = usual | more
    given.setdefault("objectives", given["budget"])
    given.setdefault("points", tuple(points))
    return Front("s", "digits", "accuracy", **given)


FRONT = make_front((2.0, 0.25, 0.5), (2.5, 0.75, 0.375), (3.0, 0.8, 0.75), (4.0, 0.875, 0.625))


def test_the_json_of_a_front_has_the_schemas_keys_and_no_others() -> None:
    front = replace(FRONT, uniform=FRONT.points[:1])
    reference = {"metric": 0.0, "average_bits": pytest.approx(4.4)}
    assert json.loads(json.dumps(front.to_json())) == {
        "schema": "adq-front/2",
        "study": "s",
        "task": "digits",
        "split": "test",
        "metric_name": "accuracy",
        "fp32_metric": 0.875,
        "budget": {"average_bits": 4.0},
        "objectives": {"average_bits": 4.0},
        "best": "d",
        "knee": "b",
        "hypervolume": {"value": front.hypervolume(), "reference": reference},
        "points": [asdict(point) for point in front.points],
        "uniform": [asdict(front.points[0])],
    }


def test_an_objective_without_a_budget_counts_in_the_hypervolume_and_the_knee() -> None:
    """A point that is on the front for its bit operations alone adds a box of its own."""
    objectives = {"average_bits": 4.0, "bops": 400.0}
    points = make_front((2, 0.5, 0.5), (3, 0.5, 0.5)).points
    pair = [replace(p, bops=b) for p, b in zip(points, (200, 100), strict=True)]
    both = make_front(points=tuple(pair), objectives=objectives)
    assert both.reference == pytest.approx({"metric": 0, "average_bits": 4.4, "bops": 440})
    one, other = (0.5 * (1 - p.average_bits / 4.4) * (1 - p.bops / 440) for p in both.points)
    common = 0.5 * (1 - 3 / 4.4) * (1 - 200 / 440)
    assert both.hypervolume() == pytest.approx(one + other - common)
    assert both.within({"bops": 250.0}).objectives == {"average_bits": 4.0, "bops": 250.0}


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_front_read_back_is_the_front(split: Any) -> None:
    points = (*FRONT.points[:1], replace(FRONT.points[1], weights=None, latency_s=0.25))
    front = replace(FRONT, split=split, points=points, uniform=FRONT.points[:1])
    assert Front.from_json(json.loads(json.dumps(front.to_json())), "/x/s") == front


def test_a_front_of_an_older_schema_is_named() -> None:
    with pytest.raises(InputError, match="expected schema adq-front/2, got 'adq-front/1'"):
        Front.from_json({"schema": "adq-front/1", "study": "s"})


@pytest.mark.parametrize(
    "damage",
    [
        {"points": []},
        {"points": [{"id": "a"}]},
        {"points": [asdict(FRONT.best) | {"metric": "abc"}]},
        {"points": [asdict(FRONT.best) | {"metric_stderr": math.nan}]},
        {"points": [asdict(FRONT.best) | {"samples": 1.5}]},
        {"points": [asdict(FRONT.best) | {"latency_s": "1"}]},
        {"points": [asdict(FRONT.best) | {"more": 1}]},
        {"split": "train"},
        {"fp32_metric": None},
    ],
)
def test_a_damaged_front_is_no_front(damage: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Front.from_json(FRONT.to_json() | damage)
    with pytest.raises(KeyError):
        Front.from_json({k: v for k, v in FRONT.to_json().items() if k not in damage})


def test_best_and_knee_are_chosen_by_validation() -> None:
    """By the test metrics c would be the best, and there would be no knee at b."""
    assert FRONT.best.id == "d"
    assert FRONT.knee is not None
    assert FRONT.knee.id == "b"
    equal = make_front((2.0, 0.5, 0.1), (3.0, 0.5, 0.9))
    lower = replace(equal.points[1], validation_loss=0.25)
    assert replace(equal, points=(equal.points[0], lower)).best.id == "b"


def test_a_point_that_is_there_for_a_cost_without_a_budget_is_no_end_of_the_front() -> None:
    more = replace(FRONT.points[3], id="low-bops", validation_metric=0.0, bops=1)
    knee = replace(FRONT, points=(*FRONT.points, more)).knee
    assert knee is not None
    assert knee.id == "b"


def test_costs_that_rise_together_count_as_one() -> None:
    points = tuple(replace(p, size_bytes=int(1000 * p.average_bits)) for p in FRONT.points)
    both = replace(FRONT, points=points, budget={"average_bits": 4.0, "size_bytes": 5000.0})
    assert both.knee == points[1]


def mean_metric(front: Front, top: float, steps: int = 40_000) -> float:
    """Mean over budgets between 0 and `top` of the highest metric within, 0 where there is none."""
    budgets = (np.arange(steps) + 0.5) / steps * top
    metrics = [
        max((p.metric for p in front.points if p.average_bits <= budget), default=0.0)
        for budget in budgets
    ]
    return float(np.mean(metrics))


def test_the_hypervolume_is_the_mean_metric_over_budgets_up_to_the_reference() -> None:
    assert FRONT.reference == {"metric": 0.0, "average_bits": pytest.approx(4.4)}
    assert FRONT.hypervolume() == pytest.approx(mean_metric(FRONT, 4.4), abs=1e-4)
    wide = {"metric": 0.0, "average_bits": 8.0}
    assert FRONT.hypervolume(wide) == pytest.approx(mean_metric(FRONT, 8.0), abs=1e-4)


def test_a_negative_metric_has_a_reference_below_fp32() -> None:
    front = make_front((2.0, 0.5, -1.25), fp32_metric=-1.0)
    assert front.reference["metric"] == -2.0
    assert front.hypervolume() == pytest.approx(0.75 * (1 - 2 / 4.4))


def test_two_costs_span_boxes() -> None:
    front = make_front((2.0, 0.5, 0.5), budget={"average_bits": 4.0, "size_bytes": 2000.0})
    assert front.hypervolume() == pytest.approx(0.5 * (1 - 2 / 4.4) * (1 - 1000 / 2200))


@pytest.mark.parametrize(
    ("limit", "ids", "best"), [(2.0, "a", "a"), (2.9, "ab", "b"), (3, "abc", "c"), (9, "abcd", "d")]
)
def test_the_best_under_a_tighter_budget(limit: float, ids: str, best: str) -> None:
    part = FRONT.within({"average_bits": limit})
    assert "".join(point.id for point in part.points) == ids
    assert part.budget == {"average_bits": min(limit, 4.0)}
    assert FRONT.best_under({"average_bits": limit}).id == best


def test_a_further_cost_becomes_a_budget_and_binary_fractions_are_allowed_for() -> None:
    part = FRONT.within({"size_bytes": 1000 * (1 - 1e-12)})
    assert part.points == FRONT.points
    assert list(part.budget) == ["average_bits", "size_bytes"]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"average_bits": 1.5}, "budget-bits 1.5: no model of study 's' is within it; .* needs 2$"),
        ({"size_bytes": 500.0}, "budget-size-mb 0.0005: .* the cheapest needs 0.001$"),
        ({"latency_s": 1.0}, "budget-latency-ms: study 's' has no latency_s"),
    ],
)
def test_limits_that_nothing_meets_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FRONT.within(limits)
