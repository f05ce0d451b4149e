"""What the kernels over packed weights share: cells, tables, and the sum over parts of K.

`packed_reference` draws the words. Unpacking a code takes a shift and a mask; only two of 32 codes
at 3 bits are put together from several words. A lookup is `tl.gather` from a table in shared
memory, where up to 32 entries of 4 bytes or 16 of 8 lie in banks of their own: one access serves 32
weights. At 8 bits about four lanes meet in a bank.
"""

# Triton unpacks no tuple within a tuple, and compiles what follows a return outside of `else`:
# ruff: noqa: RET505, RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl
from torch import Tensor

FINISH_BLOCK = 512


@triton.jit
def _joined(parts):
    """2^n tensors as one with n more axes of 2: part i is where the axes spell i."""
    if len(parts) == 1:
        return parts[0]
    else:
        half: tl.constexpr = len(parts) // 2
        pairs = ()
        for i in tl.static_range(half):
            pairs = pairs + (tl.join(parts[i], parts[i + half]),)
        return _joined(pairs)


@triton.jit
def _parted(parts, COUNT: tl.constexpr):
    """The COUNT tensors that `_joined` was given, from a tuple of what it gave."""
    if len(parts) == COUNT:
        return parts
    else:
        even = ()
        odd = ()
        for i in tl.static_range(len(parts)):
            left, right = tl.split(parts[i])
            even = even + (left,)
            odd = odd + (right,)
        return _parted(even + odd, COUNT)


@triton.jit
def load_words(words_ptr, at, plane, inside, BITS: tl.constexpr):
    """The words of some cells, one tensor or three."""
    words = (tl.load(words_ptr + at, mask=inside, other=0).to(tl.uint32, bitcast=True),)
    if BITS == 3:
        for p in tl.static_range(1, 3):
            more = tl.load(words_ptr + (at + p * plane), mask=inside, other=0)
            words = words + (more.to(tl.uint32, bitcast=True),)
    return words


@triton.jit
def codes_of(words, BITS: tl.constexpr):
    """The codes of cells, a tensor of int32 for each place in a cell."""
    codes = ()
    if BITS == 3:
        for s in tl.static_range(30):
            codes = codes + (((words[s // 10] >> (3 * (s % 10))) & 7).to(tl.int32),)
        a, b, c = words
        codes = codes + (((a >> 30) | ((b >> 28) & 4)).to(tl.int32),)
        codes = codes + (((b >> 31) | ((c >> 29) & 6)).to(tl.int32),)
    else:
        for s in tl.static_range(32 // BITS):
            code = (words[0] >> (BITS * s)) & ((1 << BITS) - 1)
            codes = codes + (code.to(tl.int32),)
    return codes


@triton.jit
def table_of(codebook_ptr, levels, BITS: tl.constexpr):
    """2^BITS levels in float32."""
    k = tl.arange(0, 1 << BITS)
    return tl.load(codebook_ptr + k, mask=k < levels, other=0.0).to(tl.float32)


@triton.jit
def look_up(table, index):
    """table[index] for an index of any shape."""
    return tl.reshape(tl.gather(table, tl.reshape(index, [index.numel]), 0), index.shape)


@triton.jit
def finish_kernel(
    parts_ptr, bias_ptr, out_ptr, numel, columns, parts, has_bias, BLOCK: tl.constexpr
):
    """out[i] = Σ_p parts[p, i] + bias[i mod columns], in the order of p."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    bias = tl.load(bias_ptr + i % columns, mask=inside & (has_bias != 0), other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        total += tl.load(parts_ptr + i, mask=inside, other=0.0)
        parts_ptr += numel.to(tl.int64)
    total += bias.to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=inside)


def finish(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the sum of parts (P, ..., N) and the bias (N,) to out (..., N)."""
    finish_kernel[(triton.cdiv(out.numel(), FINISH_BLOCK),)](
        *(parts, parts if bias is None else bias, out),
        *(out.numel(), out.shape[-1], parts.shape[0], int(bias is not None)),
        BLOCK=FINISH_BLOCK,
    )
