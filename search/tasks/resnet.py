"""Residual networks for small images, after He et al. (arXiv 1512.03385), section 4.2."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem, one stage of `blocks` blocks for each width (halving the image from the second
    on), global average pooling, a linear classifier."""

    def __init__(self, channels_in: int, classes: int, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages, width_in = [], widths[0]
        for index, width in enumerate(widths):
            for block in range(blocks):
                stages.append(Block(width_in, width, 2 if index and not block else 1))
                width_in = width
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stages(F.relu(self.bn(self.conv(x))))
        return self.linear(y.mean(dim=(2, 3)))
