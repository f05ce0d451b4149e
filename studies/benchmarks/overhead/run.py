"""What does a trial cost beside its training: python studies/benchmarks/overhead/run.py

Asks and tells 20 trials of a study of ResNet-50 that has 5,000 finished ones, with the weight bits
and the input bits of every layer free. Writes results.json (raw) and summary.json (name -> number).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import platform
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import optuna
import torch
import torch.nn.functional as F
from torchvision.models import resnet50

from adq.quant.evaluate import Evaluation
from adq.quant.files import write_json
from adq.quant.spec import BitVector
from adq.search.candidate import Record, Rung
from adq.search.config import StudyConfig
from adq.search.folder import TRIALS, Clock, StudyFolder, create_study
from adq.search.history import History
from adq.search.lattice import Indices, Lattice
from adq.search.problem import Problem, make_problem
from adq.search.samplers import make_sampler
from adq.search.samplers.base import Proposals
from adq.search.study import StudyLoop, create_storage_study
from adq.search.task import Task

HERE = Path(__file__).parent
FINISHED, ASKED = 5_000, 20
OTHERS = ("tpe", "nsga2", "nsga3", "random")  # a Gaussian process of 5,000 results takes minutes
ROUNDS = 5


class Stopwatch:
    """Seconds of the clock and of the processor since it was made."""

    def __init__(self) -> None:
        self._clock, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "seconds": time.perf_counter() - self._clock,
            "cpu_seconds": time.process_time() - self._processor,
        }


class TimedProposals(Proposals):
    """Proposals that know how long the last one took."""

    took: dict[str, float]

    def propose(self, number: int, history: History, pending: Sequence[Indices]) -> Indices | None:
        watch = Stopwatch()
        point = super().propose(number, history, pending)
        self.took = watch.read()
        return point


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as out:
        problem = make_problem(configuration(out), task())
        lattice = made_up_lattice(problem)
        folder = create_study(
            problem.config, lambda new: create_storage_study(new, problem, "overhead")
        )
        fill(folder, problem, lattice)
        sampler = make_sampler(problem.config.sampler, lattice, problem.objectives, 0)
        proposals = TimedProposals(lattice, [], sampler, 0)
        watch = Stopwatch()
        loop = StudyLoop(folder, problem, proposals, Clock(folder.file("clock.json")))
        opening = watch.read()
        assert len(loop.history) == FINISHED
        assert not np.isnan(loop.history.metric).any()
        trials = [{**one_trial(loop, problem), "propose": proposals.took} for _ in range(ASKED)]
        history = loop.history
        loop.close()
    raw = {
        "environment": environment(),
        "parameters": len(problem.space.distributions()),
        "finished": FINISHED,
        "sampler": problem.config.sampler,
        "opening": opening,
        "trials": trials,
        "other_samplers": {n: others(n, problem, lattice, history) for n in OTHERS},
    }
    summary = summarise(raw)
    write_json(HERE / "results.json", raw)
    write_json(HERE / "summary.json", summary)
    print(json.dumps(summary, indent=1))


def configuration(out: str) -> StudyConfig:
    return StudyConfig(
        task="resnet50",
        budget_bits=4.5,
        bits=(2, 3, 4, 6, 8),
        act_bits=(4, 6, 8),
        first_last_bits=0,
        ties="none",
        trials=FINISHED + ASKED,
        study="overhead",
        out=out,
    )


def task() -> Task:
    """ResNet-50 with random weights and images: nothing is trained or evaluated here."""
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    batches = [(images, torch.arange(4))]
    return Task(lambda: resnet50(weights=None), F.cross_entropy, batches, batches, batches)


def made_up_lattice(problem: Problem) -> Lattice:
    """Expected loss increases as of uniform noise in every weight and input, 4⁻ᵇ."""
    scores = [
        np.array([4.0**-w + 4.0**-a for w, a in group.options]) for group in problem.space.groups
    ]
    return Lattice(problem.space, problem.costs, problem.costs.limits(problem.limits), scores)


def made_up_record(problem: Problem, bits: BitVector, number: int) -> Record:
    """A metric that falls as noise in the weights and inputs grows, with noise of its own."""
    noise = sum(4.0**-b for b in [*bits.weight.values(), *bits.act.values()])
    metric = 0.76 - 0.05 * noise + 0.002 * float(np.random.default_rng(number).normal())
    validation, epochs = Evaluation(1 - metric, metric, 0.002, 50_000), problem.config.epochs
    return Record(
        f"{number:04d}",
        bits,
        seed=problem.config.seed,
        epochs=epochs,
        costs=problem.costs.costs(bits),
        train_losses=(1.0,) * epochs,
        flips=(0.01,) * epochs,
        dead_levels=(0.0,) * epochs,
        validation=validation,
        test=None,
        seconds=100.0,
        rungs=(Rung(epochs, validation, 100.0),),
    )


def one_trial(loop: StudyLoop, problem: Problem) -> dict[str, Any]:
    watch = Stopwatch()
    job = loop.ask()
    ask = watch.read()
    assert job is not None
    record = made_up_record(problem, job.bits, job.number)
    watch = Stopwatch()
    loop.tell(job, record)
    return {"ask": ask, "tell": watch.read()}


def fill(folder: StudyFolder, problem: Problem, lattice: Lattice) -> None:
    """Bring the study to FINISHED trials: records in its folder, rows in its database.

    The first trial runs as usual. The others' rows are copies of its rows with their own numbers in
    them, since Optuna takes minutes to create trials one by one. Whether all is well shows when the
    study is opened, which compares trials with records.
    """
    random = Proposals(lattice, [], make_sampler("random", lattice, problem.objectives, 0), 0)
    loop = StudyLoop(folder, problem, random, Clock(folder.file("clock.json")))
    one_trial(loop, problem)
    loop.close()
    points = lattice.random(np.random.default_rng(0), 10 * FINISHED)
    points = points[lattice.fits(points)][: FINISHED - 1]
    distributions = problem.space.distributions()
    with closing(sqlite3.connect(folder.file("study.db"))) as base, base:
        (trial,) = base.execute("SELECT study_id, datetime_start, datetime_complete FROM trials")
        (trial_id,) = base.execute("SELECT trial_id FROM trials").fetchone()
        for number, point in enumerate(points, 1):
            bits, id = problem.space.bit_vector(lattice.decode(point)), trial_id + number
            record = replace(made_up_record(problem, bits, number), told=number)
            text = json.dumps(record.to_json())  # `write_record` waits for the disk
            folder.record_path(TRIALS, record.id).write_text(text, encoding="utf-8")
            base.execute(
                "INSERT INTO trials (trial_id, number, state, study_id, datetime_start, "
                "datetime_complete) VALUES (?, ?, 'COMPLETE', ?, ?, ?)",
                (id, number, *trial),
            )
            params = problem.space.encode(lattice.decode(point))
            base.executemany(
                "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) "
                "SELECT ?, param_name, ?, distribution_json FROM trial_params "
                "WHERE trial_id = ? AND param_name = ?",
                [
                    (id, distributions[name].to_internal_repr(value), trial_id, name)
                    for name, value in params.items()
                ],
            )
            costs = [getattr(record.costs, name) for name in problem.objectives]
            assert record.validation is not None
            base.executemany(
                "INSERT INTO trial_values (trial_id, objective, value, value_type) "
                "VALUES (?, ?, ?, 'FINITE')",
                [(id, i, value) for i, value in enumerate([record.validation.metric, *costs])],
            )
            attributes = {"told": json.dumps(number), "parent": "null"}
            base.executemany(
                "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, ?, ?)",
                [(id, *item) for item in attributes.items()],
            )
            base.execute(
                "INSERT INTO trial_system_attributes (trial_id, key, value_json) "
                "SELECT ?, key, value_json FROM trial_system_attributes WHERE trial_id = ?",
                (id, trial_id),
            )


def others(
    name: str, problem: Problem, lattice: Lattice, history: History
) -> list[dict[str, float]]:
    """Proposals after all results but the last ones, of which each tells one more."""
    proposals = TimedProposals(
        lattice, [], make_sampler(name, lattice, problem.objectives, 0), problem.config.seed
    )
    took = []
    for told in range(len(history) - ROUNDS, len(history) + 1):
        proposals.propose(told, history.first(told), [])
        took.append(proposals.took)
    return took


def summarise(raw: dict[str, Any]) -> dict[str, float]:
    """Medians: seconds of the clock, and of the processor where `cpu` says so."""
    summary: dict[str, float] = {}
    for kind, suffix in (("seconds", ""), ("cpu_seconds", "_cpu")):
        trials = raw["trials"]
        parts = {part: [t[part][kind] for t in trials] for part in ("ask", "tell", "propose")}
        both = [ask + tell for ask, tell in zip(parts["ask"], parts["tell"], strict=True)]
        storage = [a - b for a, b in zip(both, parts["propose"], strict=True)]
        found = {"ask_tell": both, **parts, "storage": storage}
        found |= {
            f"{name}_propose": [one[kind] for one in took[1:]]  # the first takes all results in
            for name, took in raw["other_samplers"].items()
        }
        summary |= {f"{name}{suffix}_s": round(median(s), 4) for name, s in found.items()}
    summary |= {"parameters": raw["parameters"], "finished": raw["finished"]}
    return summary


def environment() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "optuna": optuna.__version__,
    }


if __name__ == "__main__":
    main()
