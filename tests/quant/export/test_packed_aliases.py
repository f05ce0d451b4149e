"""Packing a model that has one module under two names: stored once, sized right, loaded back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adq.loading import load
from adq.proxies.costs import CostModel
from adq.quant.apply import quantize
from adq.quant.export.packed import save_packed
from adq.quant.layers import trace_layers
from adq.quant.qat import TrainingConfig, train_
from adq.quant.spec import BitVector


class Line(nn.Module):
    """A Linear under two names, called under both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.a = nn.Linear(9, 9)
        self.b = self.a
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.first(x.flatten(1)).relu()).relu()).relu())


class Block(nn.Module):
    """A block under two names, with a layer that has two names in it."""

    def __init__(self, calls: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.a = nn.Sequential(nn.Conv2d(4, 4, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.a.add_module("same", self.a[0])
        self.b = nn.ModuleList([self.a])
        self.head = nn.Linear(4, 3)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(self.calls):
            x = self.a[2](self.a[1](self.b[0][0](x)))
        return self.head(x.mean(dim=(2, 3)))


TWICE = {Line: ("a.weight", "b.weight"), Block: ("a.0.weight", "b.0.same.weight")}


def data(kind: type[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    side = (2, 3) if kind is Line else (6, 6)
    return [(torch.randn(8, 1, *side, generator=generator), torch.arange(8) % 3)] * 3


def built(kind: type[nn.Module], seed: int, *args: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(*args).eval()


def bits_for(model: nn.Module, x: Tensor, *, act: bool) -> BitVector:
    weight = {layer.name: 3 + i for i, layer in enumerate(trace_layers(model, x))}
    return BitVector(weight, dict.fromkeys(weight, 4) if act else {})


@pytest.mark.parametrize("kind", [Line, Block])
@pytest.mark.parametrize("act", [False, True])
def test_a_module_under_two_names_has_its_weight_in_the_file_once(
    tmp_path: Path, kind: type[nn.Module], act: bool
) -> None:
    path, batches = tmp_path / "m", data(kind)
    x = batches[0][0]
    model = built(kind, 0)
    layers = trace_layers(model, x)
    bits = bits_for(model, x, act=act)
    predicted = CostModel(model, layers, list(bits.weight)).costs(bits).size_bytes
    trained = quantize(model, bits, batches)
    train_(trained, batches, nn.functional.cross_entropy, TrainingConfig(3, lr=1e-2), 0)

    save_packed(trained, path, {})
    assert path.stat().st_size == predicted
    own = {f"{n}.weight.{part}" for n in bits.weight for part in ("codes", "codebook", "scale")}
    own |= {f"{n}.input.{part}" for n in bits.act for part in ("thresholds", "scale", "zero_point")}
    # every matrix and filter of these models is a quantized weight
    rest = {key for key, value in model.state_dict().items() if value.dim() < 2}
    assert load_file(path).keys() == own | rest

    loaded = load(path, built(kind, 9), kernels="torch")
    assert torch.equal(loaded(x), trained.eval()(x))
    tied = {id(loaded.get_parameter(name)) for name in TWICE[kind]}
    assert len(tied) == 1


@pytest.mark.parametrize("act", [False, True])
def test_a_block_under_two_names_is_folded(tmp_path: Path, act: bool) -> None:
    path, batches = tmp_path / "m", data(Block)
    x = batches[0][0]
    model = built(Block, 0, 1)
    trained = quantize(model, bits_for(model, x, act=act), batches)
    train_(trained, batches, nn.functional.cross_entropy, TrainingConfig(3, lr=1e-2), 0)
    save_packed(trained, path, {})
    assert not any("running_mean" in key for key in load_file(path))
    loaded = load(path, built(Block, 9, 1), kernels="torch")
    assert torch.allclose(loaded(x), trained.eval()(x), atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in loaded.modules())
