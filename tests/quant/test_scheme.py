from typing import Any

import pytest

from adq.quant.errors import InputError
from adq.quant.scheme import ACT_METHODS, INITIALISATIONS, WEIGHT_METHODS, Scheme


@pytest.mark.parametrize("weight", WEIGHT_METHODS)
@pytest.mark.parametrize("act", ACT_METHODS)
def test_every_pair_of_methods_is_a_scheme(weight: Any, act: Any) -> None:
    scheme = Scheme(weight, act)
    assert (scheme.weight, scheme.act) == (weight, act)


def test_the_words_are_those_of_the_documentation() -> None:
    assert set(WEIGHT_METHODS) == {"adq", "lsq", "n2uq", "apot", "minmax"}
    assert set(ACT_METHODS) == {"n2uq", "lsq", "pact", "minmax"}
    assert set(INITIALISATIONS) == {"quantile", "quantile-lloyd", "midpoint", "uniform"}
    for word in INITIALISATIONS:
        assert Scheme(init=word).init == word
    assert Scheme() == Scheme("adq", "n2uq", "quantile-lloyd", False, True, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "ADQ"}, "weight quantizer: expected one of adq, .*, minmax, got 'ADQ'"),
        ({"weight": "pact"}, "weight quantizer: .*, got 'pact'"),
        ({"weight": ""}, "weight quantizer: .*, got ''"),
        ({"weight": None}, "weight quantizer: .*, got None"),
        ({"weight": ["adq"]}, r"weight quantizer: .*, got \['adq'\]"),
        ({"act": "apot"}, "act quantizer: expected one of n2uq, lsq, pact, minmax, got 'apot'"),
        ({"act": "adq"}, "act quantizer: .*, got 'adq'"),
        ({"act": 4}, "act quantizer: .*, got 4"),
        ({"init": "kmeans"}, "codebook start: expected one of quantile, .*, got 'kmeans'"),
        ({"group_size": 1}, "group size: expected at least 2 weights, got 1"),
        ({"group_size": 0}, "group size: expected at least 2 weights, got 0"),
        ({"group_size": -64}, "group size: expected at least 2 weights, got -64"),
    ],
)
def test_each_bad_word_is_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Scheme(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("group_size", ["64", 2.5, 64.0])
def test_a_group_size_is_a_whole_number(group_size: Any) -> None:
    with pytest.raises(InputError, match="group size: expected"):
        Scheme(group_size=group_size)
