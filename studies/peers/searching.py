"""What every search gets and what is measured of it, the same way for all.

A search is a script that says `main(search)`. It runs in a process and a virtual environment of
its own, on one thread, and leaves a JSON: the bits of each layer's weights, the seconds of the
search, and the largest resident memory of the process before it (imports and inputs) and after.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from grounds.resnet20 import ResNet20
from safetensors.torch import load_file
from torch import Tensor, nn

BUDGET = 2.80
"""Average bits of all weights, those of the first and last layer included, at most."""
CHOICES = (2, 3, 4, 6, 8)
PINNED = 8
SAMPLES, BATCH = 512, 64


@dataclass(frozen=True)
class Inputs:
    """The FP32 model in eval mode, training images with labels, and the layers' weight counts."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    sizes: dict[str, int]

    @property
    def pinned(self) -> tuple[str, str]:
        """The first and the last layer."""
        first, *_, last = self.sizes
        return first, last

    @property
    def options(self) -> dict[str, tuple[int, ...]]:
        """The choices of each layer's bits."""
        return {name: (PINNED,) if name in self.pinned else CHOICES for name in self.sizes}

    def batches(self, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


Search = Callable[..., dict[str, int]]
"""(inputs, words of the command line...) -> bits of each layer's weights."""


def main(search: Search) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("inputs", type=Path, help="what `run.write_inputs` has written")
    parser.add_argument("out", type=Path, help="JSON file for what was found")
    parser.add_argument("words", nargs="*", help="of the search itself")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = load(arguments.inputs)
    loaded, clock, processor = peak_mb(), time.perf_counter(), processor_seconds()
    bits = search(inputs, *arguments.words)
    found = {
        "weight_bits": {name: int(bits[name]) for name in inputs.sizes},
        "seconds": round(time.perf_counter() - clock, 2),
        "processor_seconds": round(processor_seconds() - processor, 2),
        "loaded_mb": round(loaded, 1),
        "peak_mb": round(peak_mb(), 1),
    }
    arguments.out.write_text(json.dumps(found, indent=1))


def load(path: Path) -> Inputs:
    tensors = load_file(path)
    images, labels = tensors.pop("images"), tensors.pop("labels")
    model = ResNet20()
    model.load_state_dict(tensors)
    return Inputs(model.eval(), images, labels, layer_sizes(model))


def layer_sizes(model: nn.Module) -> dict[str, int]:
    """Weights of each convolution and linear layer, first layer first."""
    return {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def average_bits(bits: dict[str, int], sizes: dict[str, int]) -> float:
    """Σ n_l·b_l / Σ n_l over the layers in `sizes`."""
    return sum(n * bits[name] for name, n in sizes.items()) / sum(sizes.values())


def peak_mb() -> float:
    """10⁶ bytes of the largest resident set of this process so far (on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def processor_seconds() -> float:
    """Of this process and of those it has started and waited for, such as solvers."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
