"""The operators on weights as PyTorch's tracers, its checks and its other machinery see them, on a
CPU."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adq.quant.kernels import weights_ops as ops
from adq.quant.kernels import weights_reference as reference
from adq.quant.kernels.weights_reference import RULES

FORWARD = torch.ops.adq.weights_forward.default
BACKWARD = torch.ops.adq.weights_backward.default
STEP = torch.ops.adq.codebook_step.default
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

ROWS, SIZES, BITS = [3, 2, 4], [5, 9, 1], [2, 4, 3]
LAYOUT = ROWS, SIZES, BITS
COUNT = sum(n * size for n, size in zip(ROWS, SIZES, strict=True))


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    work = torch.promote_types(dtype, torch.float32)
    w = 2 * torch.randn(COUNT, generator=generator, dtype=work)
    scale = 0.5 + torch.rand(sum(ROWS), generator=generator, dtype=work)
    levels = [torch.randn(2**b, generator=generator, dtype=work).sort().values for b in BITS]
    return w.to(dtype), scale, torch.cat(levels)


class Net(nn.Module):
    """Two linear layers whose weights are quantized in one call."""

    levels: Tensor

    def __init__(self, rule: str = "straight") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.rule = nn.Linear(6, 8), nn.Linear(8, 3), rule
        self.scale = nn.Parameter(0.1 + torch.rand(11))
        levels = [torch.randn(2**b).sort().values for b in (3, 2)]
        self.register_buffer("levels", torch.cat(levels))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.cat([self.first.weight.flatten(), self.second.weight.flatten()])
        layout = [8, 3], [6, 8], [3, 2]
        out = ops.quantize_weights(w, self.scale, self.levels, *layout, self.rule)[0]
        first, second = out.split([48, 24])
        hidden = nn.functional.linear(x, first.view(8, 6), self.first.bias).relu()
        return nn.functional.linear(hidden, second.view(3, 8), self.second.bias)


def results(model: nn.Module, call: Any, x: Tensor) -> list[Tensor]:
    """The output and the gradients of all parameters."""
    out = call(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def batch() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


# opcheck looks for gradients at copies of its own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("rule", range(len(RULES)))
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_forward_operator_passes_opcheck(needs_grad: bool, gather: bool, rule: int) -> None:
    w, scale, levels = example()
    inputs = w.requires_grad_(needs_grad), scale.requires_grad_(needs_grad), levels
    torch.library.opcheck(FORWARD, (*inputs, *LAYOUT, rule, gather))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_operators_pass_opcheck_in_every_dtype(dtype: torch.dtype) -> None:
    w, scale, levels = example(dtype)
    torch.library.opcheck(FORWARD, (w, scale, levels, *LAYOUT, 0, True))
    _, codes, partials = FORWARD(w, scale, levels, *LAYOUT, 0, True)
    for grad in (torch.ones_like(w), torch.ones_like(w[:1]).expand(w.shape)):
        for rule in range(len(RULES)):
            torch.library.opcheck(BACKWARD, (grad, w, codes, scale, levels, *LAYOUT, rule))
    parts = [reference.parts(n * size) for n, size in zip(ROWS, SIZES, strict=True)]
    state = levels, torch.ones_like(levels), levels.clone()
    for split in (False, True):
        for zero in (False, True):
            rest = BITS, parts, 0.9, 1e-5, split, zero
            torch.library.opcheck(STEP, (partials, *state, *rest))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_have_the_dtypes_of_their_inputs(dtype: torch.dtype) -> None:
    w, scale, levels = example(dtype)
    w.requires_grad_(), scale.requires_grad_()
    out, codes, partials = ops.quantize_weights(w, scale, levels, *LAYOUT, gather=True)
    assert out.dtype == dtype
    assert codes.dtype == torch.uint8
    assert partials.dtype == torch.float64
    assert not codes.requires_grad
    assert not partials.requires_grad
    grads = torch.autograd.grad(out.sum(), (w, scale))
    assert [g.dtype for g in grads] == [dtype, scale.dtype]


def test_a_weight_that_is_not_contiguous_will_do() -> None:
    w, scale, levels = example()
    apart = torch.stack([w, w], dim=1)[:, 0]
    assert not apart.is_contiguous()
    for rule in RULES:
        found = []
        for one in (w, apart):
            one = one.detach().requires_grad_()
            out = ops.quantize_weights(one, scale.requires_grad_(), levels, *LAYOUT, rule)[0]
            weights = torch.arange(COUNT, dtype=w.dtype)
            found.append((out, *torch.autograd.grad((out * weights).sum(), (one, scale))))
        assert all(map(torch.equal, *found))


def smooth(w: Tensor, s: Tensor, offset: Tensor, limits: Tensor, rule: str) -> Tensor:
    """What each rule takes ŵ for, s being the scale of each weight, and (low, high) the limits.

    `straight` holds the offset c[k] − x of the staircase fixed; `pact` takes the weight for itself,
    clipped; `lsq` clips and holds the offset fixed inside.
    """
    low, high = s * limits
    if rule == "pact":
        return w.clamp(low, high)
    if rule == "straight":
        return w + s * offset
    return torch.where((w > low) & (w < high), w + s * offset, w.clamp(low, high))


class Surrogate(torch.autograd.Function):
    """The smooth function, with the operator's derivative."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, levels: Tensor, *rest: Any) -> Tensor:
        offset, limits, owner, rule = rest
        ctx.save_for_backward(w, scale, levels)
        ctx.rule = RULES.index(rule)
        return smooth(w, scale[owner], offset, limits, rule)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, scale, levels = ctx.saved_tensors
        codes = FORWARD(w, scale, levels, *LAYOUT, ctx.rule, False)[1]
        found = BACKWARD(grads[0], w, codes, scale, levels, *LAYOUT, ctx.rule)
        return *found, *(None,) * 5


