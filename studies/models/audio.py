"""A network in one dimension on raw audio: spoken words that are made up.

A word is three syllables, each of which rises or falls in pitch: eight words, told apart by their
order alone. `words` makes them; pitch, speed, loudness and start are each speaker's own, and there
is noise.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import adq

RATE_HZ = 2000
SAMPLES = 1000  # half a second
SYLLABLES = 3
WORDS = 2**SYLLABLES
GLIDE = 1.5  # the pitch's ratio between a syllable's ends
NOISE = 0.8  # its deviation; a syllable's amplitude is 0.7 to 1.4 at its middle
SIZES = (1500, 500, 1500)  # training, validation, test


def words(count: int, seed: int) -> TensorDataset:
    """Recordings (count, 1, 1000), float32 in units of the noise's deviation, and their words.

    Syllable s of length T has the phase 2π·∫f dt with f(t) = f₀·GLIDE^(±(t/T − 1/2)), bit s of the
    word being the sign, and a Hann window for its loudness.
    """
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    label = torch.randint(WORDS, (count,), generator=generator)
    sign = (label[:, None] >> torch.arange(SYLLABLES) & 1)[:, :, None] * 2 - 1
    length = between(0.09, 0.14)
    start = between(0, 0.5 - SYLLABLES * 0.14)
    time = torch.arange(SAMPLES) / RATE_HZ
    place = (time - start) / length - torch.arange(SYLLABLES)[:, None]  # 0 to 1 in its syllable
    slope = sign * math.log(GLIDE)
    turns = between(200, 500) * length * torch.expm1(slope * place) / slope * GLIDE**-0.5
    window = torch.where((place > 0) & (place < 1), (math.pi * place).sin() ** 2, 0)
    clean = (between(0.7, 1.4) * window * (2 * math.pi * turns).sin()).sum(1)
    noise = NOISE * torch.randn(count, SAMPLES, generator=generator)
    return TensorDataset((clean + noise)[:, None], label)


class Block(nn.Module):
    """Two convolutions beside a shortcut with one of its own; a quarter of the positions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 9, 4, padding=4, bias=False)
        self.bn1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 9, padding=4, bias=False)
        self.bn2 = nn.BatchNorm1d(outputs)
        self.shortcut = nn.Conv1d(inputs, outputs, 1, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(y) + self.shortcut(x))


class WordNet(nn.Sequential):
    """Convolutions on the waveform after Dai et al. (arXiv 1610.00087), with residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv1d(1, width, 20, 4, padding=8, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            Block(width, 2 * width),
            Block(2 * width, 3 * width),
            # where a syllable lies counts: eight parts of the recording are kept apart
            nn.AdaptiveAvgPool1d(8),
            nn.Flatten(),
            nn.Linear(24 * width, 48),
            nn.ReLU(),
            nn.Linear(48, WORDS),
        )


def make_task(width: int = 12, sizes: tuple[int, int, int] = SIZES, epochs: int = 10) -> adq.Task:
    """Recordings of seeds 0, 1 and 2 for training, validation and test, and a `WordNet`."""
    train, validation, test = (words(count, seed) for seed, count in enumerate(sizes))
    return adq.Task(
        model=partial(WordNet, width),
        loss=F.cross_entropy,
        train=DataLoader(train, 64, shuffle=True, drop_last=True),
        validation=DataLoader(validation, 500),
        test=DataLoader(test, 500),
        fp32_epochs=epochs,
        fp32_lr=3e-3,
    )
