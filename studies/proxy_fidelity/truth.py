"""What random bit vectors are worth: the loss after a short fine-tuning, for each of them."""

import copy
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grounds import cifar10, fashion
from grounds.data import Augmentation, Batches, Data, in_order, mirrored
from torch import Tensor, nn
from torch.nn import functional as F

from adq.quant.apply import quantize_
from adq.quant.calibrate import input_ranges, reestimate_batchnorm_
from adq.quant.evaluate import accuracy, evaluate
from adq.quant.files import write_json
from adq.quant.layers import trace_layers
from adq.quant.qat import TrainingConfig, train_
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

VECTORS = 64
CHOICES = (2, 3, 4, 6)
PINNED = 8
CALIBRATION = 1024
EVALUATED = 5000  # images of each split
SCHEME = Scheme()
TRAINING = TrainingConfig(1, lr=1e-3)


@dataclass(frozen=True)
class Setting:
    """A trained network, its data, and how long its candidates are trained.

    `act`: whether inputs get random bits as well; they stay in FP32 otherwise. `repeats` of the
    vectors are trained a second time under another seed, to know how repeatable the truth is.
    """

    title: str
    load: Callable[[Path], Data]
    fp32: Callable[[Path], nn.Module]
    augment: Augmentation
    steps: int
    batch: int
    act: bool = False
    repeats: int = VECTORS


SETTINGS = {
    "cifar10": Setting(
        "ResNet-20, CIFAR-10, weights", cifar10.load, cifar10.fp32, cifar10.augmented, 60, 64
    ),
    "fashion": Setting(
        "small CNN, Fashion-MNIST, weights", fashion.load, fashion.fp32, mirrored, 250, 128
    ),
    "fashion_act": Setting(
        "small CNN, Fashion-MNIST, weights and inputs", fashion.load, fashion.fp32, mirrored, 250,
        128, act=True, repeats=16,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Ground:
    """A setting with its data in memory."""

    setting: Setting
    data: Data
    model: nn.Module
    layers: tuple[str, ...]
    calibration: list[tuple[Tensor, Tensor]]

    def vectors(self) -> list[BitVector]:
        """The random bit vectors: each free layer's bits are drawn from CHOICES, all alike."""
        rng = np.random.default_rng(0)
        found = []
        for _ in range(VECTORS):
            weight = dict.fromkeys(self.layers, PINNED)
            act = dict.fromkeys(self.layers[1:], PINNED) if self.setting.act else {}
            for name in self.layers[1:-1]:
                weight[name] = int(rng.choice(CHOICES))
                if act:
                    act[name] = int(rng.choice(CHOICES))
            found.append(BitVector(weight, act))
        return found


def ground(name: str, folder: Path) -> Ground:
    setting = SETTINGS[name]
    data, model = setting.load(folder), setting.fp32(folder)
    layers = trace_layers(model, data.train[0][:2])
    parts = (part[:CALIBRATION].split(128) for part in data.train)
    return Ground(
        setting, data, model, tuple(layer.name for layer in layers), list(zip(*parts, strict=True))
    )


def start(name: str, folder: Path) -> None:
    """A worker's own copy of what all runs share."""
    global GROUND, VECTORS_OF
    torch.set_num_threads(1)
    GROUND = ground(name, folder)
    VECTORS_OF = GROUND.vectors()


GROUND: Ground
VECTORS_OF: list[BitVector]


def train(run: tuple[int, int]) -> dict[str, Any]:
    """One vector (by its number) under one seed; -1 is the FP32 model, which is not trained."""
    began, (index, seed) = time.monotonic(), run
    setting, data, fp32 = GROUND.setting, GROUND.data, GROUND.model
    result: dict[str, Any] = {"vector": index, "seed": seed}
    model = fp32
    if index >= 0:
        bits = VECTORS_OF[index]
        ranges = input_ranges(
            fp32, {n: (b,) for n, b in bits.act.items()}, GROUND.calibration, SCHEME.act
        )
        model = quantize_(copy.deepcopy(fp32), bits, ranges, SCHEME)
        batches = Batches(data.train, setting.batch, setting.steps, setting.augment)
        train_(model, batches, F.cross_entropy, TRAINING, seed, teacher=fp32)
        reestimate_batchnorm_(model, GROUND.calibration)
        result |= {"weight": list(bits.weight.values()), "act": list(bits.act.values())}
    for split in ("validation", "test"):
        part = tuple(values[:EVALUATED] for values in getattr(data, split))
        found = evaluate(model, in_order(part, 250), F.cross_entropy, accuracy)
        result |= {f"{split}_loss": found.loss, f"{split}_accuracy": found.metric}
    return {**result, "seconds": round(time.monotonic() - began, 1)}


def measure(name: str, folder: Path, kept: Path, workers: int) -> list[dict[str, Any]]:
    """All runs of a setting; those that `kept` holds already are not made again."""
    done = json.loads(kept.read_text()) if kept.exists() else []
    known = {(result["vector"], result["seed"]) for result in done}
    runs = [(-1, 0), *((i, 0) for i in range(VECTORS))]
    runs += [(i, 1) for i in range(SETTINGS[name].repeats)]
    missing = [run for run in runs if run not in known]
    if missing:
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers, start, (name, folder)) as pool:
            for i, result in enumerate(pool.imap_unordered(train, missing), 1):
                done.append(result)
                write_json(kept, done)
                print(f"{name} {i}/{len(missing)} {result}", flush=True)
    return sorted(done, key=lambda result: (result["vector"], result["seed"]))
