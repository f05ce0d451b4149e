"""Does a candidate gain by starting from a neighbour's fine-tuned weights?

    python studies/benchmarks/tabular/warm.py [--fashion FOLDER]

Draws pairs of bit vectors that differ in one to three layers, trains the first, and the second from
the first one's weights (as `--warm-start on` does); against it stand the second one's training from
FP32 of table.csv (the same steps, the same seed) and one of twice the steps. Writes warm.json and
the table of README.md; three minutes of one core.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from ground import HERE, SPACE, fp32, load
from grounds.fashion import FOLDER
from grounds.report import table, write_between
from table import POINTS, STEPS, quantized, validated

from adq.quant.apply import dequantize_
from adq.quant.files import write_json

PAIRS, MOST_CHANGES = 40, 3
ROWS = HERE / "warm.json"


def measure(folder: Path) -> list[dict[str, float]]:
    torch.set_num_threads(1)
    data = load(folder)
    model = fp32(data)
    rng = np.random.default_rng(0)
    rows = []
    for pair in range(PAIRS):
        first = list(POINTS[rng.integers(len(POINTS))])
        second, changes = list(first), 1 + pair % MOST_CHANGES
        free = [i for i, group in enumerate(SPACE.groups) if len(group.options) > 1]
        for place in rng.choice(free, changes, replace=False):
            others = [o for o in SPACE.groups[place].options if o != first[place]]
            second[place] = others[rng.integers(len(others))]
        parent, child = POINTS.index(tuple(first)), POINTS.index(tuple(second))
        weights = dequantize_(quantized(parent, data, model, model, STEPS))
        row: dict[str, float] = {"parent": parent, "child": child, "changes": changes}
        for name, start, steps in (
            ("cold", model, STEPS),
            ("warm", weights, STEPS),
            ("cold_twice", model, 2 * STEPS),
        ):
            result = validated(quantized(child, data, model, start, steps), data)
            row |= {f"{name}_accuracy": result.metric, f"{name}_loss": result.loss}
        rows.append(row)
        print(row, flush=True)
    return rows


def gain(rows: list[dict[str, float]], name: str, value: str) -> tuple[float, float]:
    """By how much a training does better than the cold one, and the standard error."""
    gains = np.array([r[f"{name}_{value}"] - r[f"cold_{value}"] for r in rows])
    return float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains)))


def report(rows: list[dict[str, float]]) -> None:
    texts = {"warm": "from the neighbour, same steps", "cold_twice": "from FP32, twice the steps"}
    lines = []
    for name, text in texts.items():
        accuracies, losses = gain(rows, name, "accuracy"), gain(rows, name, "loss")
        points = "{:+.2f} ± {:.2f}".format(*(100 * x for x in accuracies))
        lines.append([text, points, "{:+.4f} ± {:.4f}".format(*losses)])
    header = ["against FP32 weights, same steps", "accuracy, points", "loss"]
    write_between(HERE / "README.md", {"warm": table(header, lines)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--fashion", type=Path, default=FOLDER, help="folder of Fashion-MNIST")
    found = measure(parser.parse_args().fashion)
    write_json(ROWS, found)
    report(found)
