import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, packed

from adq.quant.packing import pack, packed_bytes, unpack

BITS = range(2, 9)
COUNTS = (0, 1, 7, 8, 9, 1023, 1024, 1025)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", COUNTS)
def test_packing_is_one_little_endian_number_and_comes_back_equal(bits: int, count: int) -> None:
    codes = random.Random(bits * count).choices(range(2**bits), k=count)
    stream = pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert stream.dtype == torch.uint8
    assert stream.numel() == packed_bytes(count, bits)
    assert bytes(stream.tolist()) == packed(codes, bits)
    assert torch.equal(unpack(stream, bits, count), torch.tensor(codes, dtype=torch.uint8))


@few_examples
@given(st.data())
def test_any_codes_come_back(data: st.DataObject) -> None:
    bits = data.draw(st.integers(2, 8))
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    stream = pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert bytes(stream.tolist()) == packed(codes, bits)
    assert unpack(stream, bits, len(codes)).tolist() == codes


def test_the_layout_is_that_of_the_documentation() -> None:
    # c0 = 0b101, c1 = 0b011, c2 = 0b110: byte 0 = 10|011|101, byte 1 = 0000000|1
    assert pack(torch.tensor([0b101, 0b011, 0b110]), 3).tolist() == [0b10011101, 0b00000001]


def test_the_padding_is_zero_and_the_extremes_survive() -> None:
    for bits in BITS:
        stream = pack(torch.full((9,), 2**bits - 1), bits)
        assert int.from_bytes(bytes(stream.tolist()), "little") == 2 ** (9 * bits) - 1


def test_any_shape_is_packed_row_by_row() -> None:
    codes = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(pack(codes, 5), pack(codes.flatten(), 5))
    turned = codes.permute(2, 0, 1)
    assert torch.equal(pack(turned, 5), pack(turned.contiguous().flatten(), 5))


@pytest.mark.parametrize(("count", "bits", "expected"), [(0, 2, 0), (1, 2, 1), (4, 2, 1)])
def test_packed_bytes_rounds_up(count: int, bits: int, expected: int) -> None:
    assert packed_bytes(count, bits) == expected
    assert packed_bytes(8, 3) == 3
    assert packed_bytes(9, 3) == 4


@pytest.mark.parametrize("length", [3, 5])
def test_a_stream_of_the_wrong_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"expected 4 bytes for 10 codes of 3 bits, got {length}"):
        unpack(torch.zeros(length, dtype=torch.uint8), 3, 10)


def test_a_stream_that_is_not_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 4 of torch\.int8"):
        unpack(torch.zeros(4, dtype=torch.int8), 3, 10)
