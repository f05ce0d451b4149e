"""The operators that quantize inputs, on a CPU: their values, and how tracers see them."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from adq.quant.errors import InputError
from adq.quant.export.loading import PackedInput
from adq.quant.kernels import counting
from adq.quant.kernels.inputs_ops import input_codes, quantize_input
from adq.quant.kernels.n2uq_ops import fake_quantize
from adq.quant.kernels.n2uq_reference import edges_of

QUANTIZE = torch.ops.adq.quantize_input.default
CODES = torch.ops.adq.input_codes.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

LAYOUTS = {
    "dense": lambda t: t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT,
    "every second row": lambda t: torch.cat([t, t], dim=2)[:, :, ::2],
    "one value everywhere": lambda t: t[..., :1].expand(t.shape),
    "a later part": lambda t: torch.cat([t, t])[2:],
    "nothing": lambda t: t[:0],
}


@pytest.fixture(params=["C", "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test that asks for it runs with the C kernel and without."""
    if request.param == "PyTorch":
        monkeypatch.setattr(counting, "_function", lambda: None)
    elif counting._function() is None:
        pytest.skip("counting.c was not compiled: there was no C compiler")
    return request.param


def example(
    bits: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values on both sides of the thresholds, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(bits)
    thresholds = torch.randn(2**bits - 1, generator=generator).sort().values
    thresholds[-1] = thresholds[-2]
    x = torch.randn(shape, generator=generator)
    if x.numel() > 4:
        x.view(-1)[:4] = torch.tensor([math.nan, math.inf, -math.inf, thresholds[1]])
    return x.to(dtype), thresholds, torch.tensor([0.3]), torch.tensor([2.0])


def code(x: float, thresholds: list[float]) -> int:
    """The oracle; NaN counts as +∞."""
    return sum(math.isnan(x) or t <= x for t in thresholds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_and_values_are_the_definitions(bits: int, dtype: torch.dtype, way: str) -> None:
    x, thresholds, scale, zero_point = example(bits, (3, 7, 11), dtype)
    codes = torch.tensor([code(v, thresholds.tolist()) for v in x.flatten().tolist()])
    codes = codes.view(x.shape)
    found = input_codes(x, thresholds)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), codes)
    work = torch.promote_types(dtype, torch.float32)
    expected = ((codes.to(work) - zero_point.to(work)) * scale.to(work)).to(dtype)
    torch.testing.assert_close(
        quantize_input(x, thresholds, scale, zero_point), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_memory_layout_will_do_and_is_kept(dtype: torch.dtype, layout: str, way: str) -> None:
    dense, *parameters = example(4, (2, 3, 14, 15), dtype)
    x = LAYOUTS[layout](dense)
    expected = torch.ops.adq.quantize_input(x.contiguous(), *parameters)
    for out, one in (
        (quantize_input(x, *parameters), expected),
        (input_codes(x, parameters[0]), input_codes(x.contiguous(), parameters[0])),
    ):
        assert torch.equal(out, one)
        assert out.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantizer_in_training_gives_the_same_values_with_its_thresholds(
    bits: int, dtype: torch.dtype, way: str
) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = 2 * torch.randn(20_000, generator=generator).to(dtype)
    start, widths = (
        torch.tensor([-1.0]),
        2**-bits * (2 + torch.rand(2**bits - 1, generator=generator)),
    )
    scale, zero_point = torch.tensor([0.1]), torch.tensor([2.0])
    thresholds = edges_of(start, widths, torch.float32)[1::2]
    found = quantize_input(x, thresholds, scale, zero_point)
    assert torch.equal(found, fake_quantize(x, start, widths, scale, zero_point))


def test_the_definition_in_packed_files_gives_the_same_values(way: str) -> None:
    x, thresholds, scale, zero_point = example(3, (5, 7))
    expected = PackedInput(thresholds, scale, zero_point)(x)
    assert torch.equal(quantize_input(x, thresholds, scale, zero_point), expected)


@pytest.mark.parametrize("shape", [(6, 50), (2, 3, 4, 5), (0, 3), ()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operators_pass_opcheck(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, thresholds, scale, zero_point = example(3, shape, dtype)
    x = x.nan_to_num()  # opcheck compares with plain equality
    layouts = [x, x.mT, x[::2]] if x.ndim > 1 else [x]
    for one in layouts:
        torch.library.opcheck(QUANTIZE, (one, thresholds, scale, zero_point))
        torch.library.opcheck(CODES, (one, thresholds))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 3)
        _, *parameters = example(4, (1,))
        for name, value in zip(("thresholds", "scale", "zero_point"), parameters, strict=True):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out: Tensor = self.second(quantize_input(h, self.thresholds, self.scale, self.zero_point))
        return out + input_codes(h, self.thresholds).sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_module_gives_the_same_numbers(dynamic: bool) -> None:
    model, x = Net(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_an_exported_module_holds_the_operators_and_gives_the_same_numbers() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert {QUANTIZE, CODES} <= {node.target for node in program.graph.nodes}
        assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("shape", [(0,), (256,), (3, 1), ()])
def test_another_number_of_thresholds_is_refused(shape: tuple[int, ...]) -> None:
    x, _, scale, zero_point = example(2, (5,))
    with pytest.raises(InputError, match="expected from 1 to 255 of them"):
        quantize_input(x, torch.zeros(shape), scale, zero_point)
    with pytest.raises(InputError, match="expected from 1 to 255 of them"):
        input_codes(x, torch.zeros(shape))


def test_a_cpu_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from adq.quant.kernels.inputs_ops import input_codes\n"
        "assert input_codes(torch.tensor([0.5]), torch.tensor([0.0, 1.0])).item() == 1\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
