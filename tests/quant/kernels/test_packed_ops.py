"""The operators over packed weights as PyTorch's tracers, its checks and its users see them, on a
CPU."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.quant.kernels import packed_ops as ops
from adq.quant.kernels import packed_reference as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GEOMETRY = (3, 2), (2, 1), (1, 0), (1, 2), 2


def weight(n: int, k: int, bits: int = 4) -> list[Any]:
    """(codes, words, codebook, scale, bias)"""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    levels, scale = torch.randn(2**bits, generator=generator), torch.rand(n, 1, generator=generator)
    return [codes, reference.arrange(codes, bits), levels, scale, torch.arange(float(n))]


def real(codes: Tensor, bits: int = 4) -> list[Any]:
    scale = torch.rand(codes.shape[0], 1, generator=torch.Generator().manual_seed(1))
    bias = torch.arange(float(codes.shape[0]))
    sums = reference.code_sums(codes, bits)
    return [0.25, -2.0, scale, sums, bias, torch.tensor([0.5]), torch.tensor([3.0])]


class Net(nn.Module):
    """A convolution and a linear layer, in floats and in integers."""

    def __init__(self) -> None:
        super().__init__()
        codes, *self.conv = weight(6, 12)
        self.conv_int = real(codes)
        codes, *self.head = weight(5, 6)
        self.head_int = real(codes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = ops.conv2d(x, *self.conv, 4, *GEOMETRY).relu().mean((2, 3))
        y = ops.linear(hidden, *self.head, 4)
        q = (x * 10 + 3).clamp(0, 255).to(torch.uint8)
        hidden = ops.conv2d_int(q, self.conv[0], *self.conv_int, 4, *GEOMETRY).relu().mean((2, 3))
        q = (hidden + 3).clamp(0, 255).to(torch.uint8)
        return y, ops.linear_int(q, self.head[0], *self.head_int, 4)


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operators_pass_opcheck_in_every_dtype(dtype: torch.dtype) -> None:
    _, words, levels, scale, bias = weight(6, 12)
    bias = bias if dtype.itemsize > 2 else None
    x = torch.ones(3, 2, 12, dtype=dtype)
    for one in (x, x[0, 0], x[:, :0], x.transpose(0, 1)):
        arguments = (one, words, levels, scale, bias, 4)
        torch.library.opcheck(torch.ops.adq.packed_linear.default, arguments)
    for one in (image(dtype), image(dtype).contiguous(memory_format=torch.channels_last)):
        arguments = (one, words, levels, scale, bias, 4, *GEOMETRY)
        torch.library.opcheck(torch.ops.adq.packed_conv2d.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_integer_operators_pass_opcheck(dtype: torch.dtype) -> None:
    codes, words, *_ = weight(6, 12)
    q = torch.ones(3, 2, 12, dtype=torch.uint8)
    arguments = (q, words, *real(codes), 4, dtype)
    torch.library.opcheck(torch.ops.adq.packed_linear_int.default, arguments)
    arguments = (image().to(torch.uint8), words, *real(codes), 4, *GEOMETRY, dtype)
    torch.library.opcheck(torch.ops.adq.packed_conv2d_int.default, arguments)


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 1), (1, 4, 3)])
def test_fake_results_have_the_strides_of_real_ones_where_sizes_are_one(
    size: tuple[int, int, int],
) -> None:
    out, *sides = size
    codes, words, *rest = weight(out, 2)
    x = torch.ones(1, 2, *sides)
    geometry = (1, 1), (1, 1), (0, 0), (1, 1), 1
    for name, arguments in (
        ("packed_conv2d", (x, words, *rest, 4, *geometry)),
        ("packed_conv2d_int", (x.byte(), words, *real(codes), 4, *geometry, torch.float32)),
    ):
        torch.library.opcheck(getattr(torch.ops.adq, name).default, arguments)


def test_the_operators_compute_what_the_reference_does() -> None:
    codes, words, levels, scale, bias = weight(6, 12)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    expected = x @ (scale * levels[codes.int()]).T + bias
    torch.testing.assert_close(ops.linear(x, words, levels, scale, bias, 4), expected)
    assert ops.conv2d(image(), words, levels, scale, bias, 4, *GEOMETRY).shape == (2, 6, 4, 4)
    assert ops.linear_int(x.byte(), words, *real(codes), 4, torch.float16).dtype == torch.float16


def test_a_convolution_without_geometry_is_a_plain_one() -> None:
    codes, words, levels, scale, bias = weight(6, 24)
    x, q = image(), (10 * image() + 30).clamp(0, 255).byte()

    def dense(values: Tensor) -> Tensor:
        return values.view(6, 3, 2, 4).permute(0, 3, 1, 2)  # codes are channels last

    found = ops.conv2d(x, words, levels, scale, bias, 4, (3, 2))
    torch.testing.assert_close(found, F.conv2d(x, dense(scale * levels[codes.int()]), bias))
    step, offset, scale, _, bias, x_scale, zero = real(codes)
    found = ops.conv2d_int(q, words, *real(codes), 4, (3, 2))
    kernel = dense(scale * (offset + step * codes))
    expected = F.conv2d(x_scale * (q - zero), kernel, bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)  # of sums near 100


def test_a_compiled_module_gives_the_same_numbers() -> None:
    model, x = Net(), image()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(x), model(x)))


def test_an_exported_module_holds_the_operators_and_serves_any_batch() -> None:
    model, x = Net(), image()
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for name in ("linear", "conv2d", "linear_int", "conv2d_int"):
        assert f"adq.packed_{name}.default" in names
    more = torch.cat([x, x.flip(0)])[:3]
    assert all(map(torch.equal, program.module()(more), model(more)))


@pytest.mark.parametrize("k", [11, 20])
def test_words_of_another_size_are_refused(k: int) -> None:
    codes, words, levels, scale, bias = weight(6, 12)
    with pytest.raises(ValueError, match=r"expected words of shape \(2, .* rows of 20 .* 4 bits"):
        ops.linear(torch.ones(2, 20), words, levels, scale, bias, 4)
    with pytest.raises(ValueError, match="expected words of shape"):
        ops.linear_int(torch.ones(2, 20).byte(), words, *real(codes), 4)
    with pytest.raises(ValueError, match="rows of 18 weights"):
        ops.conv2d(image(), words, levels, scale, bias, 4, (3, 3), groups=2)
    with pytest.raises(ValueError, match="rows of 18 weights"):
        ops.conv2d_int(image().byte(), words, *real(codes), 4, (3, 3), groups=2)
    with pytest.raises(ValueError, match="scales of shape"):
        ops.linear(torch.ones(2, k + 1), words, levels, scale.expand(6, k), bias, 4)


def test_a_cpu_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from adq.quant.kernels import packed_ops as ops, packed_reference as r\n"
        "c = torch.ones(4, 6, dtype=torch.uint8)\n"
        "rest = r.arrange(c, 2), torch.arange(4.0), torch.ones(4, 1), None, 2\n"
        "assert ops.linear(torch.ones(2, 6), *rest).tolist() == [[6.0] * 4] * 2\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
