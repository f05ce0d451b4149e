"""Studies whose trainings are made up, and processes that die while they search."""

import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import tiny_task
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from toy_space import all_points, smallest

from adq.quant.evaluate import Evaluation
from adq.quant.spec import BitVector
from adq.search.candidate import Record, Rung
from adq.search.config import StudyConfig
from adq.search.crew import Crew
from adq.search.folder import TRIALS, Clock, StudyFolder, create_study
from adq.search.history import History
from adq.search.jobs import Job
from adq.search.lattice import Indices, Lattice
from adq.search.problem import Problem, make_problem
from adq.search.samplers.base import Proposals
from adq.search.seeds import Point
from adq.search.storage import StudyStorage, create_study_in
from adq.search.study import StudyLoop

MANY = {"bits": (2, 3, 4, 6), "act_bits": (4, 8), "trials": 14, "budget_bits": 4.5}


class Death(BaseException):
    """The process dies here: nothing may catch it."""


class Telltale:
    """Proposes what depends on every bit of what it is given."""

    def __init__(self, lattice: Lattice) -> None:
        self.lattice = lattice

    def propose(
        self, history: History, pending: Sequence[Indices], rng: np.random.Generator
    ) -> Indices:
        given = [history.points, history.metric, *pending]
        check = zlib.crc32(b"|".join(array.tobytes() for array in given))
        return self.lattice.random(np.random.default_rng([check, rng.integers(2**31)]), 1)[0]


@dataclass
class Bench:
    """A problem, and the pieces that a process would make anew each time it starts."""

    problem: Problem
    evaluated: Counter[str] = field(default_factory=Counter)
    heard: list[Record] = field(default_factory=list)
    die: Callable[[], None] = lambda: None
    failing: tuple[str, ...] = ("0001",)
    seeds: list[Point] = field(default_factory=list)
    clock: Clock | None = None

    def proposals(self) -> Proposals:
        space, costs = self.problem.space, self.problem.costs
        limits = costs.limits(self.problem.limits)
        scores = [np.array([0.1 * (10 - w) for w, _ in la.options]) for la in space.groups]
        lattice = Lattice(space, costs, limits, scores)
        seeds = self.seeds or [space.uniform(3), smallest(space)]
        return Proposals(lattice, seeds, Telltale(lattice), seed=4)

    @contextmanager
    def loop(self, folder: StudyFolder, uniform: int = 0) -> Iterator[StudyLoop]:
        clock = self.clock or Clock(folder.file("clock.json"))
        storage = StudyStorage(folder.storage_url, folder.config.study or "", patience_s=0)
        with Crew(folder.path) as crew:
            args = folder, self.problem, self.proposals(), clock, crew, storage, uniform
            yield StudyLoop(*args)

    def run(self, folder: StudyFolder) -> bool:
        """False when the space has no new point left."""
        with self.loop(folder) as loop:
            while (job := loop.ask()) is not None:
                self.die()
                self.evaluated[f"{job.id}@{job.epochs}"] += 1
                self.die()
                self.heard.append(loop.tell(job, self.result(job)))
                self.die()
            assert loop.done
            loop.close()
            return not loop.exhausted

    def result(self, job: Job) -> Record:
        return self.record(job.id, job.bits, job.epochs)

    def record(self, id: str, bits: BitVector, epochs: int) -> Record:
        noise = zlib.crc32(f"{bits.key}{epochs}".encode()) / 2**32
        metric = sum(b * (i + 1) for i, b in enumerate(bits.weight.values())) / 100 + noise
        failed = id in self.failing and epochs > 0
        validation = None if failed else Evaluation(1 - metric, metric, 0.01, 60)
        return Record(
            id=id,
            bits=bits,
            seed=0,
            epochs=epochs,
            costs=self.problem.costs.costs(bits),
            train_losses=(),
            flips=(),
            dead_levels=(),
            validation=validation,
            test=None,
            seconds=0.5,
            error="the loss became nan" if failed else None,
            rungs=(Rung(epochs, validation, 0.5),),
        )


def make_config(out: Path, **options: Any) -> StudyConfig:
    settings = {"budget_bits": 4.0, "bits": (2, 3, 4), "trials": 4, "study": "s", "epochs": 2}
    settings |= options
    return StudyConfig(task="tiny_task:make_task", out=str(out), **settings)


def make_study(out: Path, **options: Any) -> tuple[StudyFolder, Bench]:
    problem = make_problem(make_config(out, **options), tiny_task.make_task())
    directions = [StudyDirection.MAXIMIZE] + [StudyDirection.MINIMIZE] * len(problem.objectives)
    names = [problem.task.metric_name, *problem.objectives]

    def add_storage(new: StudyFolder) -> None:
        create_study_in(new.storage_url, problem.config.study or "", names, directions)

    return create_study(problem.config, add_storage), Bench(problem)


def open_storage(url: str) -> RDBStorage:
    """Without Optuna's look at the version of the tables, which takes longer than a trial."""
    return RDBStorage(url, skip_compatibility_check=True, skip_table_creation=True)


def load(folder: StudyFolder) -> optuna.Study:
    storage = open_storage(folder.storage_url)
    return optuna.load_study(study_name=folder.config.study, storage=storage)


def essence(trial: FrozenTrial) -> tuple[Any, ...]:
    return (
        trial.number,
        trial.state,
        trial.params,
        trial.values,
        trial.system_attrs,
        trial.user_attrs,
    )


def state_of(folder: StudyFolder) -> tuple[list[Any], list[Record]]:
    return [essence(t) for t in load(folder).get_trials()], folder.records(TRIALS)


class Deaths:
    """Counts the steps of a run, and lets the process die at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at = 0, -1
        self.on_tick: Callable[[], Any] | None = None
        for owner, name in (
            (RDBStorage, "_create_new_trial"),
            (RDBStorage, "set_trial_state_values"),
            (RDBStorage, "set_trial_user_attr"),
            (RDBStorage, "set_study_user_attr"),
            (StudyFolder, "write_record"),
        ):
            monkeypatch.setattr(owner, name, self.mortal(getattr(owner, name)))

    def tick(self) -> None:
        if self.on_tick is not None:
            self.on_tick()
        self.count += 1
        if self.count - 1 == self.at:
            raise Death

    def mortal(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        return wrapped

    def run(self, bench: Bench, folder: StudyFolder, at: int) -> bool | None:
        """None when it died."""
        self.count, self.at = 0, at
        try:
            return bench.run(folder)
        except Death:
            return None


def copy_of(folder: StudyFolder, path: Path) -> StudyFolder:
    shutil.copytree(folder.path, path)
    return StudyFolder(path)


def fitting_points(problem: Problem) -> int:
    limits = problem.costs.limits(problem.limits)
    totals = [problem.costs.totals(problem.space.bit_vector(p)) for p in all_points(problem.space)]
    return sum(all(t[name] <= limit for name, limit in limits.items()) for t in totals)
