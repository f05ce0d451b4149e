"""A study as it is when its report is written, made of records alone: nothing is trained."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adq.proxies.base import Sensitivity, Table
from adq.proxies.costs import Costs
from adq.quant.evaluate import Evaluation
from adq.quant.files import write_json, write_text
from adq.quant.spec import BitVector
from adq.search.breakdown import Breakdown, Layer, LayerCost
from adq.search.candidate import Record, Rung
from adq.search.config import StudyConfig
from adq.search.folder import FINAL, TRIALS, StudyFolder
from adq.search.front import Front, point_of
from adq.search.report.facts import Facts

LAYERS = (
    "</script><b>bold</b>",
    "blocks.0.attn/qkv:w[0]",
    "q'uo\"te & <!-- \\ {{ 7*7 }} \u2028",
    "a.name.of.many.parts.that.is.longer.than.any.label.may.be.conv1",
    "head",
)
ERROR = "loss is nan <img src=http://example.org/x.png onerror=alert(1)>"
SCORES = np.array(
    [
        [3e-2, 1e-3, 1e-16],  # far below the axis
        [1e-2, 2e-3, 0.0],
        [5e-3, 1e-4, -2e-5],
        [1e-3, 9e-4, 4e-4],
        [2e-4, 1e-4, 3e-5],
    ]
)
CONFIG = StudyConfig(
    task="imagefolder:/data/two words/it's",
    model="resnet18",
    budget_bits=3.25,
    budget_size_mb=0.1 + 0.2,
    bits=(2, 4, 8),
    trials=12,
    lr=3e-4,
    study="nasty",
)


def evaluation(metric: float, stderr: float = 0.0042) -> Evaluation:
    return Evaluation(loss=1.5 - metric, metric=metric, metric_stderr=stderr, samples=450)


def record(
    id: str, bits: list[int], validation: float | None, test: float | None = None, **more: Any
) -> Record:
    weight = dict(zip(LAYERS, bits, strict=True))
    average = sum(bits) / len(bits)
    return Record(
        id=id,
        bits=BitVector(weight, more.pop("act", dict.fromkeys(LAYERS, 8))),
        seed=7,
        epochs=3,
        costs=Costs(average, average / 1.1, 8.0, int(9123 * average), int(1.7e7 * average), None),
        train_losses=more.pop("train_losses", (0.5, 0.25)),
        flips=(0.1, 0.0),
        dead_levels=(2.0, 0.0),
        validation=None if validation is None else evaluation(validation),
        test=None if test is None else evaluation(test),
        seconds=12.34,
        weights=None if test is None else f"models/{id}.safetensors",
        error=ERROR if validation is None else None,
        **more,
    )


@dataclass(frozen=True)
class Study:
    folder: StudyFolder
    front: Front
    trials: list[Record]


def make_study(
    root: Path, trials: list[Record], finals: list[Record], uniform: list[Record], **more: Any
) -> Study:
    """A folder as it is when the report is written: final training done, no results.json yet."""
    folder = StudyFolder(root / "nasty")
    for part in (TRIALS, FINAL, "models"):
        (folder.path / part).mkdir(parents=True)
    write_text(folder.file("study.toml"), more.get("config", CONFIG).to_toml())
    fp32 = more.get("fp32", evaluation(0.9876, 0.0031))
    write_json(
        folder.file("fp32.json"),
        {
            "train_losses": [1.5, 0.25, 0.0625],
            "validation": asdict(evaluation(0.9911)),
            "test": asdict(fp32),
        },
    )
    scores = more.get("scores", SCORES)
    weight = Table(LAYERS, (2, 4, 8), scores, np.abs(scores) / 8)
    proxies = [Sensitivity("hessian", weight, None, 32, 1.0)]
    proxies.append(Sensitivity("fisher", weight, more.get("act_table"), 128, 1.0))
    write_json(
        folder.file("sensitivity.json"), {"proxies": [{"key": "k", **s.to_json()} for s in proxies]}
    )
    for kind, records in ((TRIALS, trials), (FINAL, finals + uniform)):
        for each in records:
            folder.write_record(kind, each)
    split = more.get("split", "test")
    points = tuple(point_of(r, split) for r in more.get("points", finals))
    front = Front(
        study="nasty",
        task=CONFIG.task,
        metric_name=more.get("metric_name", "accuracy"),
        fp32_metric=fp32.metric,
        budget=more.get("config", CONFIG).budget.limits(),
        objectives=more.get("config", CONFIG).budget.limits(),
        points=points,
        uniform=tuple(point_of(r) for r in uniform),
        split=split,
        folder=str(folder.path),
    )
    return Study(folder, front, trials)


USUAL = {
    "t0001": (2.4, 0.9234567),
    "t0004": (2.8, 0.9312345),
    "t0008": (3.6, 0.9298765),
    "uniform-2": (2.0, 0.9011111),
    "uniform-4": (4.0, 0.9611111),
}
"""id -> (average bits, test metric) of the models below."""


def usual(root: Path, **more: Any) -> Study:
    """Twelve trials, one failed; three points, two more final models; uniform 2 and 4 bits."""
    metrics = [0.91, 0.93, None, 0.92, 0.95, 0.94, 0.95, 0.9, 0.97, 0.96, 0.89, 0.965]
    trials = [
        record(f"{i:04d}", [2 + i % 3, 2, 4, 2 + (i == 4), 8], metric)
        for i, metric in enumerate(metrics)
    ]
    finals = [
        record("t0001", [2, 2, 2, 4, 2], 0.9312, 0.9234567),
        record("t0004", [2, 4, 4, 2, 2], 0.9512, 0.9312345),
        record("t0008", [4, 4, 2, 4, 4], 0.9712, 0.9298765),
    ]
    uniform = [
        record("uniform-2", [2] * 5, 0.9, 0.9011111),
        record("uniform-4", [4] * 5, 0.96, 0.9611111),
    ]
    made = make_study(root, trials, finals, uniform, **more)
    made.folder.write_record(FINAL, record("t0003", [2, 2, 2, 4, 4], 0.9, 0.91))  # dominated
    made.folder.write_record(FINAL, record("t0005", [4, 2, 2, 2, 2], None))
    return made


def large(trials: int, layers: int, points: int) -> Facts:
    """What a report of a large study is made of: three rungs, and random numbers throughout."""
    draw = np.random.default_rng(0)
    names = tuple(f"backbone.layers.{i // 4}.blocks.{i % 4}.attention.proj" for i in range(layers))
    widths = (2, 3, 4, 6, 8)

    def one(id: str, average: float, rungs: int, test: bool = False) -> Record:
        found = [evaluation(float(draw.uniform(0.5, 0.9))) for _ in range(rungs)]
        drawn = draw.choice(widths, size=layers).tolist()
        bits = BitVector(dict(zip(names, drawn, strict=True)), dict.fromkeys(names, 8))
        done = rungs == 3
        return Record(
            id=id,
            bits=bits,
            seed=0,
            epochs=10,
            costs=Costs(average, average, 8.0, int(1e6 * average), int(1e9 * average), None),
            train_losses=tuple(draw.uniform(0.1, 1, size=10).tolist()),
            flips=(),
            dead_levels=(),
            validation=replace(found[-1], metric=0.1 * average) if done else None,
            test=replace(found[-1], metric=0.1 * average) if test else None,
            seconds=12.3,
            rungs=tuple(Rung(3**i, each, 1.5) for i, each in enumerate(found)),
        )

    records = [one(f"{i:04d}", float(draw.uniform(2, 4)), 1 + i % 3) for i in range(trials)]
    finals = [one(f"t{i:04d}", 2 + 2 * i / points, 3, test=True) for i in range(points)]
    scores = np.exp(draw.normal(-8, 2, (layers, len(widths))))
    table = Table(names, widths, scores, scores / 9)
    costs = {(bits, 8): LayerCost(1250 * bits, 8 * bits * 10**6) for bits in widths}
    return Facts(
        front=Front(
            study="large",
            task="digits",
            metric_name="accuracy",
            fp32_metric=0.9,
            budget={"average_bits": 4.0},
            objectives={"average_bits": 4.0},
            points=tuple(point_of(final) for final in finals),
        ),
        config=StudyConfig(budget_bits=4, trials=trials, epochs=9, rungs=(1, 3)),
        fp32=evaluation(0.9),
        fp32_validation=evaluation(0.9),
        fp32_losses=tuple(1 / (epoch + 1) for epoch in range(90)),
        trials=tuple(records),
        finals={final.id: final for final in finals},
        proxies=tuple(Sensitivity(name, table, None, 32, 1.0) for name in ("kl", "hessian")),
        breakdown=Breakdown(
            tuple(Layer(name, "Linear", (100, 100), 10**4, 10**6, costs) for name in names),
            LayerCost(5000, 0),
        ),
        runs=(),
        seconds=1e5,
    )