@pytest.mark.parametrize("rule", RULES)
def test_the_smooth_part_passes_gradcheck(rule: str) -> None:
    w, scale, levels = example()
    counts = torch.tensor(SIZES).repeat_interleave(torch.tensor(ROWS))
    owner = torch.arange(sum(ROWS)).repeat_interleave(counts)
    x = w / scale[owner]
    own = [c for c, n, m in zip(levels.split([2**b for b in BITS]), ROWS, SIZES, strict=True)
           for _ in range(n * m)]  # fmt: skip
    offset = torch.stack([c[(c - v).abs().argmin()] - v for c, v in zip(own, x, strict=True)])
    limits = torch.stack([c[[0, -1]] for c in own], dim=1)
    outside = (x < limits[0]) | (x > limits[1])
    assert 0 < outside.sum() < COUNT
    assert (x - limits).abs().min() > 1e-4  # finite differences are wrong across a kink
    inputs = (w.requires_grad_(), scale.requires_grad_(), levels, offset, limits, owner, rule)
    assert torch.autograd.gradcheck(Surrogate.apply, inputs)


@pytest.mark.parametrize("rule", RULES)
def test_a_compiled_module_gives_the_same_numbers(rule: str) -> None:
    model, x = Net(rule), batch()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for one, other in zip(results(model, compiled, x), results(model, model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_compiled_codebook_step_gives_the_same_numbers() -> None:
    w, scale, levels = example(torch.float32)

    def step(w: Tensor) -> tuple[Tensor, ...]:
        partials = ops.quantize_weights(w, scale, levels, *LAYOUT, gather=True)[2]
        counts = torch.full_like(levels, 0.25)
        return ops.codebook_step(partials, levels, counts, counts * levels, BITS, [1, 1, 1], 0.5)

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(w), step(w), strict=True):
        assert torch.equal(one, other)


def test_an_exported_module_holds_the_operator_and_gives_the_same_numbers() -> None:
    model, x = Net(), batch()
    program = torch.export.export(model, (x,))
    assert FORWARD in {node.target for node in program.graph.nodes}
    assert torch.equal(program.module()(x), model(x))


def test_a_second_derivative_is_refused() -> None:
    w, scale, levels = example()
    out = ops.quantize_weights(w.requires_grad_(), scale, levels, *LAYOUT)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), w, create_graph=True)


def test_a_cpu_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from adq.quant.kernels import weights_ops as ops\n"
        "w, s, c = torch.randn(6, requires_grad=True), torch.ones(2), torch.arange(4.0)\n"
        "out, _, p = ops.quantize_weights(w, s, c, [2], [3], [2], gather=True)\n"
        "out.sum().backward()\n"
        "ops.codebook_step(p, c, c, c, [2], [1], 0.9)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
