"""A study without training: a network's layers and costs, and metrics that are made up.

What is measured on it is the search alone: what it proposes, stores and writes.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
import optuna
import torch
import torch.nn.functional as F
from optuna.study import StudyDirection
from torch import nn

from adq.quant.evaluate import Evaluation
from adq.search.candidate import Record, Rung
from adq.search.config import StudyConfig
from adq.search.crew import Crew
from adq.search.folder import Clock, StudyFolder, create_study
from adq.search.history import History
from adq.search.jobs import Job
from adq.search.lattice import Indices, Lattice
from adq.search.problem import Problem, make_problem
from adq.search.samplers import make_sampler
from adq.search.samplers.base import Proposals
from adq.search.storage import StudyStorage, create_study_in
from adq.search.study import StudyLoop
from adq.search.task import Task

T = TypeVar("T")


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
    """Proposals that know how long the last one took, and all of them."""

    took: dict[str, float]
    seconds = 0.0

    def propose(
        self,
        number: int,
        history: History,
        pending: Sequence[Indices],
        beside: Sequence[Indices] = (),
    ) -> Indices | None:
        watch = Stopwatch()
        point = super().propose(number, history, pending, beside)
        self.took = watch.read()
        self.seconds += self.took["seconds"]
        return point


class TimedStorage(StudyStorage):
    """A study's storage that knows how long all its calls took."""

    seconds = 0.0

    def _call(self, operation: Callable[[], T]) -> T:
        watch = Stopwatch()
        try:
            return super()._call(operation)
        finally:
            self.seconds += watch.read()["seconds"]


def problem_of(model: Callable[[], nn.Module], pixels: int, config: StudyConfig) -> Problem:
    """Random weights and images of so many pixels a side: nothing is trained or evaluated."""
    images = torch.randn(4, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    batches = [(images, torch.arange(4))]
    return make_problem(config, Task(model, F.cross_entropy, batches, batches, batches))


def lattice_of(problem: Problem) -> Lattice:
    """Expected loss increases as of uniform noise in every weight and input, 4⁻ᵇ."""
    scores = [
        np.array([4.0**-w + 4.0 ** -(a or 8) for w, a in group.options])
        for group in problem.space.groups
    ]
    return Lattice(problem.space, problem.costs, problem.costs.limits(problem.limits), scores)


def record_of(problem: Problem, job: Job, error: str | None = None) -> Record:
    """A metric that falls as noise in the weights and inputs grows, with noise of its own."""
    noise = sum(4.0**-b for b in [*job.bits.weight.values(), *job.bits.act.values()])
    metric = 0.76 - 0.05 * noise + 0.002 * float(np.random.default_rng(int(job.id)).normal())
    validation = None if error is not None else Evaluation(1 - metric, metric, 0.002, 50_000)
    return Record(
        job.id,
        job.bits,
        seed=problem.config.seed,
        epochs=job.epochs,
        costs=problem.costs.costs(job.bits),
        train_losses=(1.0,) * job.epochs,
        flips=(0.01,) * job.epochs,
        dead_levels=(0.0,) * job.epochs,
        validation=validation,
        test=None,
        seconds=100.0,
        error=error,
        rungs=(Rung(job.epochs, validation, 100.0),),
        parent=job.parent,
    )


def new_study(problem: Problem) -> tuple[StudyFolder, Problem]:
    """The study's folder and storage; and the problem, its configuration as it is kept there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * len(problem.objectives)]
    names = [problem.task.metric_name, *problem.objectives]

    def prepare(new: StudyFolder) -> None:
        create_study_in(new.storage_url, new.config.study or "", names, directions)

    folder = create_study(problem.config, prepare)
    return folder, replace(problem, config=folder.config)


@contextmanager
def open_loop(
    folder: StudyFolder, problem: Problem, proposals: Proposals, storage: StudyStorage | None = None
) -> Iterator[StudyLoop]:
    storage = storage or StudyStorage(folder.storage_url, folder.name)
    with Crew(folder.path) as crew:
        clock = Clock(folder.file("clock.json"))
        yield StudyLoop(folder, problem, proposals, clock, crew, storage)


def proposals_of(problem: Problem, lattice: Lattice, sampler: str | None = None) -> TimedProposals:
    name = sampler or problem.config.sampler
    return TimedProposals(lattice, [], make_sampler(name, lattice, problem.objectives, 0), 0)


def environment(*packages: str) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
