"""Which parts of ADQ's quantizer earn their place, and how does it stand beside LSQ, N2UQ and APoT?

    python studies/quantizer_ablation/run.py [--workers 2] [--data FOLDER]

Trains every variant of `VARIANTS` on Fashion-MNIST at 2, 3 and 4 bits, weights alone (W) and with
activations (WA), and writes results.json (one line a run), summary.json and the tables of
README.md. A run that is in results.json is not trained again: remove the file to start anew.
One CPU core a worker; about two hours of one core.
"""

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from grounds.data import Batches, Data, in_order
from grounds.fashion import FOLDER, fp32, load
from grounds.report import table, write_between
from grounds.runs import Result, measure
from torch.nn import functional as F

from adq.quant.apply import quantize_
from adq.quant.calibrate import input_ranges, reestimate_batchnorm_
from adq.quant.evaluate import accuracy, evaluate
from adq.quant.files import write_json
from adq.quant.layers import trace_layers
from adq.quant.qat import TrainingConfig, train_
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

HERE = Path(__file__).parent

RESULTS = HERE / "results.json"
BITS, MODES = (2, 3, 4), ("W", "WA")
SEEDS = 3
STEPS, LONG_STEPS = 250, 1500
LONGER = ("adq", "adq-still", "n2uq")
RATES = {"W": 1e-3, "WA": 3e-3}
OTHER_RATES = {"W": 3e-3, "WA": 1e-3}


BASE = Scheme("adq", "n2uq", "quantile-lloyd", zero=False, split_dead=True)
TRAINING = TrainingConfig(
    1, weight_decay=1e-4, distillation=0.5, codebook_decay=0.99, codebook_freeze=0.25
)


@dataclass(frozen=True)
class Variant:
    """What differs from `BASE` and `TRAINING`; `title` is its line in the tables."""

    title: str
    scheme: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = MODES


STILL = {"codebook_decay": None}
METHODS = {
    "adq": Variant("ADQ: Lloyd start, moving average"),
    "adq-still": Variant("ADQ: Lloyd start, levels stay", {}, STILL),
    "adq-midpoint-still": Variant("ADQ: midpoint start, levels stay", {"init": "midpoint"}, STILL),
    "lsq": Variant("LSQ", {"weight": "lsq"}),
    "n2uq": Variant("N2UQ weights", {"weight": "n2uq"}),
    "apot": Variant("APoT", {"weight": "apot"}),
}
PARTS = {
    "init-quantile": Variant("start: quantile (with a zero)", {"init": "quantile"}),
    "init-midpoint": Variant("start: midpoint", {"init": "midpoint"}),
    "init-uniform": Variant("start: uniform", {"init": "uniform"}),
    "decay-0.9": Variant("decay 0.9", {}, {"codebook_decay": 0.9}),
    "decay-0.999": Variant("decay 0.999", {}, {"codebook_decay": 0.999}),
    "zero": Variant("an exact zero", {"zero": True}),
    "dead-stay": Variant("dead levels stay dead", {"split_dead": False}),
    "distil-0": Variant("no distillation", {}, {"distillation": 0.0}),
    "distil-1": Variant("distillation alone", {}, {"distillation": 1.0}),
    "act-lsq": Variant("LSQ activations", {"act": "lsq"}, modes=("WA",)),
    "act-pact": Variant("PACT activations", {"act": "pact"}, modes=("WA",)),
}
VARIANTS = {**METHODS, **PARTS}


@dataclass(frozen=True)
class Run:
    variant: str
    mode: str
    bits: int
    seed: int
    lr: float
    steps: int = STEPS

    def __str__(self) -> str:
        steps = "" if self.steps == STEPS else f" steps {self.steps}"
        return f"{self.variant} {self.mode}{self.bits} lr {self.lr:g} seed {self.seed}{steps}"


def runs() -> Iterator[Run]:
    """All runs."""
    for seed in range(SEEDS):
        for name, variant in VARIANTS.items():
            for mode in variant.modes:
                for bits in BITS:
                    yield Run(name, mode, bits, seed, RATES[mode])
                    if name in METHODS:
                        yield Run(name, mode, bits, seed, OTHER_RATES[mode])
    for seed in range(SEEDS):
        for name in LONGER:
            yield Run(name, "W", 2, seed, RATES["W"], LONG_STEPS)


def start(folder: Path) -> None:
    """A worker's own copy of what all runs share."""
    global DATA, MODEL, LAYERS, CALIBRATION
    torch.set_num_threads(1)
    DATA, MODEL = load(folder), fp32(folder)
    LAYERS = [layer.name for layer in trace_layers(MODEL, DATA.train[0][:2])]
    CALIBRATION = list(
        zip(DATA.train[0][:1024].split(128), DATA.train[1][:1024].split(128), strict=True)
    )


DATA: Data
MODEL: torch.nn.Module
LAYERS: list[str]
CALIBRATION: list[tuple[torch.Tensor, torch.Tensor]]


