"""Several fronts beside each other: their hypervolumes up to one reference, and one chart."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from adq.quant.errors import InputError
from adq.search.front import Front, Point
from adq.search.report.table import COLUMNS
from adq.search.report.units import UNITS, Unit, metric_format

SCHEMA = "adq-comparison/1"
FORMATS = ("json", "csv", "png", "html")
MOST = 7
"""As many studies as there are colours that everyone can tell apart."""


@dataclass(frozen=True)
class Comparison:
    """Fronts of one task by a name each; `costs` are those that every study minimised."""

    fronts: dict[str, Front]
    costs: tuple[str, ...]

    @property
    def first(self) -> Front:
        return next(iter(self.fronts.values()))

    @property
    def unit(self) -> Unit:
        """The unit of the first cost, which the chart is drawn against."""
        return UNITS[self.costs[0]]

    @property
    def metric_title(self) -> str:
        return f"{self.first.split} {self.first.metric_name}"

    @property
    def reference(self) -> dict[str, float]:
        """One reference point for all: the lowest metric and the largest costs of their own ones
        (see `Front.reference`), so that no study loses a model by it."""
        own = [front.reference for front in self.fronts.values()]
        costs = {name: max(reference[name] for reference in own) for name in self.costs}
        return {"metric": min(reference["metric"] for reference in own), **costs}

    @property
    def hypervolumes(self) -> dict[str, float]:
        """Name -> hypervolume of the front up to `reference`."""
        return {name: f.hypervolume(self.reference) for name, f in self.fronts.items()}

    def metric_text(self, point: Point) -> str:
        """Like `0.9711 ± 0.0079`, with the same decimals for all models."""
        points = [p for front in self.fronts.values() for p in front.points]
        decimals = metric_format(p.metric_stderr for p in points)
        return f"{point.metric:{decimals}} ± {point.metric_stderr:{decimals}}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, one a study, as texts: models, hypervolume, best model and knee."""
        titles = [UNITS[name].title for name in self.costs]
        header = ["study", "models", "hypervolume", "best", self.metric_title, *titles, "knee"]
        rows = []
        for name, front in self.fronts.items():
            best, knee = front.best, front.knee
            costs = [UNITS[cost].number(getattr(best, cost)) for cost in self.costs]
            volume = f"{self.hypervolumes[name]:.4f}"
            shown = [best.id, self.metric_text(best), *costs, "none" if knee is None else knee.id]
            rows.append([name, str(len(front.points)), volume, *shown])
        return header, rows

    def models(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, one a model, as texts."""
        titles = [UNITS[name].title for name in self.costs]
        rows = [
            [name, point.id, self.metric_text(point)]
            + [UNITS[cost].number(getattr(point, cost)) for cost in self.costs]
            for name, front in self.fronts.items()
            for point in front.points
        ]
        return ["study", "model", self.metric_title, *titles], rows

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON, schema `adq-comparison/1`."""
        volumes = self.hypervolumes
        studies = [
            {
                "study": name,
                "hypervolume": volumes[name],
                "fp32_metric": front.fp32_metric,
                "budget": front.budget,
                "objectives": front.objectives,
                "best": front.best.id,
                "knee": None if front.knee is None else front.knee.id,
                "points": [asdict(point) for point in front.points],
            }
            for name, front in self.fronts.items()
        ]
        return {
            "schema": SCHEMA,
            "task": self.first.task,
            "split": self.first.split,
            "metric_name": self.first.metric_name,
            "reference": self.reference,
            "studies": studies,
        }


def compare(fronts: Sequence[Front]) -> Comparison:
    """The fronts as a comparison; studies of one name are told apart by their folders.

    Raises InputError when they can't be compared: another task, metric or split, no cost that all
    minimised, a study twice, fewer than two or more than MOST.
    """
    if not 2 <= len(fronts) <= MOST:
        raise InputError(f"expected 2 to {MOST} studies, got {len(fronts)}")
    names = [front.study for front in fronts]
    if len(set(names)) < len(names):
        names = [front.folder for front in fronts]
    if len(set(names)) < len(names):
        raise InputError(f"expected each study once, got {', '.join(names)}")
    for a, b in pairwise(fronts):
        for what in ("task", "metric_name", "split"):
            if getattr(a, what) != getattr(b, what):
                raise InputError(
                    f"studies {a.study!r} and {b.study!r} can't be compared: their "
                    f"{what.replace('_name', '')} differs, {getattr(a, what)} and "
                    f"{getattr(b, what)}"
                )
    costs = tuple(name for name in UNITS if all(name in front.objectives for front in fronts))
    if not costs:
        had = "; ".join(f"{front.study}: {', '.join(front.objectives)}" for front in fronts)
        raise InputError(f"the studies minimised no cost in common ({had}): nothing to compare")
    return Comparison(dict(zip(names, fronts, strict=True)), costs)


def render(comparison: Comparison, format: str) -> bytes:
    """The comparison in one of FORMATS; texts are UTF-8."""
    if format == "json":
        return (json.dumps(comparison.to_json(), indent=1, allow_nan=False) + "\n").encode()
    if format == "csv":
        return _csv(comparison).encode()
    # The drawing code is loaded for whoever draws.
    if format == "png":
        from adq.search.report.compare_chart import compare_picture

        return compare_picture(comparison)
    if format == "html":
        from adq.search.report.compare_chart import compare_page

        return compare_page(comparison).encode()
    raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")


def _csv(comparison: Comparison) -> str:
    """One row a point, all digits; the columns of front.csv without the layers, after `study`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["study", *COLUMNS])
    for name, front in comparison.fronts.items():
        for point in front.points:
            facts = {"split": front.split, **vars(point)}
            writer.writerow([name, *(facts[column] for column in COLUMNS)])
    return out.getvalue()
