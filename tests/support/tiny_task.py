"""A task small enough to search in a second: 1200 real digits and a net of five layers."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adq.search.task import Task

CLASSES = 10


class TinyNet(nn.Module):
    """Three convolutions, BatchNorm after the first two, two linear layers: about 1500 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 12, 3)
        self.hidden = nn.Linear(12, 13)
        self.out = nn.Linear(13, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.conv3(x)).flatten(1)
        return self.out(F.relu(self.hidden(x)))


def data() -> tuple[Tensor, Tensor]:
    """The first 1200 digits: images (1200, 1, 8, 8) and labels (1200,)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images[:1200]).float()[:, None] / 16
    return images, torch.from_numpy(digits.target[:1200]).long()


def make_task() -> Task:
    """600 training, 300 validation and 300 test images."""
    images, labels = data()

    def loader(
        first: int, last: int, batch: int, shuffle: bool = False
    ) -> DataLoader[tuple[Tensor, ...]]:
        part = TensorDataset(images[first:last], labels[first:last])
        return DataLoader(part, batch, shuffle=shuffle)

    return Task(
        model=TinyNet,
        loss=F.cross_entropy,
        train=loader(0, 600, 60, shuffle=True),
        validation=loader(600, 900, 300),
        test=loader(900, 1200, 300),
        fp32_epochs=3,
        fp32_lr=4e-2,
    )
