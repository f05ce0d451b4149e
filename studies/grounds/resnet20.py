"""The CIFAR ResNet-20 of He et al. (arXiv 1512.03385, section 4.2), with its shortcuts "option A".

The package's own `adq.search.tasks.resnet` has 1x1 convolutions in its shortcuts; the paper's
network for CIFAR-10 has none, and is the one that quantization papers report. Names are those of
the usual public checkpoints.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every other pixel and pads channels with zeros."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.stride = channels // channels_in
        self.padding = (channels - channels_in) // 2
        self.conv1 = nn.Conv2d(channels_in, channels, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        if self.stride > 1:
            padding = (0, 0, 0, 0, self.padding, self.padding)
            x = F.pad(x[:, :, :: self.stride, :: self.stride], padding)
        return F.relu(self.bn2(self.conv2(y)) + x)


class ResNet20(nn.Module):
    """A 3x3 stem, three stages of three blocks of 16, 32 and 64 channels, pooling, a classifier."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer1(F.relu(self.bn1(self.conv1(x))))
        return self.linear(self.layer3(self.layer2(y)).mean(dim=(2, 3)))
