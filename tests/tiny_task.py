"""A task small enough to search in a second: 240 real digits and a net of five layers."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adq.search.task import Task

CLASSES = 4


class TinyNet(nn.Module):
    """Three convolutions, BatchNorm after the first two, two linear layers: about 900 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 4, 3)
        self.hidden = nn.Linear(4, 7)
        self.out = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.conv3(x)).flatten(1)
        return self.out(F.relu(self.hidden(x)))


def data() -> tuple[Tensor, Tensor]:
    """The first 240 digits below CLASSES: images (240, 1, 8, 8) and labels (240,)."""
    digits = load_digits(n_class=CLASSES)
    images = torch.from_numpy(digits.images[:240]).float()[:, None] / 16
    return images, torch.from_numpy(digits.target[:240]).long()


def make_task() -> Task:
    """120 training, 60 validation and 60 test images."""
    images, labels = data()

    def loader(first: int, last: int, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        part = TensorDataset(images[first:last], labels[first:last])
        return DataLoader(part, 30, shuffle=shuffle)

    return Task(
        model=TinyNet,
        loss=F.cross_entropy,
        train=loader(0, 120, shuffle=True),
        validation=loader(120, 180),
        test=loader(180, 240),
        fp32_epochs=3,
        fp32_lr=2e-2,
    )
