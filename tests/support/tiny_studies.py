"""Studies of the tiny task, what they leave, and ways to disturb them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task

from adq.search import jobs
from adq.search.config import StudyConfig
from adq.search.folder import StudyFolder, open_study
from adq.search.front import Front, Point
from adq.search.observer import Observer
from adq.search.run import start
from adq.search.task import Task

BUDGET = 4.2
OPTIONS: dict[str, Any] = {
    "task": "tiny_task:make_task",
    "budget_bits": BUDGET,
    "bits": (2, 3, 4, 8),
    "seed": 1,
    "trials": 8,  # five seeds and three proposals
    "epochs": 0,
    "final_epochs": 1,
    "lr": 1e-4,
    "study": "s",
}
QUICK = {"trials": 3, "final_epochs": 0}
INTERRUPTED = {"trials": 4, "final_epochs": 0}


class Listener(Observer):
    """Keeps what it hears: (stage, announced steps, notes of its steps)."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, list[str]]] = []
        self.bests: list[str] = []
        self.messages: list[str] = []
        self.more: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total, []))

    def step(self, note: str = "") -> None:
        self.stages[-1][2].append(note)

    def best(self, text: str) -> None:
        self.bests.append(text)

    def note(self, text: str) -> None:
        self.more.append(text)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def notes(self, stage: str) -> list[str]:
        return next((notes for name, _, notes in self.stages if name == stage), [])


def config(out: Path, **options: Any) -> StudyConfig:
    return StudyConfig(**OPTIONS | {"out": str(out)} | options)


@dataclass
class Study:
    folder: StudyFolder
    front: Front
    heard: Listener


def study_in(out: Path, task: Task | None = None, **options: Any) -> Study:
    heard = Listener()
    front = start(config(out, **options), task or tiny_task.make_task(), heard)
    return Study(open_study(out, front.study), front, heard)


def all_points(front: Front) -> tuple[Point, ...]:
    return front.points + front.uniform


def objectives_of(study: Study) -> list[str]:
    return json.loads(study.folder.file("results.json").read_text())["objectives"]


def raw(study: Study, kind: str) -> dict[str, dict[str, Any]]:
    """The records as they are on disk, without the seconds."""
    found = {}
    for path in sorted((study.folder.path / kind).glob("*.json")):
        found[path.stem] = record = json.loads(path.read_text())
        seconds = [rung.pop("seconds") for rung in record["rungs"]]
        assert record.pop("seconds") == sum(seconds) > 0
    return found


class Stop(BaseException):
    """The process ends here."""


def stop_at(patch: pytest.MonkeyPatch, module: Any, name: str, call: int, after: bool) -> None:
    """End the process in a call of a function, before or after its work."""
    function, calls = getattr(module, name), [0]

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            raise Stop
        result = function(*args, **kwargs)
        if calls[0] == call:
            raise Stop
        return result

    patch.setattr(module, name, stopping)


def failing(select: Callable[[str], bool]) -> Callable[..., Any]:
    """train_candidate, but those selected by id fail as if their loss had become nan."""
    train = jobs.train_candidate

    def train_or_fail(*args: Any, id: str, **kwargs: Any) -> Any:
        record = train(*args, id=id, **kwargs)
        if select(id):
            error = f"the training loss of {id} became nan"
            return replace(record, validation=None, test=None, weights=None, error=error)
        return record

    return train_or_fail


def graded(sign: Callable[[str], int]) -> Callable[..., Any]:
    """train_candidate, but more bits are better where the id's sign is 1, and worse where -1."""
    train = jobs.train_candidate

    def train_and_grade(*args: Any, id: str, **kwargs: Any) -> Any:
        record = train(*args, id=id, **kwargs)
        metric = 0.5 + sign(id) * record.costs.average_bits / 100
        return replace(record, validation=replace(record.validation, metric=metric))

    return train_and_grade
