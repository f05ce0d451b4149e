"""Trainings on this machine by Ray, one worker against two, and what it costs to start."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from grounds.made_up import lattice_of, new_study, open_loop, proposals_of
from grounds.resnet20 import ResNet20

from adq.quant.batches import Batch
from adq.search.candidate import Record
from adq.search.config import StudyConfig
from adq.search.files import FolderFiles
from adq.search.jobs import Bench, Job
from adq.search.problem import make_problem
from adq.search.study import StudyLoop
from adq.search.task import Task

ORDER = (1, 2, 2, 1)  # so that a machine that slowly changes favours neither
TRIALS, BATCH, TRAIN, VALIDATION = 8, 64, 3, 2
WINDOW = 4  # the same for both, and so the same trials
IMPORTS = """
import time
started = time.perf_counter()
import torch, adq.search.run, adq.search.executors.ray
print(time.perf_counter() - started)
"""


class TimedSource:
    """A search that knows how long it was asked and told."""

    def __init__(self, loop: StudyLoop) -> None:
        self._loop, self.seconds = loop, 0.0

    @property
    def done(self) -> bool:
        return self._loop.done

    def ask(self) -> Job | None:
        started = time.perf_counter()
        job = self._loop.ask()
        if job is not None:
            self.seconds += time.perf_counter() - started
        return job

    def tell(self, job: Job, record: Record) -> Record:
        started = time.perf_counter()
        record = self._loop.tell(job, record)
        self.seconds += time.perf_counter() - started
        return record


def ray_part(trials: int = TRIALS) -> dict[str, Any]:
    imported = subprocess.run(
        [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True
    )
    from adq.search.executors.ray import RayExecutor

    with tempfile.TemporaryDirectory() as out:
        os.environ.setdefault("RAY_TMPDIR", out)
        config = configuration(out, 2, trials)
        problem = make_problem(config, task())
        fp32 = problem.initial_model
        ranges = problem.input_ranges(fp32)
        runs, timings = [], dict[str, float]()
        with RayExecutor(config) as cluster:
            timings |= cluster.timings
            for number, workers in enumerate(ORDER):
                config = configuration(out, workers, trials, f"run-{number}")
                folder, of_run = new_study(replace(problem, config=config))
                files = FolderFiles(folder.path)
                bench = Bench(of_run, fp32, ranges, files, FolderFiles(folder.path / "going"))
                with (
                    RayExecutor(config) as executor,
                    open_loop(folder, of_run, proposals_of(of_run, lattice_of(of_run))) as loop,
                ):
                    runs.append(one_run(executor, loop, bench, workers))
                    loop.close()
                if not number:
                    timings |= {k: executor.timings[k] for k in ("send", "first", "load")}
    return {
        "runs": runs,
        "start": {"import": float(imported.stdout), **timings},
        "driver_cpu_s_per_trial": mean(run["driver_cpu_s_per_trial"] for run in runs),
        "search_s_per_trial": mean(run["search_s_per_trial"] for run in runs),
    }


def one_run(executor: Any, loop: StudyLoop, bench: Bench, workers: int) -> dict[str, Any]:
    """Trials per hour from when every worker has done one: as many of each then."""
    source, told = TimedSource(loop), list[tuple[float, Record]]()
    executor.run(source, bench, lambda record: told.append((time.perf_counter(), record)))
    errors = [record.error for _, record in told if record.error is not None]
    if errors or len(told) != bench.problem.config.trials:
        raise AssertionError(f"{len(told)} trials; errors: {errors}")
    seconds = told[-1][0] - told[workers - 1][0]
    return {
        "workers": workers,
        "trials": len(told),
        "trial_s": median(record.seconds for _, record in told),
        "trials_per_hour": 3600 * (len(told) - workers) / seconds,
        "driver_cpu_s_per_trial": executor.timings["driver"] / executor.timings["trainings"],
        "search_s_per_trial": source.seconds / len(told),
    }


def configuration(out: str | Path, workers: int, trials: int, name: str = "scaling") -> StudyConfig:
    return StudyConfig(
        task="resnet20",
        budget_bits=4.0,
        trials=trials,
        epochs=1,
        executor="ray",
        workers=workers,
        cpus_per_trial=1,
        window=WINDOW,
        device="cpu",
        study=name,
        out=str(out),
    )


def task() -> Task:
    """ResNet-20 on random images of 32x32 pixels: what counts is how long it takes."""
    generator = torch.Generator().manual_seed(0)

    def batches(count: int) -> list[Batch]:
        return [
            (torch.randn(BATCH, 3, 32, 32, generator=generator), torch.arange(BATCH) % 10)
            for _ in range(count)
        ]

    return Task(ResNet20, F.cross_entropy, batches(TRAIN), batches(VALIDATION), batches(1))
