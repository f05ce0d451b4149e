"""One call for all layers: the same bits as each layer alone, and nothing left over."""

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from adq.quant import codebook
from adq.quant.apply import dequantize_, quantize, quantized_layers
from adq.quant.errors import InputError
from adq.quant.flat import FLAT, FlatWeights, flats_of, tracking, update_codebooks
from adq.quant.modules import original_weight, weight_quantizer
from adq.quant.scheme import WEIGHT_METHODS, Scheme
from adq.quant.spec import BitVector


def flat_of(model: nn.Module) -> FlatWeights | None:
    return next(iter(flats_of(model)), None)


SCHEMES = [
    *(Scheme(method, group_size=g) for method in WEIGHT_METHODS for g in (None, 6)),
    Scheme(zero=True, split_dead=False, group_size=3),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
FORWARD = torch.ops.adq.weights_forward.default
BACKWARD = torch.ops.adq.weights_backward.default
STEP = torch.ops.adq.codebook_step.default


class Net(nn.Module):
    """A layer of each kind, transposed and depthwise ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.line = nn.ConvTranspose1d(6, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.relu(self.depthwise(F.relu(self.conv(x)))))
        return self.head(F.relu(self.line(F.relu(x).mean(dim=3))).mean(dim=2))


BITS = {"conv": 8, "depthwise": 2, "up": 3, "line": 4, "head": 5}


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def image(seed: int = 1) -> Tensor:
    return torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def moved(model: nn.Module) -> nn.Module:
    """Away from its start, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def alone(model: nn.Module) -> nn.Module:
    """A copy that quantizes each layer's weight by itself."""
    model = copy.deepcopy(model)
    for handle in getattr(model, FLAT)[1]:
        handle.remove()
    return model


def nothing_ready(model: nn.Module) -> bool:
    return all(weight_quantizer(layer).ready is None for _, layer in quantized_layers(model))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Calls(TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func] = self.count.get(func, 0) + 1
        return func(*args, **(kwargs or {}))

    def of(self, *names: Any) -> list[int]:
        return [self.count.get(name, 0) for name in names]


# --- the same bits ---


@every_scheme
def test_the_weights_of_the_models_pass_are_those_of_each_layer_alone(scheme: Scheme) -> None:
    model = moved(quantize(net(), BITS, scheme=scheme))
    seen: dict[str, Tensor] = {}
    for name, layer in quantized_layers(model):
        layer.register_forward_pre_hook(
            lambda layer, _, name=name: seen.update({name: layer.weight.detach().clone()})
        )
    for _ in range(2):
        out = model(image())
        assert seen.keys() == BITS.keys()
        for name, layer in quantized_layers(model):
            assert torch.equal(seen[name], layer.weight), name
        assert torch.equal(out, alone(model)(image()))
        moved(model)


@every_scheme
def test_gradients_of_the_models_pass_are_those_of_each_layer_alone(scheme: Scheme) -> None:
    model = moved(quantize(net(), BITS, scheme=scheme))
    single = alone(model)
    for m in (model, single):
        m(image()).square().sum().backward()
    assert gradients(model).keys() == gradients(single).keys()
    assert same(gradients(model), gradients(single))


def test_codes_come_layer_after_layer_and_are_those_of_each_quantizer() -> None:
    model = moved(quantize(net(), BITS))
    flat = flat_of(model)
    assert flat.names == list(BITS)
    model(image())
    parts = flat.codes.split(flat.sizes)
    for part, (_, layer) in zip(parts, quantized_layers(model), strict=True):
        assert torch.equal(part, weight_quantizer(layer).codes(original_weight(layer)))
    means = [part.double().mean().item() for part in parts]
    assert flat.per_layer(flat.codes).tolist() == pytest.approx(means)


def test_the_distance_is_the_sum_of_squared_errors_of_all_layers() -> None:
    model = moved(quantize(net(), BITS, scheme=Scheme(group_size=6)))
    flat = flat_of(model)
    model(image())
    expected = 0.0
    for _, layer in quantized_layers(model):
        pairs = zip(
            original_weight(layer).flatten().tolist(), layer.weight.flatten().tolist(), strict=True
        )
        expected += sum((w - q) ** 2 for w, q in pairs)
    assert flat.distance().item() == pytest.approx(expected, rel=1e-5)
    flat.distance().backward()
    for _, layer in quantized_layers(model):
        weight = original_weight(layer)
        torch.testing.assert_close(weight.grad, 2 * (weight - layer.weight).detach())
        assert weight_quantizer(layer).log_scale.grad is None


# --- one call ---


@every_scheme
def test_a_pass_is_one_call_forward_and_one_back(scheme: Scheme) -> None:
    model = quantize(net(), BITS, scheme=scheme)
    with Calls() as calls:
        out = model(image())
        assert calls.of(FORWARD, BACKWARD, STEP) == [1, 0, 0]
        out.square().sum().backward()
        assert calls.of(FORWARD, BACKWARD, STEP) == [1, 1, 0]
        with torch.no_grad():
            model(image())
        assert calls.of(FORWARD, BACKWARD, STEP) == [2, 1, 0]
    with Calls() as calls:
        alone(model)(image())
        assert calls.of(FORWARD) == [len(BITS)]


def test_a_codebook_step_after_a_tracked_pass_reads_no_weight_again() -> None:
    model = quantize(net(), BITS)
    flat = flat_of(model)
    with Calls() as calls:
        with tracking(flat):
            model(image()).sum().backward()
        flat.update(0.9, 0)
        assert calls.of(FORWARD, BACKWARD, STEP) == [1, 1, 1]
        flat.update(0.9, 0)  # the levels are others now
        assert calls.of(FORWARD, BACKWARD, STEP) == [2, 1, 2]
    assert not flat.tracking


def test_tracking_ends_when_its_block_raises() -> None:
    flat = flat_of(quantize(net(), BITS))

    def fail() -> None:
        with tracking(flat):
            assert flat.tracking
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert not flat.tracking


# --- nothing left over ---


def test_nothing_is_ready_after_a_pass_or_after_one_that_raises() -> None:
    model = quantize(net(), BITS)
    model(image())
    assert nothing_ready(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(3, 7, 5, 5))
    assert nothing_ready(model)


def test_a_pass_after_one_that_was_interrupted_sees_the_present_weights() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model = quantize(net(), BITS)
    handle = model.up.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(image())
    handle.remove()
    with torch.no_grad():
        model.get_parameter("head.parametrizations.weight.original").neg_()
    twin = quantize(net(), BITS)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(image()), twin(image()))


