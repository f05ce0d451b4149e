"""Profiling with a clock of our own: no test asserts a real time.

What is timed is checked too: it is what a loaded model runs.
"""

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adq.proxies import profile
from adq.proxies.latency import LatencyTable, network_seconds
from adq.proxies.profile import measure, median_stderr, served
from adq.quant.apply import quantize
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo, trace_layers
from adq.quant.scheme import Scheme
from adq.quant.serving import serve
from adq.quant.spec import BitVector

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two convolutions of one shape; `twice` runs two times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.stem(x)))
        return self.fc(self.twice(self.twice(x)).flatten(1))


class Machine:
    """A runner and its clock: a pass takes weight bits + input bits/100 seconds, plus noise."""

    def __init__(self, noise: float = 0.0) -> None:
        self.now, self.noise = 0.0, noise
        self.rng = random.Random(1)
        self.prepared: list[tuple[str, int, int | None, int]] = []
        self.ran: list[tuple[str, int, int | None]] = []

    def runner(
        self, layer: nn.Module, inputs: list[Tensor], weight_bits: int, act_bits: int | None
    ) -> Callable[[], object]:
        kind = f"{type(layer).__name__}{tuple(inputs[0].shape)}"
        self.prepared.append((kind, weight_bits, act_bits, len(inputs)))

        def run() -> None:
            self.ran.append((kind, weight_bits, act_bits))
            seconds = weight_bits + (act_bits or 32) / 100
            self.now += seconds * (1 + self.noise * self.rng.gauss(0, 1))

        return run

    def clock(self) -> float:
        return self.now


def profiled(
    machine: Machine, net: nn.Module | None = None, **options: Any
) -> tuple[LatencyTable, tuple[LayerInfo, ...]]:
    net, x = net or Net(), torch.randn(5, 2, 8, 8)
    layers = trace_layers(net, x[:2])
    settings: dict[str, Any] = {"bits": (4, 8), "act_bits": (8, None), "repeats": 7, **options}
    found = measure(
        net, layers, x, device=CPU, runner=machine.runner, clock=machine.clock, **settings
    )
    return found, layers


def test_every_distinct_shape_is_measured_once_at_every_width() -> None:
    machine = Machine()
    found, layers = profiled(machine)
    kinds = {kind for kind, *_ in machine.prepared}
    assert kinds == {"Conv2d(5, 2, 8, 8)", "Conv2d(5, 4, 6, 6)", "Linear(5, 144)"}
    assert len(found.entries) == 4 * 5  # a and b are one shape; twice has twice the MACs of one
    assert {(e.weight_bits, e.act_bits) for e in found.entries} == {
        (32, None), (4, 8), (4, None), (8, 8), (8, None),
    }  # fmt: skip
    assert sorted({calls for *_, calls in machine.prepared}) == [1, 2]
    for layer in layers:
        assert found.seconds(layer, 4, 8) == pytest.approx(4.08 / 5)  # five samples a batch
        assert found.seconds(layer, 8, None) == pytest.approx(8.32 / 5)
        assert found.seconds(layer, 6, 8) == pytest.approx(6.08 / 5)


def test_a_table_says_where_and_how_it_was_measured() -> None:
    found, _ = profiled(Machine())
    assert (found.batch, found.repeats, found.threads) == (5, 7, torch.get_num_threads())
    assert found.versions["torch"] == torch.__version__
    assert found.device
    assert found.rest_seconds == 0  # this machine's clock stands still between the layers


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="nothing tells the clock")
def test_the_clock_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([2000.4, 3000.0])
    monkeypatch.setattr(profile, "clock_mhz", lambda device: next(rates))
    found, _ = profiled(Machine())
    assert found.notes == ("the clock ran at 2000 MHz before and 3000 MHz after",)
    monkeypatch.setattr(profile, "clock_mhz", lambda device: None)
    assert profiled(Machine())[0].notes == ()


class Waiting(Net):
    """Takes half a second between its layers, and 32.32 in each FP32 layer."""

    machine: Machine

    def forward(self, x: Tensor) -> Tensor:
        self.machine.now += 0.5 + 5 * 32.32
        return super().forward(x)


@pytest.mark.skipif(
    "model name"
    not in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""),
    reason="nothing names the processor",
)
def test_a_processor_is_named_as_it_names_itself() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    assert profile.device_name(CPU) in names


