"""The operators as PyTorch's tracers, its checks and its other machinery see them, on a CPU."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn

from adq.quant.errors import InputError
from adq.quant.kernels import n2uq_ops as ops
from adq.quant.modules import N2UQActivation

FORWARD = torch.ops.adq.n2uq_forward.default
BACKWARD = torch.ops.adq.n2uq_backward.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def example(
    shape: tuple[int, ...], bits: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    work = torch.promote_types(dtype, torch.float32)
    widths = 0.1 + torch.rand(2**bits - 1, generator=generator, dtype=work)
    start = -0.4 * widths.sum().reshape(1)
    x = 0.5 * widths.sum() * torch.randn(shape, generator=generator, dtype=work)
    return x.to(dtype), start, widths, torch.tensor([0.3]).to(work), torch.tensor([2.0]).to(work)


class Net(nn.Module):
    """A layer on either side of a quantizer."""

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3)
        self.quantizer = N2UQActivation(bits, 0.1, 0)
        self.second = nn.Conv2d(6, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.quantizer(self.first(x).relu()))
        return out


def results(model: nn.Module, call: Any, x: Tensor) -> list[Tensor]:
    """The output and the gradients of x and all parameters."""
    x = x.clone().requires_grad_()
    out = call(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


# opcheck looks for gradients at copies of its own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("shape", [(6, 50), (2, 3, 4, 5), (0, 3), ()])
def test_the_forward_operator_passes_opcheck(shape: tuple[int, ...], needs_grad: bool) -> None:
    x, start, widths, scale, zero_point = example(shape)
    for t in (x, start, widths, scale):
        t.requires_grad_(needs_grad)
    torch.library.opcheck(FORWARD, (x, start, widths, scale, zero_point))


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_operators_pass_opcheck_in_every_dtype_and_layout(dtype: torch.dtype, bits: int) -> None:
    dense, *parameters = example((2, 6, 4, 5), bits, dtype)
    for x in (dense, dense.to(memory_format=torch.channels_last), dense.mT, dense[:, ::2]):
        torch.library.opcheck(FORWARD, (x, *parameters))
        _, place, edges = FORWARD(x, *parameters)
        for grad in (torch.ones_like(x), torch.ones_like(x[:, :, :, :1]).expand(x.shape)):
            torch.library.opcheck(BACKWARD, (grad, x, place, edges, *parameters[1:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_has_the_dtype_and_the_layout_of_the_input(dtype: torch.dtype) -> None:
    dense, *parameters = example((2, 3, 4, 5), dtype=dtype)
    expected = ops.fake_quantize(dense, *parameters)
    for x in (dense.to(memory_format=torch.channels_last), dense.mT.contiguous().mT):
        out = ops.fake_quantize(x, *parameters)
        assert out.stride() == x.stride()
        assert out.dtype == dtype
        assert torch.equal(out, expected)


class Surrogate(torch.autograd.Function):
    """The curve that the operator is differentiated as, with the operator's derivative."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x, start, widths, scale, zero_point = inputs
        ctx.save_for_backward(*inputs)
        return scale * (oracles.curve(x, start, widths) - zero_point)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, _, widths, scale, zero_point = ctx.saved_tensors
        _, place, edges = FORWARD(*ctx.saved_tensors)
        found = BACKWARD(grads[0], x, place, edges, widths, scale, zero_point)
        return *found[:3], None, None  # σ multiplies the step, not the curve


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_smooth_part_passes_gradcheck(bits: int) -> None:
    x, start, widths, scale, zero_point = example((40,), bits)
    edges = FORWARD(x, start, widths, scale, zero_point)[2]
    # finite differences are wrong across a kink
    x = x[(x[:, None] - edges).abs().min(dim=1).values > 1e-4]
    assert x.numel() > 30
    inputs = [t.requires_grad_() for t in (x, start, widths)]
    assert torch.autograd.gradcheck(Surrogate.apply, (*inputs, scale, zero_point))


def test_the_gradient_of_the_output_scale_is_that_of_a_product() -> None:
    x, start, widths, scale, zero_point = example((40,))
    scale.requires_grad_()
    out = ops.fake_quantize(x, start, widths, scale, zero_point)
    (found,) = torch.autograd.grad(out.sum(), scale)
    torch.testing.assert_close(found, (out / scale).sum().detach().reshape(1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_module_gives_the_same_numbers(dynamic: bool) -> None:
    model, x = Net(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for one, other in zip(results(model, compiled, x), results(model, model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_an_exported_module_holds_the_operator_and_gives_the_same_numbers() -> None:
    model, x = Net(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(model, (x,))
    assert FORWARD in {node.target for node in program.graph.nodes}
    assert torch.equal(program.module()(x), model(x))


def test_a_distributed_module_gives_the_same_numbers(tmp_path: Path) -> None:
    model, x = Net(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(x).square().sum().backward()
        found = [p.grad for p in model.parameters()]
    finally:
        torch.distributed.destroy_process_group()
    for one, other in zip(found, results(model, model, x)[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_two_runs_are_equal_to_the_last_bit() -> None:
    model, x = Net(), torch.randn(4, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    for one, other in zip(results(model, model, x), results(model, model, x), strict=True):
        assert torch.equal(one, other)


def test_an_autocast_module_keeps_the_lower_precision_and_trains_in_full() -> None:
    model, x = Net(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[torch.dtype] = []
    model.quantizer.register_forward_hook(
        lambda _, args, out: seen.extend((args[0].dtype, out.dtype))
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    assert seen == [torch.bfloat16] * 2
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_second_derivative_is_refused() -> None:
    x, *parameters = example((5,))
    out = ops.fake_quantize(x.requires_grad_(), *parameters)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("count", [2, 256])
def test_another_number_of_widths_is_refused(count: int) -> None:
    x, start, _, scale, zero_point = example((5,))
    with pytest.raises(InputError, match=rf"got {count}"):
        ops.fake_quantize(x, start, torch.ones(count), scale, zero_point)


def test_a_cpu_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from adq.quant.modules import N2UQActivation\n"
        "N2UQActivation(4, 0.1, 7)(torch.randn(5, requires_grad=True)).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