def test_a_deep_copy_is_independent() -> None:
    model = quantize(net(), BITS)
    model(image())
    twin = copy.deepcopy(model)
    assert flat_of(twin) is not flat_of(model)
    for (_, one), (_, other) in zip(quantized_layers(model), quantized_layers(twin), strict=True):
        assert other in flat_of(twin).layers
        assert one not in flat_of(twin).layers
    before, x = state(model), image()
    expected = model(x)
    moved(twin)
    update_codebooks(twin, 0.5, 0)
    with Calls() as calls:
        changed = twin(x)
        assert calls.of(FORWARD) == [1]
    assert torch.equal(changed, alone(twin)(x))
    assert not torch.equal(changed, expected)
    assert same(state(model), before)
    assert torch.equal(model(x), expected)


def test_dequantizing_takes_the_hooks_off() -> None:
    model = dequantize_(quantize(net(), BITS))
    assert flat_of(model) is None
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    with Calls() as calls:
        model(image())
    assert calls.of(FORWARD) == [0]


def test_a_model_in_a_wrapper_can_be_dequantized() -> None:
    plain, x = net(), image()
    wrapper = dequantize_(nn.Sequential(quantize(plain, BITS)))
    assert torch.equal(wrapper(x), plain(x))


def test_one_layer_of_a_model_can_be_dequantized() -> None:
    model, x = quantize(net(), BITS), image()
    dequantize_(model.head)
    expected = quantize(net(), {name: b for name, b in BITS.items() if name != "head"})
    assert torch.equal(model(x), expected(x))


# --- models of every manner ---


def test_gradients_accumulate_over_passes() -> None:
    model = moved(quantize(net(), BITS))
    model(image()).square().sum().backward()
    one = gradients(model)
    model.zero_grad()
    model(image(seed=5)).square().sum().backward()
    other = gradients(model)
    model.zero_grad()
    losses = [model(image()).square().sum(), model(image(seed=5)).square().sum()]
    assert nothing_ready(model)
    sum(losses).backward()
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, one[name] + other[name])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.inner(x).tanh()).tanh())


def tiny(make: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def test_a_layer_that_is_called_twice_gets_the_gradients_of_both_calls() -> None:
    model = quantize(tiny(Twice), {"inner": 3, "head": 2})
    single, x = alone(model), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with Calls() as calls:
        model(x).square().sum().backward()
    assert calls.of(FORWARD, BACKWARD) == [1, 1]
    single(x).square().sum().backward()
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, gradients(single)[name])


