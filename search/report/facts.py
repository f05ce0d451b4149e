"""Everything that a report shows, read once from the study's folder."""

from dataclasses import dataclass

from adq.proxies.base import Sensitivity
from adq.proxies.costs import Costs
from adq.quant.errors import InputError
from adq.quant.evaluate import Evaluation
from adq.quant.files import read_json
from adq.quant.spec import BitVector
from adq.search.breakdown import Breakdown, read_breakdown
from adq.search.candidate import Record
from adq.search.config import StudyConfig
from adq.search.folder import FINAL, TRIALS, Clock, StudyFolder
from adq.search.front import Front, Point
from adq.search.report.units import UNITS, Unit, metric_format
from adq.search.runs import Run, read_runs
from adq.search.sensitivity import ensemble_of, load_sensitivities


@dataclass(frozen=True)
class Facts:
    """A front and the records behind it.

    `trials` are in the order of their numbers; `proxies` end with the ensemble that was fitted on
    them, where they are enough; `finals` maps an id to its final record; `fp32` is measured on the
    front's split, `fp32_losses` are those of its training's epochs. `breakdown`, `runs` and
    `seconds` (which the study took) are missing for a study of an earlier version.
    """

    front: Front
    config: StudyConfig
    fp32: Evaluation
    fp32_validation: Evaluation
    fp32_losses: tuple[float, ...]
    trials: tuple[Record, ...]
    finals: dict[str, Record]
    proxies: tuple[Sensitivity, ...]
    breakdown: Breakdown | None
    runs: tuple[Run, ...]
    seconds: float | None

    @property
    def cost(self) -> str:
        """The first cost with a budget: what the charts are drawn against."""
        return next(iter(self.front.budget))

    @property
    def unit(self) -> Unit:
        return UNITS[self.cost]

    @property
    def limit(self) -> float:
        """The budget of `cost`, in the cost's own unit."""
        return self.front.budget[self.cost]

    @property
    def layers(self) -> list[str]:
        """The quantized layers in the order in which the model runs them."""
        return list(self.front.points[0].weight_bits)

    @property
    def input_bits_vary(self) -> bool:
        """Whether models of the study differ in the bits of some input, or inputs of one model do;
        FP32 is one of the widths."""
        vectors = [r.bits for r in self.trials]
        points = (*self.front.points, *self.front.uniform)
        vectors += [BitVector(p.weight_bits, p.act_bits) for p in points]
        return len({v.act.get(layer) for v in vectors for layer in v.weight}) > 1

    @property
    def metric_title(self) -> str:
        """The metric with the split on which it was measured, like `test accuracy`."""
        return f"{self.front.split} {self.front.metric_name}"

    @property
    def metric_format(self) -> str:
        """How a metric is written, for Python's `format`."""
        points = (*self.front.points, *self.front.uniform)
        return metric_format([self.fp32.metric_stderr, *(p.metric_stderr for p in points)])

    def cost_of(self, costs: Point | Costs) -> float:
        """`cost` of a model, in the cost's own unit."""
        return float(getattr(costs, self.cost))

    def record_of(self, point: Point) -> Record | None:
        """The record of a point's own training, on a partial front a trial's; a uniform model that
        is on the front has its twin's."""
        if self.front.split != "test":
            return next((record for record in self.trials if record.id == point.id), None)
        return self.finals.get(point.id) or next(
            (
                record
                for record in self.finals.values()
                if record.bits == BitVector(point.weight_bits, point.act_bits)
            ),
            None,
        )

    def metric_text(self, metric: float, stderr: float) -> str:
        """Like `0.9711 ± 0.0079`, with the same decimals everywhere."""
        return f"{metric:{self.metric_format}} ± {stderr:{self.metric_format}}"


def _seconds(folder: StudyFolder) -> float | None:
    path = folder.file("clock.json")
    return Clock(path).before if path.exists() else None


def read_facts(folder: StudyFolder, front: Front) -> Facts:
    """The facts of a study whose front is known.

    Raises InputError when a file is missing or damaged.
    """
    path = folder.file("fp32.json")
    data = read_json(path)
    try:
        fp32, validation = Evaluation(**data[front.split]), Evaluation(**data["validation"])
        losses = tuple(map(float, data["train_losses"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}") from None
    trials = sorted(folder.records(TRIALS), key=lambda record: int(record.id))
    scores = load_sensitivities(folder)
    ensemble = ensemble_of(scores, trials)
    return Facts(
        front=front,
        config=folder.config,
        fp32=fp32,
        fp32_validation=validation,
        fp32_losses=losses,
        trials=tuple(trials),
        finals={record.id: record for record in folder.records(FINAL)},
        proxies=(*scores, *([] if ensemble is None else [ensemble])),
        breakdown=read_breakdown(folder),
        runs=read_runs(folder),
        seconds=_seconds(folder),
    )