def train(run: Run) -> dict[str, Any]:
    """One fine-tuning: accuracies in percent before and after BatchNorm's re-estimation."""
    began, variant = time.monotonic(), VARIANTS[run.variant]
    pinned = (LAYERS[0], LAYERS[-1])
    weight = {name: 8 if name in pinned else run.bits for name in LAYERS}
    act = {name: weight[name] for name in LAYERS[1:]} if run.mode == "WA" else {}
    scheme = replace(BASE, **variant.scheme)
    ranges = input_ranges(MODEL, {n: (b,) for n, b in act.items()}, CALIBRATION, scheme.act)
    model = quantize_(copy.deepcopy(MODEL), BitVector(weight, act), ranges, scheme)
    epochs = run.steps // STEPS
    config = replace(TRAINING, epochs=epochs, lr=run.lr, **variant.training)
    batches = Batches(DATA.train, steps=STEPS)
    *_, epoch = train_(model, batches, F.cross_entropy, config, run.seed, teacher=MODEL)
    result: dict[str, Any] = {"run": str(run)}
    for when in ("as_trained", "reestimated"):
        if when == "reestimated":
            reestimate_batchnorm_(model, CALIBRATION)
        for split in ("validation", "test"):
            samples = in_order(getattr(DATA, split))
            found = evaluate(model, samples, F.cross_entropy, accuracy)
            result[f"{split}_{when}"] = round(100 * found.metric, 2)
    numel = {name: MODEL.get_parameter(f"{name}.weight").numel() for name in LAYERS}
    flipped = sum(epoch.flips[name] * numel[name] for name in LAYERS)
    result["flips"] = round(flipped / sum(numel.values()), 6)
    result["dead"] = round(sum(epoch.dead.values()), 3)
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--data", type=Path, default=FOLDER, help="the folder of the IDX files")
    arguments = parser.parse_args()
    fp32(arguments.data)  # trained once, before the workers look for it
    folder = arguments.data
    report(measure(list(runs()), train, RESULTS, arguments.workers, start, (folder,)))


Results = dict[str, Result]
Cell = tuple[str, str, int]  # variant, mode, bits
DEFAULT = "adq"
"""The variant that the package's defaults are: the best of ADQ's on validation, see README.md."""


def values(results: Results, cell: Cell, lr: float, what: str) -> np.ndarray:
    """One number a seed."""
    return np.array([results[str(Run(*cell, seed, lr))][what] for seed in range(SEEDS)])


def rate(results: Results, cell: Cell) -> float:
    """The learning rate that does better on validation, on average."""
    mode = cell[1]
    if cell[0] not in METHODS:
        return RATES[mode]
    rates = (RATES[mode], OTHER_RATES[mode])
    return max(rates, key=lambda lr: values(results, cell, lr, VALIDATION).mean())


VALIDATION, TEST = "validation_reestimated", "test_reestimated"


def method(results: Results, cell: Cell, what: str = TEST) -> np.ndarray:
    """A method at its better rate."""
    return values(results, cell, rate(results, cell), what)


def stderr(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / len(x) ** 0.5)


def difference(results: Results, cell: Cell, base: str, what: str = TEST) -> np.ndarray:
    """`cell` minus `base`, at the same rate, seed by seed."""
    _, mode, bits = cell
    one, other = (
        values(results, (name, mode, bits), RATES[mode], what) for name in (cell[0], base)
    )
    return one - other


def settings() -> list[tuple[str, int]]:
    return [(mode, bits) for mode in MODES for bits in BITS]


def report(results: Results) -> None:
    """summary.json, and the tables between the marks in README.md."""
    names = [f"{mode} {bits}" for mode, bits in settings()]
    rows = []
    for name, variant in METHODS.items():
        found = [method(results, (name, *setting)) for setting in settings()]
        rows.append([variant.title, *(f"{x.mean():.2f} ± {stderr(x):.2f}" for x in found)])
    methods = table(["weights", *names], rows)

    rows = []
    for name, variant in VARIANTS.items():
        if name in ("adq", "lsq", "n2uq", "apot"):
            continue
        row, on_validation = [variant.title], []
        for mode, bits in settings():
            if mode in variant.modes:
                x = difference(results, (name, mode, bits), "adq")
                row.append(f"{x.mean():+.2f} ± {stderr(x):.2f}")
                x = difference(results, (name, mode, bits), "adq", VALIDATION)
                on_validation.append(x.mean())
            else:
                row.append("")
        rows.append([*row, f"{np.mean(on_validation):+.2f}"])
    parts = table(["change", *names, "validation, mean"], rows)

    rows = []
    for name in METHODS:
        row = [METHODS[name].title]
        for mode, bits in settings():
            both = [values(results, (name, mode, bits), RATES[mode], f"test_{when}")
                    for when in ("reestimated", "as_trained")]  # fmt: skip
            x = both[0] - both[1]
            row.append(f"{x.mean():+.2f} ± {stderr(x):.2f}")
        rows.append(row)
    batchnorm = table(["weights", *names], rows)

    rows = []
    for name in LONGER:
        row = [METHODS[name].title]
        for steps in (STEPS, LONG_STEPS):
            found = [Run(name, "W", 2, seed, RATES["W"], steps) for seed in range(SEEDS)]
            x = np.array([results[str(run)][TEST] for run in found])
            flips = np.mean([results[str(run)]["flips"] for run in found])
            row += [f"{x.mean():.2f} ± {stderr(x):.2f}", f"{100 * flips:.3f}"]
        rows.append(row)
    header = ["weights, 2 bits"]
    header += [
        f"{steps} steps{what}" for steps in (STEPS, LONG_STEPS) for what in ("", ", flips %")
    ]
    tables = {"methods": methods, "parts": parts, "batchnorm": batchnorm}
    write_between(HERE / "README.md", {**tables, "longer": table(header, rows)})
    summary: dict[str, float] = {}
    for bits in BITS:
        ours = method(results, (DEFAULT, "W", bits))
        others = [method(results, (name, "W", bits)) for name in ("lsq", "n2uq", "apot")]
        best = max(others, key=lambda x: x.mean())
        summary[f"adq_minus_best_other_w{bits}"] = round(float(ours.mean() - best.mean()), 3)
        summary[f"adq_stderr_w{bits}"] = round(math.hypot(stderr(ours), stderr(best)), 3)
    write_json(HERE / "summary.json", summary)


if __name__ == "__main__":
    main()
