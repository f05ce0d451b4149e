"""The space that is trained whole: a small CNN on Fashion-MNIST at half its resolution.

Five layers are free: 2, 3 or 4 weight bits where most of the multiplications are, 2 or 4 in the
depthwise and the pointwise layer, and 2 or 4 input bits everywhere. The first and the last layer
have 8. That makes 3,456 bit vectors, each of which a core trains in about a second.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from grounds import fashion
from grounds.data import Batches, Data, Samples
from grounds.fashion import Residual, Unit
from safetensors.torch import load_file
from torch import nn

from adq.quant.files import write_tensors
from adq.quant.qat import TrainingConfig, train_
from adq.search.space import Choices, Space

HERE = Path(__file__).parent
FP32_TRAINING = TrainingConfig(epochs=10, lr=3e-3)
CALIBRATION = 1024
PINNED = 8

LAYERS = ("0.0", "1.0", "2.0", "3.0", "4.0", "5.0", "6.2")
WIDE, NARROW, INPUTS = (2, 3, 4), (2, 4), (2, 4)
SPACE = Space(
    LAYERS,
    tuple(
        Choices((name,), *bits)
        for name, bits in zip(
            LAYERS,
            [
                ((PINNED,), (PINNED,)),
                (WIDE, INPUTS),
                (WIDE, INPUTS),
                (NARROW, INPUTS),
                (NARROW, INPUTS),
                (WIDE, INPUTS),
                ((PINNED,), (PINNED,)),
            ],
            strict=True,
        )
    ),
)


class Net(nn.Sequential):
    """Seven layers, 14,312 weights, 0.47 million multiplications an image of 14 x 14 pixels."""

    def __init__(self) -> None:
        super().__init__(
            Unit(1, 8),
            Unit(8, 16, stride=2),  # 7 x 7
            Residual(16, 16),
            Unit(16, 16, stride=2, groups=16),  # 4 x 4
            Unit(16, 32, kernel=1),
            Residual(32, 32),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        )


def load(folder: Path = fashion.FOLDER) -> Data:
    """Fashion-MNIST, each 2 x 2 pixels averaged."""
    data = fashion.load(folder)

    def halved(samples: Samples) -> Samples:
        return F.avg_pool2d(samples[0], 2), samples[1]

    return Data(halved(data.train), halved(data.validation), halved(data.test))


def fp32(data: Data) -> nn.Module:
    """The trained network, kept in fp32.safetensors; trained anew, half a minute, if it is gone."""
    path = HERE / "fp32.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    if not path.exists():
        train_(model, Batches(data.train), F.cross_entropy, FP32_TRAINING, 0)
        write_tensors(path, model.state_dict(), {})
    model.load_state_dict(load_file(path))
    return model.eval()


def calibration(data: Data) -> list[Samples]:
    return list(zip(*(part[:CALIBRATION].split(128) for part in data.train), strict=True))
