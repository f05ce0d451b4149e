"""Parts of a measurement: in order, kept, taken up again, on one device or several."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from adq.proxies.work import Array, Work

CPU = torch.device("cpu")
DEVICES = [(), (CPU,), (CPU, CPU), (CPU,) * 5]


class Counted:
    """A part is 1/7 in its number's row; notes which were computed, on which models."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken
        self.parts: list[int] = []
        self.models: set[nn.Module] = set()

    def __call__(self, model: nn.Module, part: int) -> Array:
        if part == self.broken:
            raise KeyError(f"part {part}")
        self.parts.append(part)
        self.models.add(model)
        return expected(part)


def expected(part: int) -> Array:
    return np.array([[part / 7, 0.1], [-1e-300, part]])


def values(parts: list[Array]) -> list[list[list[float]]]:
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("devices", DEVICES)
def test_results_come_in_order_whatever_the_devices(devices: tuple[torch.device, ...]) -> None:
    compute = Counted()
    found = list(Work(devices=devices).parts(nn.Linear(1, 1), 7, compute))
    assert values(found) == [expected(part).tolist() for part in range(7)]
    assert sorted(compute.parts) == list(range(7))


def test_slow_parts_keep_their_place() -> None:
    others = threading.Event()

    def compute(model: nn.Module, part: int) -> Array:
        if part == 0:
            assert others.wait(10)
        if part == 1:
            others.set()
        return expected(part)

    found = list(Work(devices=(CPU, CPU)).parts(nn.Linear(1, 1), 4, compute))
    assert values(found) == [expected(part).tolist() for part in range(4)]


@pytest.mark.parametrize("devices", DEVICES)
def test_models_are_the_callers_own_or_copies(devices: tuple[torch.device, ...]) -> None:
    model, compute = nn.Linear(1, 1), Counted()
    list(Work(devices=devices).parts(model, 20, compute))
    assert (model in compute.models) == (not devices)
    assert 1 <= len(compute.models) <= max(1, len(devices))


def test_no_two_parts_share_a_copy_at_a_time() -> None:
    busy: set[nn.Module] = set()
    both = threading.Barrier(2, timeout=10)

    def compute(model: nn.Module, part: int) -> Array:
        assert model not in busy
        busy.add(model)
        both.wait()
        busy.discard(model)
        both.wait()
        return expected(part)

    list(Work(devices=(CPU, CPU)).parts(nn.Linear(1, 1), 8, compute))


@pytest.mark.parametrize("devices", DEVICES)
def test_what_is_kept_is_not_computed_again(
    devices: tuple[torch.device, ...], tmp_path: Path
) -> None:
    path, model = tmp_path / "deep" / "down" / "parts.jsonl", nn.Linear(1, 1)
    list(Work(path).parts(model, 3, Counted()))
    compute = Counted()
    found = list(Work(path, devices).parts(model, 5, compute))
    assert values(found) == [expected(part).tolist() for part in range(5)]
    assert sorted(compute.parts) == [3, 4]
    none = Counted()
    again = list(Work(path).parts(model, 5, none))
    assert values(again) == values(found)
    assert none.parts == []


def test_numbers_that_no_decimal_has_come_back_bit_for_bit(tmp_path: Path) -> None:
    part = np.array([1 / 3, 5e-324, -0.0, np.inf, np.nan, 1.7976931348623157e308])
    list(Work(tmp_path / "parts").parts(nn.Linear(1, 1), 1, lambda model, number: part))
    [found] = Work(tmp_path / "parts").parts(nn.Linear(1, 1), 1, Counted())
    assert found.tobytes() == part.tobytes()


@pytest.mark.parametrize("devices", DEVICES)
def test_a_second_stage_has_numbers_of_its_own(
    devices: tuple[torch.device, ...], tmp_path: Path
) -> None:
    path, model, compute = tmp_path / "parts.jsonl", nn.Linear(1, 1), Counted()
    work = Work(path, devices)
    list(work.parts(model, 3, compute))
    found = list(work.parts(model, 2, compute, first=3))
    assert values(found) == [expected(3).tolist(), expected(4).tolist()]
    none = Counted()
    assert values(list(Work(path, devices).parts(model, 2, none, first=3))) == values(found)
    assert none.parts == []


Damage = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],
        lambda data: data[:-1],
        lambda data: data + b'{"part": 4, "res',
        lambda data: data + b'{"part": 4}\n',
        lambda data: data + b"\0" * 30,
    ],
)
def test_a_torn_last_line_is_computed_again(damage: Damage, tmp_path: Path) -> None:
    path, model = tmp_path / "parts.jsonl", nn.Linear(1, 1)
    list(Work(path).parts(model, 4, Counted()))
    path.write_bytes(damage(path.read_bytes()))
    compute = Counted()
    found = list(Work(path).parts(model, 5, compute))
    assert values(found) == [expected(part).tolist() for part in range(5)]
    assert compute.parts in ([3, 4], [4])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["part"] for line in lines] == list(range(5))
    none = Counted()
    list(Work(path).parts(model, 5, none))
    assert none.parts == []


@pytest.mark.parametrize("devices", DEVICES)
def test_who_stops_early_stops_the_work(devices: tuple[torch.device, ...], tmp_path: Path) -> None:
    path, model, compute = tmp_path / "parts.jsonl", nn.Linear(1, 1), Counted()
    parts = Work(path, devices).parts(model, 100, compute)
    assert next(parts).tolist() == expected(0).tolist()
    assert next(parts).tolist() == expected(1).tolist()
    parts.close()  # type: ignore[attr-defined]
    assert max(compute.parts) <= 1 + max(0, len(devices) - 1)
    # nothing that was computed is lost
    again = Counted()
    list(Work(path, devices).parts(model, len(compute.parts), again))
    assert again.parts == []


@pytest.mark.parametrize("devices", DEVICES)
def test_an_error_reaches_the_caller_and_other_parts_are_kept(
    devices: tuple[torch.device, ...], tmp_path: Path
) -> None:
    path, model, compute = tmp_path / "parts.jsonl", nn.Linear(1, 1), Counted(broken=3)
    parts = Work(path, devices).parts(model, 8, compute)
    seen = [next(parts) for _ in range(3)]
    with pytest.raises(KeyError, match="part 3"):
        next(parts)
    assert values(seen) == [expected(part).tolist() for part in range(3)]
    mended = Counted()
    found = list(Work(path, devices).parts(model, 8, mended))
    assert values(found) == [expected(part).tolist() for part in range(8)]
    assert sorted(mended.parts + compute.parts) == list(range(8))


@pytest.mark.parametrize("devices", DEVICES)
def test_without_a_file_a_work_still_remembers(devices: tuple[torch.device, ...]) -> None:
    work, compute = Work(devices=devices), Counted()
    list(work.parts(nn.Linear(1, 1), 3, compute))
    list(work.parts(nn.Linear(1, 1), 3, compute))
    assert sorted(compute.parts) == [0, 1, 2]


def test_no_parts_give_nothing() -> None:
    assert list(Work().parts(nn.Linear(1, 1), 0, Counted())) == []
