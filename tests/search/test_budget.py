"""Budgets: units by hand, and a printed range whose ends are themselves accepted."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq.quant.errors import InputError
from adq.search.budget import OPTION_OF, Budget, check_reachable


def test_limits_are_in_the_units_of_the_costs() -> None:
    assert Budget(bits=2.8).limits() == {"average_bits": 2.8}
    assert Budget(size_mb=0.25, gbops=1.5).limits() == {"size_bytes": 250_000, "bops": 1.5e9}
    assert list(Budget(3, 1, 2).limits()) == ["average_bits", "size_bytes", "bops"]


@pytest.mark.parametrize("value", [0, -1.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("field", "option"), [("bits", "bits"), ("size_mb", "size-mb"), ("gbops", "gbops")]
)
def test_a_limit_that_is_no_positive_number_is_refused_by_its_name(
    field: str, option: str, value: float
) -> None:
    with pytest.raises(InputError, match=rf"^budget-{option}: expected a positive number, got"):
        Budget(**{field: value})


def test_a_budget_without_a_limit_is_refused_and_the_options_are_named() -> None:
    with pytest.raises(InputError, match=r"--budget-bits, --budget-size-mb, --budget-gbops"):
        Budget()


def given_as_option(name: str, value: float) -> dict[str, float]:
    """The limits of a budget whose option of cost `name` is `value`."""
    field = OPTION_OF[name][0].removeprefix("budget-").replace("-", "_")
    return Budget(**{field: value}).limits()


@pytest.mark.parametrize(
    ("name", "value", "low", "high", "message"),
    [
        ("average_bits", 1.9, 2, 8, "budget-bits 1.9 is below the smallest .* 2 to 8$"),
        ("average_bits", 8.1, 2, 8, "budget-bits 8.1 is above the largest .* 2 to 8$"),
        ("size_bytes", 1.0, 1_234_567, 9e6, r"size-mb 1 is below .* 1\.235 to 9$"),
        ("bops", 99, 1e6, 1_234_567_890, r"gbops 99 is above .* 0\.001 to 1\.234$"),
        ("size_bytes", 1, 100_000_100, 100_009_900, r"reaches 100\.001 to 100\.009$"),
    ],
)
def test_an_unreachable_limit_names_option_value_and_range(
    name: str, value: float, low: float, high: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_reachable(given_as_option(name, value), {name: low}, {name: high})


costs = st.sampled_from(list(OPTION_OF))


@given(costs, st.integers(1, 10**12), st.integers(0, 10**9), st.sampled_from([1, 7, 300, 1024]))
def test_both_ends_of_the_printed_range_are_reachable(
    name: str, low: int, width: int, parts: int
) -> None:
    if name == "average_bits":  # whole bits over a number of weights
        low, width = 2 + low % 7, width / parts
    smallest, largest = {name: low}, {name: low + width}
    with pytest.raises(InputError) as below:
        check_reachable(given_as_option(name, low / OPTION_OF[name][1] / 2), smallest, largest)
    with pytest.raises(InputError) as above:
        check_reachable(
            given_as_option(name, 2 * (low + width) / OPTION_OF[name][1]), smallest, largest
        )
    ends = re.search(r"reaches (\S+) to (\S+)$", str(below.value))
    assert ends is not None
    assert str(above.value).endswith(ends[0])
    for end, exact in zip(ends.groups(), (low, low + width), strict=True):
        check_reachable(given_as_option(name, float(end)), smallest, largest)
        assert float(end) * OPTION_OF[name][1] == pytest.approx(exact, rel=1e-3)  # four digits


@given(st.integers(1, 10**9))
def test_a_size_in_megabytes_is_met_by_that_many_bytes(size: int) -> None:
    """0.01569 MB are 15689.999999999998 bytes in binary, and 15690 bytes have to meet them."""
    limits = Budget(size_mb=size / 1e6).limits()
    check_reachable(limits, {"size_bytes": size}, {"size_bytes": size})


def test_of_several_limits_each_must_be_within_reach_and_one_must_bind() -> None:
    smallest, largest = {"average_bits": 2, "bops": 1e6}, {"average_bits": 8, "bops": 9e6}
    check_reachable({"average_bits": 2, "bops": 9e6}, smallest, largest)
    check_reachable({"average_bits": 4, "bops": 1e7}, smallest, largest)
    with pytest.raises(InputError, match=r"budget-gbops 0\.0001 is below"):
        check_reachable({"average_bits": 9, "bops": 1e5}, smallest, largest)
    with pytest.raises(InputError, match="budget-bits 9 is above"):
        check_reachable({"average_bits": 9, "bops": 1e7}, smallest, largest)
