import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples

from adq.quant.errors import InputError
from adq.quant.spec import BitVector

WIDTHS = st.integers(2, 8)


@st.composite
def bit_vectors(draw: st.DrawFn) -> BitVector:
    weight = draw(st.dictionaries(st.text(min_size=1), WIDTHS, max_size=5))
    quantized_inputs = draw(st.sets(st.sampled_from(sorted(weight)))) if weight else set()
    return BitVector(weight, {layer: draw(WIDTHS) for layer in sorted(quantized_inputs)})


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_two_to_eight_bits_are_accepted(bits: int) -> None:
    assert BitVector({"a": bits}, {"a": bits}).weight == {"a": bits}


@pytest.mark.parametrize("bits", [1, 9, 0, -2, 32, 4.0, "4", True, None])
def test_anything_but_a_whole_number_from_two_to_eight_is_refused(bits: object) -> None:
    with pytest.raises(InputError, match=r"weight bits of layer 'a': .* from 2 to 8, got"):
        BitVector({"a": bits})  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"act bits of layer 'a': .* from 2 to 8, got"):
        BitVector({"a": 4}, {"a": bits})  # type: ignore[dict-item]


def test_input_bits_without_weight_bits_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="without weight bits: b, c"):
        BitVector({"a": 4}, {"c": 4, "a": 4, "b": 4})


@few_examples
@given(bit_vectors())
def test_json_gives_the_bit_vector_back(bits: BitVector) -> None:
    assert BitVector.from_json(json.loads(json.dumps(bits.to_json()))) == bits


@few_examples
@given(bit_vectors(), bit_vectors())
def test_two_bit_vectors_share_a_key_exactly_when_they_are_equal(
    one: BitVector, other: BitVector
) -> None:
    assert (one.key == other.key) == (one == other)
    reordered = BitVector(dict(reversed(one.weight.items())), dict(reversed(one.act.items())))
    assert reordered.key == one.key


def test_keys_tell_a_weight_from_an_input() -> None:
    vectors = [
        BitVector({"a": 4}),
        BitVector({"a": 4}, {"a": 4}),
        BitVector({"a": 4, "b": 4}),
        BitVector({"a": 5}, {"a": 4}),
        BitVector({"a": 4}, {"a": 5}),
    ]
    assert len({v.key for v in vectors}) == len(vectors)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "here: expected a JSON object with 'weight_bits'"),
        ({}, "here: expected a JSON object with 'weight_bits'"),
        ({"weight_bits": [4]}, "here: expected a JSON object with 'weight_bits'"),
        ({"weight_bits": {"a": 4}, "act_bits": 3}, "here: 'act_bits' must map"),
        ({"weight_bits": {"a": 4}, "schema": "adq-bits/2"}, "expected schema 'adq-bits/1', got"),
        ({"weight_bits": {"a": 1}}, "from 2 to 8, got 1"),
    ],
)
def test_json_that_is_no_bit_vector_is_refused(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BitVector.from_json(data, "here")


def test_act_bits_and_schema_may_be_left_out_of_json() -> None:
    assert BitVector.from_json({"weight_bits": {"a": 4}}) == BitVector({"a": 4})


def test_load_reads_what_to_json_wrote(tmp_path) -> None:
    bits = BitVector({"a": 2, "b": 8}, {"b": 3})
    (tmp_path / "bits.json").write_text(json.dumps(bits.to_json()))
    assert BitVector.load(tmp_path / "bits.json") == bits
    assert BitVector.load(str(tmp_path / "bits.json")) == bits


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", None])
def test_a_missing_or_damaged_file_is_named_in_one_line(tmp_path, content: bytes | None) -> None:
    path = tmp_path / "bits.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"bits\.json: not a readable bit-vector file") as caught:
        BitVector.load(path)
    assert "\n" not in str(caught.value)
