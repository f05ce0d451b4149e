"""The Triton kernels against the reference: on a GPU, or on a CPU by Triton's interpreter.

A plain run on a machine without a GPU skips them here; test_interpreter.py then runs this file with
TRITON_INTERPRET=1, which Triton wants set before it is imported.
"""

import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adq.quant.kernels import inputs_ops as ops

pytest.importorskip("adq.quant.kernels.inputs", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="no CUDA device (test_interpreter.py runs this file with Triton's interpreter)",
    ),
    # NumPy, which interprets, warns of NaN and infinity where a processor does not
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

# Kernel and reference do the same operations on one element in the same order, so that equality is
# exact; but the interpreter cuts the digits that bfloat16 (8 of them) has no room for, where
# PyTorch and processors round to nearest.
RTOL = {
    torch.float32: 0,
    torch.float16: 0,
    torch.float64: 0,
    torch.bfloat16: 2**-7 if INTERPRETED else 0,
}
NUMBERS = [1, 2, 3, 5, 7, 15, 31, 63, 100, 127, 254, 255]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Every new tensor is full of NaN (integers: of their largest value) until written to."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def example(
    number: int, shape: tuple[int, ...] | int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values on both sides of the thresholds, some of them at one, NaN and infinities."""
    generator = torch.Generator().manual_seed(number)
    thresholds = torch.randn(number, generator=generator).sort().values
    thresholds[-1] = thresholds[-min(2, number)]
    x = torch.randn(shape, generator=generator)
    if x.numel() > 6:
        x.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
        x.view(-1)[3:6] = thresholds[torch.arange(3) % number]
    return x.to(dtype), thresholds, torch.tensor([0.3]), torch.tensor([2.0])


def assert_equal(x: Tensor, *parameters: Tensor) -> None:
    arguments = [t.to(DEVICE) for t in parameters]
    found = ops._quantize_on_gpu(x.to(DEVICE), *arguments).cpu()
    expected = ops.quantize_input(x, *parameters)
    torch.testing.assert_close(found, expected, atol=0, rtol=RTOL[x.dtype])
    assert found.stride() == expected.stride()
    found, expected = (
        ops._codes_on_gpu(x.to(DEVICE), arguments[0]).cpu(),
        ops.input_codes(x, parameters[0]),
    )
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("size", [1, 7, 1023, 1024, 1025])
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("number", NUMBERS)
def test_kernels_agree_with_the_reference(number: int, dtype: torch.dtype, size: int) -> None:
    assert_equal(*example(number, size, dtype))


LAYOUTS = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT,
    "every second row": lambda t: torch.cat([t, t], dim=2)[:, :, ::2],
    "one value everywhere": lambda t: t[..., :1].expand(t.shape),
    "a later part": lambda t: torch.cat([t, t])[2:],
    "nothing": lambda t: t[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout_will_do(layout: str) -> None:
    x, *parameters = example(15, (2, 3, 14, 14), torch.float32)
    assert_equal(LAYOUTS[layout](x), *parameters)


@pytest.mark.skipif(INTERPRETED, reason="the dispatcher sends CPU tensors to the reference")
def test_the_dispatcher_sends_cuda_tensors_to_the_kernels() -> None:
    x, *parameters = (t.to(DEVICE) for t in example(15, (3, 50), torch.float32))
    x = x.nan_to_num()
    torch.library.opcheck(torch.ops.adq.quantize_input.default, (x, *parameters))
    torch.library.opcheck(torch.ops.adq.input_codes.default, (x, parameters[0]))
