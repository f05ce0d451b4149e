"""Ray Tune's Searcher over a `Source`: what is to be trained next, and what came of it."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from adq.quant.errors import InputError
from adq.search.candidate import Record, failed_record
from adq.search.executors.trainable import MISFIT, RECORD, config_of
from adq.search.jobs import TRIES, Bench, Job, Source, hand_in

ASK_S = 0.5


class DriverOnly:
    """Tune pickles what it is given with its state; nothing ever reads that."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (object, ())


class Search(DriverOnly, Searcher):
    """Asks the source and tells it. An error of either ends the run.

    error  which ended it
    first  seconds since 1970 when the first training started, and seconds that its bench took to
           open there
    told   trainings that have ended
    """

    def __init__(self, source: Source, bench: Bench, heard: Callable[[Record], None]) -> None:
        super().__init__()
        self._source, self._bench, self._heard = source, bench, heard
        self._jobs: dict[str, Job] = {}
        self._next_ask = 0.0
        self.error: Exception | None = None
        self.first: tuple[float, float] | None = None
        self.told = 0

    def suggest(self, trial_id: str) -> Any:
        if self.error is not None:
            return self.FINISHED
        if time.monotonic() < self._next_ask:
            return None
        with self._noted():
            job = self._source.ask()
            if job is not None:
                self._jobs[trial_id] = job
                return config_of(job)
            if self._source.done:
                return self.FINISHED
        self._next_ask = time.monotonic() + ASK_S
        return None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error or self.error is not None:
            return  # `fail` gets it, with its reason
        with self._noted():
            found = result or {}
            if MISFIT in found:
                raise InputError(found[MISFIT])
            if self.first is None:
                self.first = found["started"], found["load"]
            self._tell(trial_id, Record.from_json(json.loads(found[RECORD])))

    def fail(self, trial_id: str, reason: str, seconds: float) -> None:
        """Tell that the training was given up, so long after it first began."""
        with self._noted():
            job = self._jobs[trial_id]
            text = f"given up after {TRIES} deaths of its process: {reason}"
            problem = self._bench.problem
            record = failed_record(problem, job.bits, job.id, job.epochs, text, seconds)
            self._tell(trial_id, record)

    def _tell(self, trial_id: str, record: Record) -> None:
        job = self._jobs.pop(trial_id)
        record = hand_in(self._source, self._bench, job, record)
        self.told += 1
        self._next_ask = 0.0
        self._heard(record)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (Tune would take it for the trial's)
            self.error = error

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's own storage knows it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called, since nothing is saved."""


class Stop(DriverOnly, tune.Stopper):
    """Ends all trainings once the search has met an error."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._search.error is not None
