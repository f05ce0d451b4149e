"""The counts of thresholds against a loop over them, by each of the ways of finding them."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples
from torch import Tensor

from adq.quant.kernels import counting

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMBERS = [1, 2, 3, 4, 7, 8, 15, 20, 31, 32, 63, 100, 127, 255, 256, 511]
SPECIAL = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])

compiled = pytest.mark.skipif(
    counting._function() is None, reason="counting.c was not compiled: there was no C compiler"
)


@pytest.fixture(params=[pytest.param("C", marks=compiled), "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test that asks for it runs with the C kernel and without."""
    if request.param == "PyTorch":
        monkeypatch.setattr(counting, "_function", lambda: None)
    return request.param


def spread(number: int, how: str) -> Tensor:
    """Ascending thresholds, float32."""
    generator = torch.Generator().manual_seed(number)
    t = torch.rand(number, generator=generator).add_(0.1).cumsum(0)
    t = 4 * t / t[-1] - 1
    if how == "in clusters":
        t = t**5
    elif how == "in pairs":
        t = t[torch.arange(number) // 2 * 2]
    elif how == "all in one place":
        t = torch.full((number,), 0.25)
    elif how == "to infinity":
        t[0], t[-1] = -math.inf, math.inf
    elif how == "over the whole range":
        t = t.sign() * 2.0 ** (127 * (t.abs() / 3)) if number > 1 else t
        t[0] = -torch.finfo(torch.float32).max
        t = t.sort().values
    return t


SPREADS = ["evenly", "in clusters", "in pairs", "all in one place", "to infinity",
           "over the whole range"]  # fmt: skip


def values_for(thresholds: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Among them every threshold, its two neighbours, NaN and infinities."""
    generator = torch.Generator().manual_seed(size)
    ends = torch.tensor(math.inf)
    near = [thresholds, thresholds.nextafter(ends), thresholds.nextafter(-ends)]
    return torch.cat([SPECIAL, *near, 3 * torch.randn(size, generator=generator)]).to(dtype)


def counted(x: Tensor, thresholds: Tensor) -> Tensor:
    """The oracle: one comparison for each value and threshold."""
    work = x.to(thresholds.dtype)
    above = sum((t > work).long() for t in thresholds)
    return thresholds.numel() - above


@pytest.mark.parametrize("how", SPREADS)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_count_is_what_one_comparison_after_the_other_gives(
    number: int, how: str, way: str
) -> None:
    thresholds = spread(number, how)
    for size, dtype in [(0, torch.float32), *((9000, dtype) for dtype in DTYPES)]:
        x = values_for(thresholds, size, dtype)
        found = counting.count(x, thresholds)
        assert found.dtype == (torch.uint8 if number < 256 else torch.int16)
        assert torch.equal(found.long(), counted(x, thresholds))


@few_examples
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=70).map(sorted),
    st.lists(st.floats(width=32), min_size=1, max_size=20),
)
def test_counts_hold_for_any_thresholds_and_values(
    thresholds: list[float], values: list[float]
) -> None:
    t = torch.tensor(thresholds)
    x = torch.tensor(values + thresholds)
    expected = counted(x, t)
    many = x.repeat(counting.MANY)
    assert torch.equal(counting.count(x, t).long(), expected)
    found = counting.count(many, t).long()
    assert torch.equal(found, expected.repeat(counting.MANY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "_function", lambda: None)
        assert torch.equal(counting.count(many, t).long(), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [15, 255])
def test_every_number_of_16_bits_gets_its_count_and_its_value(
    number: int, dtype: torch.dtype, way: str
) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    # thresholds among them below the least normal number
    thresholds = torch.cat([spread(number - 6, "in clusters"), torch.tensor([-3.0, -1, 0, 1, 2, 9])
                            * 2.0**-24]).sort().values  # fmt: skip
    scale, zero_point = torch.tensor([0.37]), torch.tensor([3.0])
    values, counts = counting.quantize_and_count(x, thresholds, scale, zero_point)
    expected = counted(x, thresholds)
    assert torch.equal(counts.long(), expected)
    assert torch.equal(values, ((expected - zero_point) * scale).to(dtype))
    assert torch.equal(counting.quantize(x, thresholds, scale, zero_point), values)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bits", range(2, 10))
def test_values_are_those_of_the_counts(
    bits: int, dtype: torch.dtype, shift: int, way: str
) -> None:
    work = torch.promote_types(dtype, torch.float32)
    thresholds = spread(2**bits - 1, "evenly").to(work)
    x = values_for(thresholds.float(), 9001, dtype)
    scale, zero_point = torch.tensor([0.1]), torch.tensor([5.0])
    values, counts = counting.quantize_and_count(x, thresholds, scale, zero_point, shift)
    assert values.dtype == dtype
    expected = counted(x, thresholds)
    assert torch.equal(counts.long(), expected)
    assert torch.equal(values, (((expected >> shift).to(work) - 5) * scale).to(dtype))


@compiled
def test_several_threads_count_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds = spread(255, "evenly")
    x = values_for(thresholds, 1_000_003, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        together = counting.count(x, thresholds)
        monkeypatch.setattr(counting, "_parallel", lambda: None)
        assert torch.equal(counting.count(x, thresholds), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5, 7), ()])
def test_counts_have_the_shape_of_the_values(shape: tuple[int, ...], way: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    thresholds = spread(7, "evenly")
    for view in (x, x.mT if x.ndim > 1 else x):
        assert torch.equal(counting.count(view, thresholds).long(), counted(view, thresholds))


@pytest.mark.parametrize("number", [7, 255])
def test_thresholds_that_are_not_numbers_or_do_not_ascend_end_nothing(
    number: int, way: str
) -> None:
    x = values_for(spread(number, "evenly"), 9000, torch.float32)
    for thresholds in (spread(number, "evenly").flip(0), torch.full((number,), math.nan)):
        assert counting.count(x, thresholds).max() <= number


def test_a_file_that_is_no_library_is_as_good_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "_counting.so"
    file.write_text("compiled for another processor")
    spec = type("Spec", (), {"origin": str(file)})
    monkeypatch.setattr(counting, "find_spec", lambda _: spec)
    assert counting._function.__wrapped__() is None
    monkeypatch.setattr(counting, "find_spec", lambda _: None)
    assert counting._function.__wrapped__() is None


@compiled
def test_a_process_that_forked_counts_on() -> None:
    code = (
        "import os, torch; torch.set_num_threads(2)\n"
        "from adq.quant.kernels.counting import count\n"
        "x, t = torch.randn(200_000), torch.linspace(-1, 1, 255)\n"
        "expected = count(x, t)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    torch.set_num_threads(1)  # as a DataLoader's workers do\n"
        "    os._exit(not torch.equal(count(x, t), expected))\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)


def test_a_view_with_the_other_sign_is_counted_as_it_reads(way: str) -> None:
    x = torch._neg_view(torch.ones(4))
    assert counting.count(x, torch.tensor([0.0])).tolist() == [0, 0, 0, 0]
