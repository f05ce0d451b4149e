"""Train every bit vector of the space under two seeds, and keep what each is worth.

    python studies/benchmarks/tabular/table.py [--fashion FOLDER] [--workers 2]

Writes table.csv: one line a bit vector, with the options of its free layers ("w/a" bits each), its
cost, its accuracy after calibration and BatchNorm re-estimation alone, and that after fine-tuning
under each seed, all on 10,000 validation images. What rows.jsonl (left behind by a run that was
stopped) holds is not made again. Two hours of one core.
"""

import argparse
import copy
import csv
import io
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from ground import HERE, LAYERS, SPACE, calibration, fp32, load
from grounds.data import Batches, Data, in_order
from grounds.fashion import FOLDER
from torch import nn
from torch.nn import functional as F

from adq.proxies.costs import CostModel
from adq.quant.apply import quantize_
from adq.quant.calibrate import input_ranges, reestimate_batchnorm_
from adq.quant.evaluate import Evaluation, accuracy, evaluate
from adq.quant.files import write_text
from adq.quant.layers import trace_layers
from adq.quant.qat import TrainingConfig, train_
from adq.quant.scheme import Scheme

TABLE, ROWS = HERE / "table.csv", HERE / "rows.jsonl"
SCHEME = Scheme()
TRAINING = TrainingConfig(1, lr=1e-3)
STEPS, BATCH = 40, 64
SEEDS = (0, 1)
UNTRAINED = -1
"""The "seed" of a vector that is calibrated and not trained."""

POINTS = list(product(*(group.options for group in SPACE.groups)))
"""Every point of the space; its place here is its number."""


def start(folder: Path) -> None:
    """What a worker needs for every run."""
    global DATA, MODEL
    torch.set_num_threads(1)
    DATA = load(folder)
    MODEL = fp32(DATA)


DATA: Data
MODEL: nn.Module


def quantized(
    number: int, data: Data, fp32: nn.Module, start: nn.Module, steps: int, seed: int = 0
) -> nn.Module:
    """A point, by its number, from the weights of `start` after so many steps of fine-tuning."""
    bits = SPACE.bit_vector(list(POINTS[number]))
    batches = calibration(data)
    widths = {name: (act,) for name, act in bits.act.items()}
    ranges = input_ranges(fp32, widths, batches, SCHEME.act)
    model = quantize_(copy.deepcopy(start), bits, ranges, SCHEME)
    if steps:
        train_(
            model, Batches(data.train, BATCH, steps), F.cross_entropy, TRAINING, seed, teacher=fp32
        )
    reestimate_batchnorm_(model, batches)
    return model


def validated(model: nn.Module, data: Data) -> Evaluation:
    return evaluate(model, in_order(data.validation), F.cross_entropy, accuracy)


def measure(run: tuple[int, int]) -> dict[str, Any]:
    """One point, by its number, under one seed."""
    began, (number, seed) = time.monotonic(), run
    steps = 0 if seed == UNTRAINED else STEPS
    found = validated(quantized(number, DATA, MODEL, MODEL, steps, seed), DATA)
    return {
        "point": number,
        "seed": seed,
        "accuracy": found.metric,
        "loss": round(found.loss, 5),
        "seconds": round(time.monotonic() - began, 2),
    }


def measure_all(folder: Path, workers: int) -> list[dict[str, Any]]:
    """All runs; those in rows.jsonl are not made again."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    known = {(row["point"], row["seed"]) for row in rows}
    runs = []
    for seed in (SEEDS[0], UNTRAINED, *SEEDS[1:]):
        numbers = list(range(len(POINTS)))
        random.Random(seed).shuffle(numbers)
        runs += [(number, seed) for number in numbers if (number, seed) not in known]
    fp32(load(folder))  # trained once, not by every worker
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, start, (folder,)) as pool, ROWS.open("a") as file:
        for row in pool.imap_unordered(measure, runs, chunksize=4):
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
            if len(rows) % 100 == 0:
                print(f"{len(rows)} of {len(POINTS) * 3}: {row}", flush=True)
    return rows


def write_table(rows: Sequence[dict[str, Any]], data: Data) -> None:
    model = fp32(data)
    costs = CostModel(model, trace_layers(model, data.train[0][:2]), SPACE.searched)
    at = {(row["point"], row["seed"]): row for row in rows}
    text = io.StringIO()
    names = [f"{kind}{s}" for s in SEEDS for kind in ("accuracy_seed", "loss_seed")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*LAYERS[1:-1], "bops", "accuracy_untrained", "loss_untrained", *names])
    for number, point in enumerate(POINTS):
        bops = costs.totals(SPACE.bit_vector(list(point)))["bops"]
        found = [at[number, seed] for seed in (UNTRAINED, *SEEDS)]
        values = [value for row in found for value in (row["accuracy"], row["loss"])]
        writer.writerow([*(f"{w}/{a}" for w, a in point[1:-1]), bops, *values])
    write_text(TABLE, text.getvalue())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--fashion", type=Path, default=FOLDER, help="folder of Fashion-MNIST")
    parser.add_argument("--workers", type=int, default=1, help="processes, one core each")
    given = parser.parse_args()
    write_table(measure_all(given.fashion, given.workers), load(given.fashion))
    ROWS.unlink()
