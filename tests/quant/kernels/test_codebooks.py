"""The Triton kernel of the codebook step against the reference: on a GPU, or on a CPU by Triton's
interpreter (see test_n2uq.py)."""

import math
import os
from collections.abc import Iterator, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from adq.quant.kernels import weights_ops as ops
from adq.quant.kernels import weights_reference as reference

codebooks = pytest.importorskip("adq.quant.kernels.codebooks", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="no CUDA device (test_interpreter.py runs this file with Triton's interpreter)",
    ),
    # NumPy, which interprets, warns of NaN and infinity where a processor does not
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning"),
]

# (bits, parts) of each layer; 300 parts of 4 bits are more than a program reads at a time
Layout = Sequence[tuple[int, int]]
MIXED: Layout = [(3, 2), (8, 1), (4, 300), (2, 1), (2, 1030), (5, 3), (8, 20), (6, 1), (7, 2)]
FLAGS = list(product([False, True], [False, True]))

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, list[int], list[int]]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Every new tensor is full of NaN (integers: of their largest value) until written to."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def example(
    layout: Layout, dtype: torch.dtype, dead: float = 0.3, flat: float = 0.2, seed: int = 0
) -> Inputs:
    """Statistics and states in which a share `dead` of the levels serves nobody, and a share `flat`
    of the cells holds equal values.

    All numbers are short binary fractions, so that their sums are exact in any order.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: Sequence[int]) -> Tensor:
        return torch.randint(low, high, size, generator=generator).double()

    partials, levels, counts, sums = [], [], [], []
    for bits, parts in layout:
        k = 2**bits
        c = integers(-64, 64, (k,)).sort().values / 16  # some are equal
        here = torch.rand(k, generator=generator) >= dead
        spread = torch.rand(k, generator=generator) >= flat
        n = integers(0, 5, (parts, k)) * here
        m = n * c + integers(-8, 8, (parts, k)) / 64 * n * spread
        e = integers(0, 4, (parts, k)) / 256 * n * spread  # some are equal
        partials.append(torch.stack([n, m, e]).flatten(1))
        n = torch.where(here, integers(0, 9, (k,)), integers(0, 3, (k,)) / 4)
        levels.append(c)
        counts.append(n)
        sums.append(n * c)
    bits_, parts_ = (list(column) for column in zip(*layout, strict=True))
    state = (torch.cat(t).to(dtype) for t in (levels, counts, sums))
    return torch.cat(partials, dim=1), *state, bits_, parts_


def both(
    inputs: Inputs, decay: float = 0.75, split: bool = True, zero: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernel finds, and what the reference does."""
    arguments = (*inputs, decay, reference.EPSILON, split, zero)
    expected = reference.codebook_step(*arguments)
    on_device = (t.to(DEVICE) if isinstance(t, Tensor) else t for t in arguments)
    found = [t.cpu() for t in ops._step_on_gpu(*on_device)]
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    return found, list(expected)


@pytest.mark.parametrize(("split", "zero"), FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_agrees_with_the_reference_to_the_last_bit_where_sums_are_exact(
    dtype: torch.dtype, split: bool, zero: bool
) -> None:
    inputs = example(MIXED, dtype)
    found, expected = both(inputs, split=split, zero=zero)
    assert (expected[3] > 0).sum() > 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("dead", "flat"), [(0.0, 0.0), (0.8, 0.0), (0.5, 0.9), (1.0, 0.0), (0, 1)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_any_number_of_dead_levels_and_of_cells_to_split_will_do(
    bits: int, dead: float, flat: float
) -> None:
    for seed, decay in enumerate((0.75, 0.0)):
        inputs = example([(bits, 1), (bits, 2)], torch.float32, dead, flat, seed)
        for one, other in zip(*both(inputs, decay, zero=bool(bits % 2)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_random_statistics_agree_up_to_the_order_of_summation(
    seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    partials, levels, counts, sums, bits, parts = example(MIXED, torch.float64, seed=seed)
    noise = 1 + torch.rand(partials[1:].shape, generator=generator, dtype=torch.float64)
    partials[1:] *= noise
    inputs = (partials, *(t.to(dtype) for t in (levels, counts, sums)), bits, parts)
    found, expected = both(inputs, 0.95)
    assert torch.equal(found[3], expected[3])
    # Σm and Σe of up to 1030 parts: their order may cost 1030·2^-53 of the unsigned sum, about 1
    slack = 1e-12 if dtype == torch.float64 else 2**-22
    for one, other in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=slack, atol=slack)


def test_layers_do_not_touch_each_other_even_where_one_is_not_a_number() -> None:
    inputs = example([(4, 2), (5, 2), (3, 1)], torch.float32)
    expected = both(inputs)[1]
    broken = [t.clone() for t in inputs[:4]]
    broken[0][:, 2 * 16 : 2 * 48] = math.nan
    for t in broken[1:]:
        t[16:48] = math.nan
    found, _ = both((*broken, *inputs[4:]))
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(one[:16], other[:16])
        assert torch.equal(one[48:], other[48:])


def test_levels_without_statistics_are_all_as_the_running_numbers_say() -> None:
    found, expected = both(example([(3, 0), (2, 1)], torch.float32))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_two_runs_are_equal_to_the_last_bit() -> None:
    partials, *rest = example(MIXED, torch.float32)
    partials[1:] *= math.pi
    for one, other in zip(*(both((partials, *rest))[0] for _ in range(2)), strict=True):
        assert torch.equal(one, other)
