"""Fashion-MNIST, a small CNN and its FP32 weights.

The network is narrow on purpose: at 2 bits plain quantization must cost more than a point of
accuracy, or nothing could be told apart. One step and one evaluation are cheap on one CPU core.
"""

import gzip
import struct
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from grounds.data import Batches, Data
from safetensors.torch import load_file
from torch import Tensor, nn

from adq.quant.errors import InputError
from adq.quant.files import write_tensors
from adq.quant.qat import TrainingConfig, train_

BUILD = Path(__file__).parent / "build"
FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
TRAIN_SIZE, VALIDATION_SIZE, TEST_SIZE = 50_000, 10_000, 10_000
SEED = 0  # of the split and the FP32 training: both are the task's and do not follow a run's seed
FP32_TRAINING = TrainingConfig(epochs=20, lr=3e-3)


def load(folder: Path = FOLDER) -> Data:
    """50,000 training, 10,000 validation and 10,000 test samples.

    Raises InputError when a file is missing or is not the IDX file that it should be."""
    rest = TRAIN_SIZE + VALIDATION_SIZE
    images = read_idx(folder / "train-images-idx3-ubyte.gz", (rest, 28, 28))
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", (rest,)).long()
    test_images = read_idx(folder / "t10k-images-idx3-ubyte.gz", (TEST_SIZE, 28, 28))
    test_labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", (TEST_SIZE,)).long()
    order = torch.randperm(rest, generator=torch.Generator().manual_seed(SEED))
    train, validation = order.split([TRAIN_SIZE, VALIDATION_SIZE])
    std, mean = torch.std_mean(images[train].float())

    def normalised(raw: Tensor) -> Tensor:
        return (raw[:, None].float() - mean) / std

    return Data(
        (normalised(images[train]), labels[train]),
        (normalised(images[validation]), labels[validation]),
        (normalised(test_images), test_labels),
    )


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The uint8 array of an IDX file: two zeros, type 8, the rank, big-endian sizes, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise InputError(
            f"{path} is missing or damaged ({error}): install the Debian package "
            "dataset-fashion-mnist, or name the folder that holds the four files"
        ) from None
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
    if not content.startswith(header) or len(content) != len(header) + prod(shape):
        raise InputError(f"{path}: expected an IDX file of {shape} unsigned bytes")
    return torch.frombuffer(bytearray(content[len(header) :]), dtype=torch.uint8).reshape(shape)


class Unit(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(Unit):
    """A unit of equal width, its input added to its output."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Net(nn.Sequential):
    """Eight layers, 30,144 weights, 0.82 million multiplications per image."""

    def __init__(self) -> None:
        super().__init__(
            Unit(1, 8, stride=2),  # 14 x 14
            Residual(8, 8),
            Unit(8, 24, stride=2),  # 7 x 7
            Residual(24, 24),
            Unit(24, 24, stride=2, groups=24),  # 4 x 4
            Unit(24, 48, kernel=1),
            Residual(48, 48),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
        )


def fp32(folder: Path = FOLDER) -> nn.Module:
    """The trained network; trained once, a matter of minutes, and kept in `build`."""
    path = BUILD / "fashion_fp32.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = Net()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    train_(model, Batches(load(folder).train), F.cross_entropy, FP32_TRAINING, SEED)
    BUILD.mkdir(exist_ok=True)
    write_tensors(path, model.state_dict(), {})
    return model