class Recursive(nn.Module):
    """Calls itself, hooks and all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = self.inner(x).tanh()
        if depth:
            x = self(x, depth - 1)
        return self.head(x)


def test_a_model_that_calls_itself_gives_the_same_numbers() -> None:
    model = quantize(tiny(Recursive), {"inner": 3, "head": 2})
    single, x = alone(model), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for m in (model, single):
        m(x).square().sum().backward()
    assert torch.equal(model(x), single(x))
    assert nothing_ready(model)
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, gradients(single)[name])


def test_a_part_of_a_model_runs_by_itself() -> None:
    model = quantize(net(), BITS)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    expected = F.linear(x, model.head.weight, model.head.bias)
    assert torch.equal(model.head(x), expected)


def test_layers_of_two_dtypes_are_quantized_one_by_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short, self.long = nn.Linear(4, 4), nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.long(self.short(x).double())

    model = quantize(tiny(Two), {"short": 3, "long": 2})
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), alone(model)(x))
    assert model(x).dtype == torch.float64
    model(x).sum().backward()


@pytest.mark.parametrize(("weight", "act"), [("adq", "n2uq"), ("lsq", "lsq")])
def test_a_compiled_model_gives_the_same_numbers(weight: Any, act: Any) -> None:
    bits = BitVector(BITS, {"up": 4, "head": 3})
    model = quantize(net(), bits, [(image(), None)], Scheme(weight, act))
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(image())
    found.square().sum().backward()
    of_compiled = gradients(model)
    model.zero_grad()
    expected = model(image())
    expected.square().sum().backward()
    assert torch.equal(found, expected)
    assert nothing_ready(model)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(of_compiled[name], grad)
    update_codebooks(compiled, 0.5, 0)
    assert torch.equal(compiled(image()), model(image()))
    torch.compiler.reset()


def test_what_a_pass_left_is_never_that_of_an_earlier_one() -> None:
    model = quantize(net(), BITS)
    flat = flat_of(model)
    model(image())  # eager: its codes stay
    with torch.no_grad():
        for weight in flat.weights:
            weight.neg_()
    torch.compile(model, backend="aot_eager")(image())
    torch.compiler.reset()
    expected = torch.cat(
        [
            weight_quantizer(layer).codes(original_weight(layer))
            for _, layer in quantized_layers(model)
        ]
    )
    assert torch.equal(flat.codes, expected)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def body(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize(
    "reentrant",
    [
        True,
        False,
    ],
)
def test_activation_checkpoints_give_the_same_gradients(reentrant: bool) -> None:
    bits = {"first": 3, "second": 2, "head": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = quantize(Checkpointed(reentrant), bits)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model(x).square().sum().backward()
    found = gradients(model)
    model.zero_grad()
    model.head(model.body(x)).square().sum().backward()
    for name, expected in gradients(model).items():
        torch.testing.assert_close(found[name], expected)
    assert nothing_ready(model)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_distributed_module_gives_the_same_numbers_and_its_codebooks_can_be_updated() -> None:
    model = moved(quantize(net(), BITS))
    twin = copy.deepcopy(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    for m in (parallel, twin):
        m(image()).square().sum().backward()
        update_codebooks(m, 0.7, 0)
    assert same(state(model), state(twin))
    assert same(gradients(model), gradients(twin))


# --- codebook steps ---


def expected_books(model: nn.Module, decay: float, scheme: Scheme) -> dict[str, codebook.Codebook]:
    """`codebook.ema_step` of each layer by itself."""
    found = {}
    for name, layer in quantized_layers(model):
        q = weight_quantizer(layer)
        rows = q.rows.split(original_weight(layer).detach())
        x = rows / q.log_scale.detach().exp()[:, None]
        book = codebook.Codebook(q.levels.clone(), q.counts.clone(), q.sums.clone())
        found[name] = codebook.ema_step(book, x, decay, split=scheme.split_dead, zero=scheme.zero)
    return found


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("split_dead", [False, True])
@pytest.mark.parametrize("group_size", [None, 6])
def test_an_update_is_each_layers_own_moving_average_step(
    zero: bool, split_dead: bool, group_size: int | None
) -> None:
    scheme = Scheme(zero=zero, split_dead=split_dead, group_size=group_size)
    model = moved(quantize(net(), BITS, scheme=scheme))
    flat = flat_of(model)
    for tracked in (False, True, False):
        flat.tracking = tracked
        model(image())
        expected = expected_books(model, 0.8, scheme)
        update_codebooks(model, 0.8, 0)
        for name, layer in quantized_layers(model):
            q = weight_quantizer(layer)
            for part in ("levels", "counts", "sums"):
                assert torch.equal(getattr(q, part), getattr(expected[name], part)), (name, part)
        moved(model)


def test_an_update_counts_the_dead_levels_of_each_layer() -> None:
    model = quantize(net(), {"conv": 2, "head": 3})
    for name, dead in (("conv", 1), ("head", 3)):
        q = weight_quantizer(model.get_submodule(name))
        q.levels[-dead:] += 1000  # nobody is near
        q.counts[-dead:] = 0
        q.sums[-dead:] = 0
    assert flat_of(model).update(0.5, 0).tolist() == [1, 3]


CHANGES = {
    "weight": lambda layer: original_weight(layer).mul_(-1),
    "scale": lambda layer: weight_quantizer(layer).log_scale.add_(0.5),
    "levels": lambda layer: weight_quantizer(layer).levels.mul_(1.5),
    "counts": lambda layer: weight_quantizer(layer).counts.mul_(2.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_statistics_of_a_pass_are_not_used_once_something_has_changed(change: str) -> None:
    model = quantize(net(), BITS)
    with tracking(flat_of(model)):
        model(image())
    with torch.no_grad():
        CHANGES[change](model.up)
    expected = expected_books(model, 0.8, Scheme())
    update_codebooks(model, 0.8, 0)
    for name, layer in quantized_layers(model):
        assert torch.equal(weight_quantizer(layer).levels, expected[name].levels), name


@pytest.mark.parametrize(
    "assign",
    [
        False,
        True,
    ],
)
def test_statistics_of_a_pass_are_not_used_once_a_state_is_loaded(assign: bool) -> None:
    model = quantize(net(), BITS)
    other = state(moved(copy.deepcopy(model)))
    # as a loaded model is: all its tensors are at version 0
    model.load_state_dict(state(model), assign=True)
    with tracking(flat_of(model)):
        model(image())
    model.load_state_dict(other, assign=assign)
    expected = expected_books(model, 0.8, Scheme())
    update_codebooks(model, 0.8, 0)
    for name, layer in quantized_layers(model):
        assert torch.equal(weight_quantizer(layer).levels, expected[name].levels), name


def test_an_update_does_nothing_to_fp32_models() -> None:
    model = net()
    before = state(model)
    update_codebooks(model, 0.5, 0)
    update_codebooks(quantize(model, {}), 0.5, 0)
    assert same(state(model), before)


@pytest.mark.parametrize("method", [m for m in WEIGHT_METHODS if m != "adq"])
def test_an_update_does_nothing_to_baselines(method: Any) -> None:
    model = moved(quantize(net(), BITS, scheme=Scheme(method)))
    before = state(model)
    update_codebooks(model, 0.5, 0)
    assert same(state(model), before)


def test_the_flat_weights_of_a_model_in_wrappers_are_found() -> None:
    model = quantize(net(), BITS)
    assert isinstance(flat_of(model), FlatWeights)
    assert flat_of(nn.Sequential(nn.Identity(), nn.ModuleList([model]))) is flat_of(model)
    assert flat_of(net()) is None


@pytest.mark.parametrize("names", list(itertools.combinations(BITS, 2)))
def test_quantizing_a_quantized_model_is_refused(names: tuple[str, str]) -> None:
    model = quantize(net(), {names[0]: 4})
    for again in names:
        with pytest.raises(InputError, match=r"quantized .*already: give the plain FP32 model"):
            quantize(model, {again: 3})
    assert torch.equal(model(image()), alone(model)(image()))


def test_codebooks_with_few_weights_to_a_level_stay_still() -> None:
    # 60 weights for 4 levels, 64 for 4, and 64 for 8
    layers = {"0": nn.Linear(10, 6), "1": nn.Linear(16, 4), "2": nn.Linear(8, 8)}
    model = quantize(nn.Sequential(OrderedDict(layers)), {"0": 2, "1": 2, "2": 3})
    with torch.no_grad():
        for weight in flat_of(model).weights:
            weight.copy_(weight.abs() + 1)
    twin = copy.deepcopy(model)
    before = [q.codebook for q in flat_of(copy.deepcopy(model)).quantizers]
    update_codebooks(model, 0.5)
    update_codebooks(twin, 0.5, 0)
    for name, moves in (("levels", [False, True, False]), ("counts", [False, True, False])):
        for old, now, all_moved, moved in zip(
            before, flat_of(model).quantizers, flat_of(twin).quantizers, moves, strict=True
        ):
            assert torch.equal(getattr(old, name), getattr(now, name)) != moved
            if moved:  # to where it moves when all do
                assert torch.equal(getattr(now, name), getattr(all_moved, name))


def test_a_model_runs_on_when_its_last_layer_is_dequantized_by_itself() -> None:
    model = quantize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), {"0": 3, "1": 3})
    for layer in model:
        dequantize_(layer)
    assert flats_of(model) == []
    update_codebooks(model)
    assert torch.isfinite(model(torch.ones(2, 4))).all()
