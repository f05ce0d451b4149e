"""A bench and jobs for tests of executors."""

from pathlib import Path
from typing import Any

import tiny_task

from adq.quant.batches import seeded
from adq.search.candidate import Record
from adq.search.config import StudyConfig
from adq.search.files import FolderFiles
from adq.search.jobs import Bench, Job
from adq.search.problem import make_problem
from adq.search.task import Task


def bench_of(folder: Path, task: Task | None = None, **options: Any) -> Bench:
    """A bench whose FP32 model is not trained: its files and checkpoints are under `folder`."""
    config = StudyConfig(
        task="python", **{"budget_bits": 4.0, "bits": (2, 3, 4), "device": "cpu"} | options
    )
    task = task or tiny_task.make_task()
    problem = make_problem(config, task)
    with seeded(0):
        fp32 = task.model()
    return Bench(
        problem,
        fp32,
        problem.input_ranges(fp32),
        FolderFiles(folder / "files"),
        FolderFiles(folder / "checkpoints"),
    )


def jobs_of(bench: Bench, count: int, **options: Any) -> list[Job]:
    """Jobs 0000, 0001, ... with 2, 3, 4, 2, ... bits."""
    space = bench.problem.space
    return [
        Job(f"{i:04d}", space.bit_vector(space.uniform(2 + i % 3)), **options) for i in range(count)
    ]


def results(record: Record) -> dict[str, Any]:
    """All of a record that does not depend on how long it took."""
    data = record.to_json()
    del data["seconds"]
    for rung in data["rungs"]:
        del rung["seconds"]
    return data
