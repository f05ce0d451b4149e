"""Tables, picture and summary of the study."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
from finetuning import FineTuning
from grounds.report import table, write_between
from grounds.runs import Result
from vectors import BUDGET, LOWER, METHODS, UNIFORM, average_bits, uniform

from adq.quant.files import atomic_path, write_json
from adq.quant.spec import BitVector

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
SEARCHED = f"searched-{BUDGET}"
TITLES = {"lsq": "LSQ", "n2uq": "N2UQ", "apot": "APoT", "adq": "ADQ"}
GIVEN = FineTuning("fp32", None, steps=0)
ENDS = (2, 3)
"""The uniform widths that a mixed model is held against."""


class Found:
    """The results of all runs."""

    def __init__(
        self,
        results: Mapping[str, Result],
        sizes: Mapping[str, int],
        mixed: Mapping[str, BitVector],
    ) -> None:
        self.results, self.sizes, self.mixed = results, dict(sizes), dict(mixed)

    def values(self, name: str, what: str = "test_top1") -> np.ndarray:
        """One number a seed."""
        keys = [str(FineTuning(name, None, seed=seed)) for seed in SEEDS]
        return np.array([self.results[key][what] for key in keys])

    def bits(self, name: str, pinned: bool = True) -> float:
        """Average bits a weight; of the searched layers alone, without `pinned` ones."""
        vector = self.mixed.get(name) or uniform(self.sizes, int(name.rpartition("-")[2]))
        counted = self.sizes if pinned else dict(list(self.sizes.items())[1:-1])
        return average_bits(counted, vector)

    def between(self, method: str, at: float) -> np.ndarray:
        """Top-1 of the method's uniform 2-bit and 3-bit models on the line between them at `at`
        average bits, seed by seed."""
        low, high = (f"{method}-{bits}" for bits in ENDS)
        share = (at - self.bits(low)) / (self.bits(high) - self.bits(low))
        return (1 - share) * self.values(low) + share * self.values(high)

    def gain(self, name: str) -> tuple[np.ndarray, str]:
        """Top-1 beyond the best of these lines, seed by seed, and whose line that is."""
        lines = {method: self.between(method, self.bits(name)) for method in METHODS}
        best = max(lines, key=lambda method: lines[method].mean())
        return self.values(name) - lines[best], best


def stderr(x: np.ndarray) -> float:
    """The standard error of the mean over seeds."""
    return float(x.std(ddof=1) / len(x) ** 0.5)


def mean(x: np.ndarray, form: str = ".2f") -> str:
    return f"{x.mean():{form}} ± {stderr(x):.2f}"


def title(name: str) -> str:
    method, _, bits = name.partition("-")
    words = {
        "fp32": "FP32, trained as long",
        "hawq": "HAWQ-V2 trace, knapsack",
        "knapsack": "default proxies, knapsack",
        "searched": f"**searched**, under {bits} bits",
    }
    return words.get(method) or f"uniform {bits}, {TITLES[method]}"


def row(found: Found, name: str) -> list[str]:
    top1, loss = (found.values(name, what) for what in ("test_top1", "test_loss"))
    drop = found.values("fp32") - top1
    if name == "fp32":
        return [title(name), "32", "32", mean(top1), "", f"{loss.mean():.4f}"]
    bits = [f"{found.bits(name, pinned):.3f}" for pinned in (True, False)]
    return [title(name), *bits, mean(top1), mean(drop), f"{loss.mean():.4f}"]


def report(found: Found) -> None:
    """README.md's tables, front.png and summary.json."""
    before = found.results[str(GIVEN)]
    header = ["model", "average bits", "without the pinned", "test top-1", "drop", "cross-entropy"]
    names = ["fp32", *(f"{m}-{b}" for b in UNIFORM for m in METHODS), *sorted(found.mixed)]
    rows = [["FP32, as given", "32", "32", f"{before['test_top1']:.2f}", "",
             f"{before['test_loss']:.4f}"]]  # fmt: skip
    main = table(header, rows + [row(found, name) for name in names])
    gains = {name: found.gain(name) for name in sorted(found.mixed)}
    gained = table(
        ["model", "average bits", "beyond the best line of uniform 2 and 3 bits", "whose line"],
        [
            [title(name), f"{found.bits(name):.3f}", mean(x, "+.2f"), TITLES[method]]
            for name, (x, method) in gains.items()
        ],
    )
    layers = table(
        ["layer", "weights", *sorted(found.mixed)],
        [
            [name, f"{numel:,}", *(str(found.mixed[m].weight[name]) for m in sorted(found.mixed))]
            for name, numel in found.sizes.items()
        ],
    )
    write_between(HERE / "README.md", {"main": main, "gain": gained, "bits": layers})
    picture(found)
    summarise(found)


def summarise(found: Found) -> None:
    fp32, searched = found.values("fp32"), found.values(SEARCHED)
    gain, _ = found.gain(SEARCHED)
    hawq = found.values(f"hawq-{BUDGET}")
    summary = {
        "fp32_top1": fp32.mean(),
        "fp32_as_given_top1": found.results[str(GIVEN)]["test_top1"],
        "searched_top1": searched.mean(),
        "searched_average_bits": found.bits(SEARCHED),
        "drop_points": (fp32 - searched).mean(),
        "drop_stderr_points": stderr(fp32 - searched),
        "gain_over_uniform_interpolation_points": gain.mean(),
        "stderr_points": stderr(gain),
        "searched_minus_hawq_points": (searched - hawq).mean(),
        "searched_minus_hawq_stderr_points": stderr(searched - hawq),
    }
    write_json(HERE / "summary.json", {k: round(float(v), 4) for k, v in summary.items()})


def picture(found: Found) -> None:
    """front.png: accuracy against average bits, uniform lines and mixed points, with ± one standard
    error of the mean over seeds."""

    def points(names: list[str], label: str) -> list[dict[str, Any]]:
        tops = [(found.bits(name), found.values(name)) for name in names]
        return [
            {"bits": bits, "top1": x.mean(), "low": x.mean() - stderr(x),
             "high": x.mean() + stderr(x), "model": label}
            for bits, x in tops
        ]  # fmt: skip

    lines = [
        point
        for method in METHODS
        for point in points([f"{method}-{b}" for b in UNIFORM], f"uniform, {TITLES[method]}")
    ]
    limits = sorted((*LOWER, BUDGET))
    lines += points([f"searched-{limit}" for limit in limits], "searched")
    singles = points([f"knapsack-{BUDGET}"], "default proxies, knapsack")
    singles += points([f"hawq-{BUDGET}"], "HAWQ-V2 trace, knapsack")
    x = alt.X("bits:Q", title="average bits a weight", scale=alt.Scale(zero=False))
    y = alt.Y("top1:Q", title="test top-1, %", scale=alt.Scale(zero=False))
    colour = alt.Color("model:N", title=None, sort=None)
    every = alt.Chart(alt.Data(values=lines + singles))
    level = [{"top1": found.values("fp32").mean(), "model": "FP32"}]
    chart = (
        alt.Chart(alt.Data(values=lines)).mark_line().encode(x, y, colour)
        + every.mark_point(filled=True, size=50, opacity=1).encode(x, y, colour)
        + every.mark_rule().encode(x, alt.Y("low:Q", title=""), alt.Y2("high:Q"), colour)
        + alt.Chart(alt.Data(values=level)).mark_rule(strokeDash=[4, 4]).encode(y, colour)
    )
    with atomic_path(HERE / "front.png") as temporary:
        chart.properties(width=560, height=360).save(str(temporary), format="png", scale_factor=2)
