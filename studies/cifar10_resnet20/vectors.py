"""The bit vectors that are compared: uniform, by a Hessian's trace, and searched."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from finetuning import AMP, BATCH, CALIBRATION, network
from grounds import cifar10
from grounds.data import Batches, in_order
from torch import nn
from torch.nn import functional as F

import adq
from adq.proxies.base import Subject
from adq.proxies.trace import HessianTrace
from adq.proxies.work import Work
from adq.quant.batches import micro_batches, take_samples
from adq.quant.files import write_json
from adq.quant.layers import trace_layers
from adq.quant.scheme import WeightMethod
from adq.quant.spec import BitVector
from adq.search.folder import TRIALS, open_study
from adq.search.knapsack import solve, topped_up

HERE = Path(__file__).parent
BUILD, KEPT = HERE / "build", HERE / "vectors.json"
CHOICES = (2, 3, 4, 6, 8)
PINNED = 8
UNIFORM = (2, 3, 4)
METHODS: tuple[WeightMethod, ...] = ("lsq", "n2uq", "apot", "adq")
BUDGET = 2.81
LOWER = (2.4, 2.6)
"""Where else along the front a point is taken."""

CANDIDATES, STEPS = 36, 100
STUDY = "resnet20"


def layer_sizes(folder: Path) -> dict[str, int]:
    """Weights of each layer that can be quantized, in the order of the forward pass."""
    model = network(folder)
    layers = trace_layers(model, torch.zeros(2, 3, 32, 32))
    return {layer.name: model.get_parameter(f"{layer.name}.weight").numel() for layer in layers}


def uniform(sizes: dict[str, int], bits: int) -> BitVector:
    """`bits` everywhere but in the first and last layer, which have 8."""
    first, *_, last = sizes
    return BitVector({name: PINNED if name in (first, last) else bits for name in sizes})


def average_bits(sizes: dict[str, int], bits: BitVector) -> float:
    return sum(bits.weight[n] * numel for n, numel in sizes.items()) / sum(sizes.values())


def vectors(folder: Path) -> dict[str, BitVector]:
    """The mixed bit vectors by name, from vectors.json or made now.

    `knapsack` is the search's first candidate: the optimum by the default proxies alone."""
    if not KEPT.exists():
        front = searched(folder)
        found = {f"searched-{BUDGET}": bits_of(front.best)}
        for limit in LOWER:
            found[f"searched-{limit}"] = bits_of(front.best_under({"average_bits": limit}))
        seed = open_study(BUILD, STUDY).read_record(TRIALS, "0000")
        assert seed is not None  # the study has ended
        found |= {f"knapsack-{BUDGET}": seed.bits, f"hawq-{BUDGET}": hawq(folder)}
        write_json(KEPT, {name: bits.to_json() for name, bits in found.items()})
    kept = json.loads(KEPT.read_text())
    return {name: BitVector.from_json(data, f"{KEPT}: {name}") for name, data in kept.items()}


def bits_of(point: adq.Point) -> BitVector:
    return BitVector(point.weight_bits, point.act_bits)


def task(folder: Path) -> adq.Task:
    """A pass over the training batches is STEPS steps: a fresh random part each time."""
    data = cifar10.load(folder)

    def model() -> nn.Module:
        return network(folder)

    return adq.Task(
        model,
        F.cross_entropy,
        Batches(data.train, BATCH, STEPS, cifar10.augmented),
        in_order(data.validation, 250),
        in_order(data.test, 250),
    )


def searched(folder: Path) -> adq.Front:
    """The front of the study in build/, which is searched first, or to its end."""
    if (BUILD / STUDY).exists():
        return adq.resume(STUDY, task(folder), out=BUILD)
    return adq.search(
        task(folder),
        adq.Budget(bits=BUDGET),
        study=STUDY,
        out=str(BUILD),
        bits=CHOICES,
        act_bits=(0,),
        trials=CANDIDATES,
        epochs=1,
        final_epochs=1,
        amp=AMP,
        device="cpu",
        cpus_per_trial=1,
        executor="local",
    )


def hawq(folder: Path) -> BitVector:
    """min Σ tr(H_l)/n_l · ‖Q_b(w_l) − w_l‖² under the budget (HAWQ-V2, arXiv 1911.03852),
    on 256 training images, by an exact knapsack."""
    torch.set_num_threads(1)
    data, model, sizes = cifar10.load(folder), cifar10.fp32(folder), layer_sizes(folder)
    part = [tuple(values[:CALIBRATION] for values in data.train)]
    batches = list(micro_batches(take_samples(part, 256), 64))
    layers = trace_layers(model, data.train[0][:2])
    subject = Subject(model, layers, CHOICES, batches, F.cross_entropy)
    (found,) = HessianTrace().measure(subject, Work())
    first, *_, last = sizes
    options = {name: (PINNED,) if name in (first, last) else CHOICES for name in sizes}
    rows = dict(zip(found.weight.layers, found.weight.monotone(), strict=True))
    scores = [np.array([rows[name][CHOICES.index(b)] for b in options[name]]) for name in sizes]
    terms = [[{"bits": b * sizes[name]} for b in options[name]] for name in sizes]
    limits = {"bits": math.floor(BUDGET * sum(sizes.values()))}
    choice = solve(scores, terms, limits)
    assert choice is not None  # two bits everywhere are within the budget
    choice = topped_up(scores, terms, limits, choice)
    pairs = zip(options.items(), choice, strict=True)
    return BitVector({name: bits[o] for (name, bits), o in pairs})
