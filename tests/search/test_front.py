"""The front of final records against the definition, and the JSON that others read."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from adq.proxies.costs import Costs
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
    point = point_of(record("a", 0.75, 3.0, bops=77))
    assert asdict(point) == {
        "id": "a",
        "metric": 0.5,
        "metric_stderr": 0.125,
        "average_bits": 3.0,
        "average_bits_searched": 2.5,
        "size_bytes": 1000,
        "bops": 77,
        "latency_s": None,
        "weight_bits": {"a": 3, "b": 4},
        "act_bits": {"b": 8},
        "seed": 3,
        "weights": "models/a.safetensors",
    }


def test_the_json_of_a_front_has_the_schemas_keys_and_no_others() -> None:
    points = tuple(point_of(record(id, 0.5, bits)) for id, bits in (("a", 3.0), ("b", 4.0)))
    front = Front("s", "digits", "accuracy", 0.875, points, points[1], points, folder="/x/s")
    assert json.loads(json.dumps(front.to_json())) == {
        "schema": "adq-front/1",
        "study": "s",
        "task": "digits",
        "metric_name": "accuracy",
        "fp32_metric": 0.875,
        "points": [asdict(point) for point in points],
    }
