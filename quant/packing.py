"""Codes of b bits <-> bytes.

Code i occupies bits i·b to i·b + b − 1 of the stream, least significant bit first; bit j of the
stream is bit j mod 8 of byte j div 8. The last byte is padded with zeros.

    b = 3, codes c0 c1 c2 ...:   byte 0 = c2[1:0] c1[2:0] c0[2:0],  byte 1 = ... c2[2]
"""

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: ceil(count·bits / 8)."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes in 0..2^bits−1 (any shape, row by row) into uint8, shape (packed_bytes,)."""
    flat = codes.flatten().to(torch.uint8)
    stream = (flat[:, None] >> torch.arange(bits, dtype=torch.uint8, device=flat.device)) & 1
    padding = -stream.numel() % 8
    stream = torch.cat([stream.flatten(), stream.new_zeros(padding)]).reshape(-1, 8)
    return (stream << _positions(stream)).sum(dim=1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of a packed stream, uint8, shape (count,).

    Raises ValueError if the stream's length is not that of `count` codes.
    """
    if packed.dtype != torch.uint8 or packed.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"expected {packed_bytes(count, bits)} bytes for {count} codes of {bits} bits, got "
            f"{packed.numel()} of {packed.dtype}"
        )
    stream = (packed[:, None] >> _positions(packed)) & 1
    stream = stream.flatten()[: count * bits].reshape(count, bits)
    weights = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (stream << weights).sum(dim=1, dtype=torch.uint8)


def _positions(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
