"""Tables of README.md and summary.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from finetuning import EPOCH, FineTuning
from grounds.report import table, write_between
from grounds.resnet20 import ResNet20
from grounds.runs import Result
from searching import average_bits, layer_sizes

from adq.quant.files import write_json

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
TITLES = {
    "modelopt": "NVIDIA ModelOpt 0.47, gradient",
    "modelopt-1000": "the same, loss × 1000",
    "mct": "Sony MCT 2.6.1, Hessian",
    "pyhessian": "PyHessian 0.1, trace and knapsack",
    "ours-seed": "ours: default proxies and knapsack",
    "ours-searched": "ours: searched",
}
OURS = ("ours-seed", "ours-searched")
MEASURES = ("test_top1", "test_loss")
Row = dict[str, float]


def report(
    found: Mapping[str, Any], owners: Mapping[str, str], results: Mapping[str, Result]
) -> None:
    """`found` is searches.json; `owners` says under which name each vector was tuned."""
    names = [name for name in TITLES if name in found]
    rows = {name: numbers(found[name], owners[name], results) for name in names if name in owners}
    header = [
        "bits from", "seconds", "of a processor", "memory before, MB", "largest, MB",
        "average bits", "without the pinned", "top-1 untuned", "cross-entropy untuned",
        "top-1 tuned", "cross-entropy tuned",
    ]  # fmt: skip
    lines = []
    fp32 = results.get(str(FineTuning("fp32", None, steps=0)))
    if fp32 is not None:
        untuned = [f"{fp32['test_top1']:.2f}", f"{fp32['test_loss']:.4f}"]
        lines.append(["FP32", *[""] * 4, "32", "32", *untuned, "", ""])
    for name in names:
        if name in rows:
            lines.append([TITLES[name], *cells(rows[name])])
        else:
            lines.append([TITLES[name], f"failed: {found[name]['error']}", *[""] * 9])
    sizes = layer_sizes(ResNet20())
    bits = table(
        ["layer", "weights", *rows],
        [
            [layer, f"{n:,}", *(str(found[name]["weight_bits"][layer]) for name in rows)]
            for layer, n in sizes.items()
        ],
    )
    write_between(HERE / "README.md", {"peers": table(header, lines), "bits": bits})
    write_json(HERE / "summary.json", summary(rows))


def numbers(search: Mapping[str, Any], owner: str, results: Mapping[str, Result]) -> Row:
    """What is known of one vector; means over seeds with their standard errors."""
    sizes = layer_sizes(ResNet20())
    free = dict(list(sizes.items())[1:-1])
    row = {
        name: search[name]
        for name in ("seconds", "processor_seconds", "loaded_mb", "peak_mb")
        if name in search
    }
    row["average_bits"] = average_bits(search["weight_bits"], sizes)
    row["average_bits_without_pinned"] = average_bits(search["weight_bits"], free)
    untuned = str(FineTuning(owner, None, steps=0))
    runs = [str(FineTuning(owner, None, seed=seed, steps=EPOCH)) for seed in SEEDS]
    for what in MEASURES:
        if untuned in results:
            row[f"{what}_untuned"] = results[untuned][what]
        if all(run in results for run in runs):
            x = np.array([results[run][what] for run in runs])
            row[f"{what}_tuned"] = float(x.mean())
            row[f"{what}_tuned_stderr"] = float(x.std(ddof=1) / len(x) ** 0.5)
    return row


def cells(row: Row) -> list[str]:
    def cell(name: str, form: str) -> str:
        return f"{row[name]:{form}}" if name in row else "–"

    def mean(name: str, form: str) -> str:
        error = f" ± {row[f'{name}_stderr']:{form}}" if f"{name}_stderr" in row else ""
        return cell(name, form) + error

    return [
        cell("seconds", ".1f"),
        cell("processor_seconds", ".1f"),
        cell("loaded_mb", ".0f"),
        cell("peak_mb", ".0f"),
        cell("average_bits", ".3f"),
        cell("average_bits_without_pinned", ".3f"),
        cell("test_top1_untuned", ".2f"),
        cell("test_loss_untuned", ".4f"),
        mean("test_top1_tuned", ".2f"),
        mean("test_loss_tuned", ".4f"),
    ]


def summary(rows: Mapping[str, Row]) -> Row:
    """What the report claims: each vector's bits, costs and cross-entropies, and how far the best
    of ours is from the best peer's (below zero: ours is lower)."""
    found: Row = {}
    for name, row in rows.items():
        key = name.replace("-", "_")
        found |= {f"{key}_{what}": value for what, value in row.items()}
    for when in ("untuned", "tuned"):
        losses = {
            name: row[f"test_loss_{when}"]
            for name, row in rows.items()
            if f"test_loss_{when}" in row
        }
        ours = [loss for name, loss in losses.items() if name in OURS]
        peers = [loss for name, loss in losses.items() if name not in OURS]
        if ours and peers:
            found[f"ours_minus_best_peer_loss_{when}"] = min(ours) - min(peers)
    return {name: round(value, 4) for name, value in found.items()}
