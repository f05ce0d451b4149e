"""The edges, and the places of values against a loop over the edges."""

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples
from torch import Tensor

from adq.quant.errors import InputError
from adq.quant.kernels import n2uq_reference as reference
from adq.quant.kernels.counting import MANY, count

# exact in binary, and so are the knots and thresholds made of them
eighths = st.integers(-80, 80).map(lambda i: i / 8)
width_lists = st.sampled_from([1, 3, 7]).flatmap(
    lambda n: st.lists(st.integers(1, 16).map(lambda i: i / 8), min_size=n, max_size=n)
)


def example(bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Values, among them every edge, its lower neighbour, NaN and infinities; the edges."""
    generator = torch.Generator().manual_seed(bits)
    widths = 0.1 + torch.rand(2**bits - 1, generator=generator)
    edges = reference.edges_of(-0.4 * widths.sum().reshape(1), widths, torch.float32)
    below = torch.nextafter(edges, torch.tensor(-math.inf))
    special = torch.tensor([math.nan, math.inf, -math.inf])
    values = widths.sum() * torch.randn(size, generator=generator)
    return torch.cat([special, edges, below, values]), edges


@few_examples
@given(eighths, width_lists)
def test_knots_and_thresholds_take_turns(start: float, widths: list[float]) -> None:
    edges = reference.edges_of(torch.tensor([start]), torch.tensor(widths), torch.float32)
    assert edges[1::2].tolist() == oracles.thresholds(start, widths)
    assert edges[::2].tolist() == [start + sum(widths[:i]) for i in range(len(widths) + 1)]


@few_examples
@given(st.lists(eighths, min_size=1, max_size=30), eighths, width_lists)
def test_a_place_counts_the_edges_up_to_the_value(
    values: list[float], start: float, widths: list[float]
) -> None:
    edges = reference.edges_of(torch.tensor([start]), torch.tensor(widths), torch.float32)
    values = values + edges.tolist()
    found = count(torch.tensor(values), edges)
    assert found.tolist() == [sum(edge <= value for edge in edges.tolist()) for value in values]


@pytest.mark.parametrize("bits", range(1, 9))
def test_many_values_get_the_places_that_each_would_get_alone(bits: int) -> None:
    x, edges = example(bits, 2 * MANY)
    together = count(x, edges)
    apart = [count(part, edges) for part in x.split(1000)]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("size", [0, MANY])
def test_nan_goes_where_infinity_goes(size: int) -> None:
    x, edges = example(3, size)
    assert count(x, edges)[:3].tolist() == [15, 15, 0]


@pytest.mark.parametrize(("bits", "dtype"), [(7, torch.uint8), (8, torch.int16)])
def test_places_are_kept_in_as_few_bytes_as_hold_them(bits: int, dtype: torch.dtype) -> None:
    x, edges = example(bits, 0)
    place = count(x, edges)
    assert place.dtype == dtype
    assert place.max() == 2 ** (bits + 1) - 1


@pytest.mark.parametrize("number", [0, 2, 6, 511])
def test_another_number_of_widths_is_refused(number: int) -> None:
    with pytest.raises(InputError, match=rf"expected 2\^bits − 1 of them.*got {number}"):
        reference.bits_of(torch.ones(number))
