"""summary.json and the tables of README.md, from results.json and verdicts.json."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grounds.report import table, write_between

from adq.quant.files import read_json, write_json

HERE = Path(__file__).resolve().parent
DETECTED = ("killed", "timed out")
OUTCOMES = (*DETECTED, "survived")

Row = dict[str, Any]


def write(results: dict[str, Any]) -> None:
    rows = [row for row in results["runs"] if not row["mutant"].startswith("control")]
    controls = [row for row in results["runs"] if row["mutant"].startswith("control")]
    verdicts = read_json(HERE / "verdicts.json") if (HERE / "verdicts.json").exists() else {}
    left = {row["mutant"] for row in rows if _last(row)["outcome"] not in DETECTED}
    if unknown := verdicts.keys() - left:
        raise ValueError(f"verdicts.json: {', '.join(sorted(unknown))} did not survive")
    summary: dict[str, float] = {
        "controls": len(controls),
        "controls_failed": sum(row["outcome"] != "survived" for row in controls),
    }
    for package, made in results["made"].items():
        own = [row for row in rows if row["mutant"].startswith(f"{package}/")]
        equivalent = sum(_class(row, verdicts) == "equivalent" for row in own)
        counts = Counter(_last(row)["outcome"] for row in own)
        summary |= {
            f"mutation_score_{package}": _score(counts),
            f"mutation_score_{package}_before": _score(Counter(row["outcome"] for row in own)),
            f"mutation_score_{package}_without_equivalent": _score(counts, equivalent),
            f"mutation_score_{package}_stderr": _stderr(counts),
            f"mutants_{package}": len(own),
            f"mutants_possible_{package}": made,
            f"equivalent_{package}": equivalent,
        }
        summary |= {f"{what.replace(' ', '_')}_{package}": counts[what] for what in OUTCOMES}
    write_json(HERE / "summary.json", summary)
    write_between(
        HERE / "README.md",
        {
            "scores": _scores(rows, results["made"], summary),
            "survivors": _survivors(rows, verdicts),
        },
    )


def _last(row: Row) -> Row:
    return row.get("after", row)


def _class(row: Row, verdicts: dict[str, list[str]]) -> str:
    return verdicts.get(row["mutant"], ["not judged"])[0]


def _score(counts: Counter[str], equivalent: int = 0) -> float:
    return round(sum(counts[what] for what in DETECTED) / (counts.total() - equivalent), 4)


def _stderr(counts: Counter[str]) -> float:
    """Of the share among all possible mutants, by the Agresti-Coull rule: no score is without."""
    n = counts.total() + 4
    share = (sum(counts[what] for what in DETECTED) + 2) / n
    return round(math.sqrt(share * (1 - share) / n), 4)


def _scores(rows: list[Row], packages: dict[str, int], summary: dict[str, float]) -> str:
    header = ["", "possible", "run", *OUTCOMES, "score", "before", "without equivalent ones"]
    lines = []
    for package in packages:
        counts = [summary[f"{what.replace(' ', '_')}_{package}"] for what in OUTCOMES]
        named = [summary[f"mutants_possible_{package}"], summary[f"mutants_{package}"]]
        scores = [
            f"{100 * summary[f'mutation_score_{package}{end}']:.1f} %"
            for end in ("", "_before", "_without_equivalent")
        ]
        lines.append([f"`{package}/`", *map(str, named + counts), *scores])
    return table(header, lines)


def _survivors(rows: list[Row], verdicts: dict[str, list[str]]) -> str:
    left = [row for row in rows if _last(row)["outcome"] not in DETECTED]
    lines = [
        [_class(row, verdicts), f"`{row['mutant']}`", f"`{_cell(row['change'])}`", reason]
        for row in sorted(left, key=lambda row: (_class(row, verdicts), row["mutant"]))
        for reason in [verdicts.get(row["mutant"], ["", ""])[1]]
    ]
    return table(["class", "mutant", "change", "why no test fails"], lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")


if __name__ == "__main__":
    write(json.loads((HERE / "results.json").read_text(encoding="utf-8")))