def test_what_the_whole_model_takes_beyond_its_layers_is_the_rest() -> None:
    machine, net = Machine(), Waiting()
    Waiting.machine = machine
    found, layers = profiled(machine, net, calls=2)
    assert found.rest_seconds == pytest.approx(0.5 / 5)
    bits = BitVector({layer.name: 4 for layer in layers}, {layer.name: 8 for layer in layers})
    assert network_seconds(found, layers, bits) == pytest.approx((0.5 + 5 * 4.08) / 5)


def test_several_passes_between_two_readings_are_divided_out() -> None:
    found, layers = profiled(Machine(), calls=3)
    assert found.seconds(layers[0], 4, 8) == pytest.approx(4.08 / 5)


def test_all_layers_and_widths_take_turns() -> None:
    machine = Machine()
    profiled(machine)
    warm_up = len(machine.prepared) * profile.WARM_UP
    rounds = machine.ran[warm_up:]
    size = len(machine.prepared)
    assert len(rounds) == 7 * size
    parts = [rounds[i : i + size] for i in range(0, len(rounds), size)]
    assert all(sorted(map(str, part)) == sorted(map(str, parts[0])) for part in parts)
    assert any(part != parts[0] for part in parts)


def test_the_median_shrugs_off_an_interruption() -> None:
    machine = Machine()
    readings = 0

    def clock() -> float:
        nonlocal readings
        readings += 1
        if readings % 100 == 0:
            machine.now += 1e6
        return machine.now

    machine.clock = clock  # type: ignore[method-assign]
    found, layers = profiled(machine)
    assert found.seconds(layers[0], 4, 8) == pytest.approx(4.08 / 5)


def test_noise_shows_in_the_standard_error_and_the_median_lies_within_it() -> None:
    found, _ = profiled(Machine(noise=0.05), repeats=400)
    true = 4.08 / 5
    for e in (e for e in found.entries if (e.weight_bits, e.act_bits) == (4, 8)):
        # the median of n normal readings has the standard error σ·√(π/2n); ±50% of it, since the
        # spread of 400 readings around their median is itself known to some 20% by order statistics
        assert e.stderr == pytest.approx(0.05 * true * math.sqrt(math.pi / 800), rel=0.5)
        assert abs(e.seconds - true) < 4 * e.stderr


@pytest.mark.parametrize("n", [5, 6, 30, 31, 101, 1000])
def test_the_standard_error_covers_the_median_two_times_in_three(n: int) -> None:
    """The interval covers the true median when the number of readings below it, which is binomial
    with p = 1/2 whatever the distribution, lies between its ends' ranks. One that covers 68.3% of
    the time has a half-width of one standard error; ranks are whole, hence 62.5% to 78.1%."""
    values = random.Random(n).sample([2.0**-i for i in range(n)], n)
    ordered = sorted(values)
    (low, high) = next(
        (i, n - 1 - i)
        for i in range(n)
        if (ordered[n - 1 - i] - ordered[i]) / 2 == median_stderr(values)
    )
    covered = sum(math.comb(n, below) for below in range(low + 1, high + 1)) / 2**n
    assert 0.625 <= covered <= 0.7813
    assert n < 100 or covered == pytest.approx(0.683, abs=0.05)


def test_too_few_repeats_and_quantized_models_are_refused() -> None:
    with pytest.raises(InputError, match="repeats: expected at least 5, got 4"):
        profiled(Machine(), repeats=4)
    net, x = Net(), torch.randn(4, 2, 8, 8)
    layers = trace_layers(net, x)
    quantized = quantize(net, BitVector({layer.name: 4 for layer in layers}), [(x, None)])
    with pytest.raises(InputError, match="layer 'stem' is quantized: give the FP32 model"):
        measure(quantized, layers, x, [8], [8], CPU)


def test_a_layer_that_does_not_run_is_named() -> None:
    net, x = Net(), torch.randn(4, 2, 8, 8)
    layers = trace_layers(net, x)
    net.unused = nn.Linear(2, 2)
    ghost = LayerInfo("unused", "Linear", (2, 2), (2,), 4, 2)
    with pytest.raises(InputError, match="layer 'unused' does not run"):
        measure(net, (*layers, ghost), x, [8], [8], CPU)


