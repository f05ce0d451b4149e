"""What the seeds cost: python studies/benchmarks/seeds/run.py

Solves the multiple-choice knapsack of 100 layers with 8 choices at 50 budgets of average bits by
`adq.search.knapsack`, by the textbook's dynamic programme over a table of all budgets, and by HiGHS
as it comes. One thread. Writes results.json (raw), summary.json (name -> number) and the tables of
README.md; some seconds of one core.
"""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import numpy.typing as npt
from grounds.report import write_between
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag

from adq.quant.files import write_json
from adq.search.knapsack import sweep, value

HERE = Path(__file__).parent
LAYERS, BITS, BUDGETS = 100, np.arange(2, 10), 50
LOW, HIGH = 2.1, 8.5  # average bits

Array = npt.NDArray[np.float64]


def layers(rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], list[Array]]:
    """Weights of each layer, as in a residual network; scores that fall by about 4 a bit and lie
    four decades apart between layers."""
    widths = 16 * rng.integers(1, 17, LAYERS + 1)
    kernels = rng.choice([1, 9], LAYERS)
    weights = widths[:-1] * widths[1:] * kernels
    weights[0], weights[-1] = 3 * 49 * 64, 256 * 1000
    scores = [
        np.sort(10 ** rng.uniform(-4, 0) * 4.0**-BITS * np.exp(rng.normal(0, 0.3, len(BITS))))[::-1]
        for _ in range(LAYERS)
    ]
    return weights, scores


def by_table(weights: npt.NDArray[np.int64], scores: list[Array], limits: list[int]) -> list[float]:
    """The least score at every budget in units of the costs' common divisor, layer by layer; then
    a look at each limit. Exact."""
    unit = math.gcd(*(int(n) for n in weights))
    cells = max(limits) // unit + 1
    best = np.zeros(cells)
    for n, row in zip(weights, scores, strict=True):
        after = np.full(cells, np.inf)
        for bits, score in zip(BITS, row, strict=True):
            cost = int(n * bits) // unit
            if cost < cells:
                np.minimum(after[cost:], best[: cells - cost] + score, out=after[cost:])
        best = after
    return [float(best[limit // unit]) for limit in limits]


def by_highs(weights: npt.NDArray[np.int64], scores: list[Array], limits: list[int]) -> list[float]:
    """An integer program a budget, without a gap, scores relative to the largest."""
    objective = np.concatenate(scores)
    costs = np.outer(weights, BITS).ravel().astype(float)
    one_each = block_diag([np.ones((1, len(BITS)))] * len(weights))
    found = []
    for limit in limits:
        result = milp(
            2**13 * objective / objective.max(),
            integrality=1,
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(costs[None] / costs.max(), -np.inf, limit / costs.max()),
            ],
            options={"mip_rel_gap": 0},
        )
        found.append(float(objective @ np.round(result.x)))
    return found


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, seconds of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    found = function()
    return found, time.perf_counter() - clock, time.process_time() - processor


def main() -> int:
    load = os.getloadavg()[0]
    weights, scores = layers(np.random.default_rng(0))
    average = np.linspace(LOW, HIGH, BUDGETS)
    limits = [int(bits * weights.sum()) for bits in average]
    terms = [[{"average_bits": int(n * b)} for b in BITS] for n in weights]
    wanted = [{"average_bits": limit} for limit in limits]
    choices, seconds, processor = timed(lambda: sweep(scores, terms, wanted))
    exact, _, table = timed(lambda: by_table(weights, scores, limits))
    programs, _, highs = timed(lambda: by_highs(weights, scores, limits))
    if len(choices) != BUDGETS:
        raise AssertionError(f"{BUDGETS} budgets gave {len(choices)} solutions")
    largest = max(float(row.max()) for row in scores)
    used = [sum(int(n * BITS[o]) for n, o in zip(weights, c, strict=True)) for c in choices]
    room = [(a - b) / int(weights.sum()) for a, b in zip(limits, used, strict=True)]
    excess = {
        "ours": max(value(scores, c) - e for c, e in zip(choices, exact, strict=True)) / largest,
        "highs": max(p - e for p, e in zip(programs, exact, strict=True)) / largest,
    }
    environment = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "load_before": load,
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": version("scipy"),
    }
    key = f"{LAYERS}_layers_{len(BITS)}_choices_{BUDGETS}_budgets"
    summary = {
        f"seconds_{key}": round(seconds, 3),
        f"processor_seconds_{key}": round(processor, 3),
        "table_over_ours_processor_seconds": round(table / processor, 1),
        "highs_over_ours_processor_seconds": round(highs / processor, 1),
        "largest_excess_over_optimum_of_largest_score": float(f"{excess['ours']:.2g}"),
        "largest_room_left_average_bits": float(f"{max(room):.2g}"),
    }
    rows = [
        ("`adq.search.knapsack`", processor, excess["ours"]),
        ("dynamic programme over a table", table, 0.0),
        ("HiGHS, a program a budget", highs, excess["highs"]),
    ]
    lines = [
        f"{environment['date']}, {environment['cores']} cores (load {load:.1f} before), one "
        f"thread, numpy {environment['numpy']}, scipy {environment['scipy']}.",
        "",
        "| how | processor seconds | times ours | largest excess over the optimum, of the largest "
        "score |",
        "| --- | --- | --- | --- |",
        *(f"| {name} | {s:.2f} | {s / processor:.1f} | {e:.1e} |" for name, s, e in rows),
        "",
        f"Ours took {seconds:.2f} s of the clock. Every budget was met; at most {max(room):.1e} "
        "average bits were left over.",
    ]
    raw = {
        "environment": environment,
        "weights": [int(n) for n in weights],
        "average_bits": list(average),
        "optimum": exact,
        "ours": [value(scores, c) for c in choices],
        "highs": programs,
        "average_bits_left": room,
    }
    write_json(HERE / "results.json", raw)
    write_json(HERE / "summary.json", summary)
    write_between(HERE / "README.md", {"tables": "\n".join(lines)})
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
