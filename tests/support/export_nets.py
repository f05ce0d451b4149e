"""Small packed models for the exporters' tests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.quant.apply import quantize
from adq.quant.export.loading import load_packed_
from adq.quant.export.packed import save_packed
from adq.quant.qat import TrainingConfig, train_
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector


class Net(nn.Module):
    """Every kind of layer, odd sizes, a layer called twice; 1x6x6 images, three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.depthwise = nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False)
        self.up = nn.ConvTranspose2d(5, 10, 2, stride=2, groups=5)
        self.line = nn.Conv1d(10, 7, 2)
        self.twice = nn.Linear(7, 7)
        self.plain = nn.Linear(7, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.norm(self.conv(x)))))
        x = F.relu(self.line(F.gelu(self.up(x)).mean(dim=3))).mean(dim=2)
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(F.relu(self.plain(x)))


DEFAULT = Scheme()
WEIGHT_BITS = {"conv": 8, "depthwise": 3, "up": 4, "line": 2, "twice": 5, "head": 6}
ACT_BITS = {"conv": 8, "depthwise": 2, "up": 3, "line": 5, "twice": 4, "head": 7}


def images(samples: int = 24) -> Tensor:
    return torch.randn(samples, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def fp32(kind: Callable[[], nn.Module] = Net, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().eval()


@dataclass(frozen=True)
class Packed:
    model: nn.Module
    path: Path


def packed_net(
    folder: Path, act: dict[str, int] | None = None, scheme: Scheme = DEFAULT, seed: int = 0
) -> Packed:
    """A `Net` trained a little, so that scales, thresholds and BatchNorm have left their starts."""
    x = images()
    data = [(x, torch.arange(len(x)) % 3)]
    model = quantize(fp32(seed=seed), BitVector(WEIGHT_BITS, act or {}), data, scheme)
    train_(model, data, F.cross_entropy, TrainingConfig(8, lr=2e-2), 0)
    save_packed(model, folder / "packed.safetensors", {"name": "net"})
    return loaded(Net, folder / "packed.safetensors")


def loaded(kind: Callable[[], nn.Module], path: Path) -> Packed:
    return Packed(load_packed_(fp32(kind, seed=9), path, kernels="torch"), path)