def test_layers_that_only_their_dilation_tells_apart_are_noted() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=2, dilation=2), nn.Conv2d(2, 1, 1)
    )
    x, machine = torch.randn(2, 2, 6, 6), Machine()
    found = measure(
        net, trace_layers(net, x), x, [8], [8], CPU, 5, runner=machine.runner, clock=machine.clock
    )
    assert found.notes[0].startswith("layer '1' has the time of '0': same shape and MACs")
    assert {calls for *_, calls in machine.prepared} == {1}


def test_the_models_modes_and_weights_are_left_alone() -> None:
    net, x = Net(), torch.randn(3, 2, 8, 8)
    net.a.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    measure(net, trace_layers(net, x), x, [8], [8], CPU, 5)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training
    assert not net.a.training
    assert not net.stem._forward_pre_hooks


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(17, 5), (3, 17)),
    (nn.Linear(16, 8, bias=False), (2, 7, 16)),
    (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 9, 9)),
    (nn.Conv2d(8, 8, 3, dilation=2, groups=8, bias=False), (2, 8, 9, 9)),
    (nn.Conv2d(6, 4, (3, 1), groups=2), (2, 6, 5, 7)),
    (nn.Conv1d(4, 6, 5, padding=2), (2, 4, 11)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5)),
]


@pytest.mark.parametrize("scheme", [Scheme(), Scheme("lsq", "lsq"), Scheme(group_size=8)])
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@pytest.mark.parametrize("width", [(2, None), (4, 4), (8, 8)])
def test_what_is_timed_is_what_a_packed_model_runs(
    layer: nn.Module, shape: tuple[int, ...], width: tuple[int, int | None], scheme: Scheme
) -> None:
    """Its outputs are those of a plain layer on the weight and the input that it was given."""
    given: list[Any] = []

    def spy(*args: Any) -> nn.Module:
        given.append(args)
        return serve(*args)

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(profile, "serve", spy)
        outputs = served(layer, [x, x + 1], *width, scheme)()
        [(_, weight, quantizer, _)] = given
        assert (weight.bits, quantizer is None) == (width[0], width[1] is None)
        plain = copy.deepcopy(layer)
        plain.weight = nn.Parameter(weight.fitted(layer).values())
        few = min(2 ** (width[0] - 1), plain.weight.numel() // 3)
        assert len(plain.weight.unique()) > few
        assert isinstance(outputs, list)
        for x_, got in zip((x, x + 1), outputs, strict=True):
            wanted = plain(x_ if quantizer is None else quantizer(x_))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_levels_have_a_common_step_where_the_schemes_have() -> None:
    step = profile._levels(4, Scheme("lsq")).diff()
    assert torch.allclose(step, step[0])
    step = profile._levels(4, Scheme()).diff()
    assert not torch.allclose(step, step[0], rtol=0.1)


def test_fp32_runs_the_layer_itself() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    outputs = served(layer, [x], 32, None)()
    assert isinstance(outputs, list)
    assert torch.equal(outputs[0], layer(x))


def test_a_real_profile_knows_every_width_and_can_be_looked_up() -> None:
    net, x = Net(), torch.randn(3, 2, 8, 8)
    layers = trace_layers(net, x)
    found = measure(net, layers, x, (2, 3, 8), (4, None), CPU, 5)
    for layer in layers:
        for width in ((2, 4), (3, None), (5, 4), (8, 4)):
            assert found.seconds(layer, *width) > 0
    assert found.rest_seconds >= 0


def test_two_profiles_time_the_same_inputs_whatever_was_drawn_before() -> None:
    given: list[list[Tensor]] = []

    def runner(_: nn.Module, inputs: list[Tensor], *__: Any) -> Callable[[], object]:
        given.append(inputs)
        return lambda: None

    net, x = Net(), torch.randn(3, 2, 8, 8)
    for _ in range(2):
        measure(net, trace_layers(net, x), x, [8], [8], CPU, 5, runner=runner)
    first, second = given[: len(given) // 2], given[len(given) // 2 :]
    for one, other in zip(first, second, strict=True):
        assert all(map(torch.equal, one, other))
        assert all(t.std() > 0.5 for t in one)
