"""The tasks of `studies/models`, so small that a search takes seconds; called at the root."""

from typing import Any

import adq
from adq.search.task import import_from_here


def vit() -> adq.Task:
    return _task("vit", width=16, blocks=2, train_size=128, epochs=2)


def audio() -> adq.Task:
    return _task("audio", width=4, sizes=(128, 64, 64), epochs=2)


def detector() -> adq.Task:
    return _task("detector", width=0.25, channels=8, sizes=(40, 16, 16), epochs=1)


def _task(name: str, **size: Any) -> adq.Task:
    task = import_from_here("task", f"studies.models.{name}:make_task")(**size)
    assert isinstance(task, adq.Task)
    return task
