"""What a run by Ray Tune hears: trainings given up, nodes too small, records for TensorBoard."""

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayError
from ray.tune.logger import TBXLoggerCallback

from adq.search.executors.join import living_nodes
from adq.search.executors.searcher import DriverOnly, Search
from adq.search.executors.shares import room
from adq.search.executors.trainable import name_of

LOOK_S, FULL_S = 10.0, 60.0
_NO_MEMORY = re.compile(r"low on memory|OutOfMemory|out of memory|OUT_OF_MEMORY|OOM kill reason")
_MEMORY = re.compile(r"Memory on the node \(IP: ([^,]+).*?was (\S+) used / (\S+) limit")
_LOST = re.compile(r"node has died|node .{0,80}(died|dead)|temporarily unavailable|rpc_code", re.I)
LOSSES = 10
"""How often a training may lose its node before that counts as its own death."""

log = logging.getLogger(__name__)


class Deaths(DriverOnly, tune.Callback):
    """Hears of trials that Tune gives up, and why; counts deaths anew after each epoch done.

    An epoch done over again does not count, else a training that keeps no checkpoints could die
    for ever. That a node or the way to it was lost says nothing of the training, and is not counted
    LOSSES times, unless it comes after all other tries, when Tune does not ask.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._epochs: dict[str, int] = {}
        self._losses: Counter[str] = Counter()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        epoch = result.get("epoch", 0)
        if epoch > self._epochs.get(trial.trial_id, 0):
            self._epochs[trial.trial_id] = epoch
            trial.run_metadata.num_failures = 0

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = _last(_failures(trial))
        if _LOST.search(last) and not _NO_MEMORY.search(last):
            self._losses[trial.trial_id] += 1
            if self._losses[trial.trial_id] <= LOSSES:
                trial.run_metadata.num_failures -= 1

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        text = _failures(trial)
        started = trial.run_metadata.start_time
        seconds = 0.0 if started is None else time.time() - started
        self._search.fail(trial.trial_id, _death(text), seconds)


def _failures(trial: Any) -> str:
    """Tune's reports of a trial's failures."""
    path = trial.error_file
    return Path(path).read_text() if path and os.path.exists(path) else ""


def _last(text: str) -> str:
    return text.rpartition("Failure # ")[2].partition("\n")[2]


def _death(text: str) -> str:
    """The last of Tune's reports of failures, in one line; what to do where memory ran out."""
    last = _last(text)
    if _NO_MEMORY.search(last.partition("Some common causes")[0]):
        found = _MEMORY.search(last)
        where = "" if found is None else " ({}: {} of {} used)".format(*found.groups())
        return (
            f"out of memory: Ray ended it, as its node's ran out{where}; run fewer at a time "
            "there (--cpus-per-trial, --workers), or load less data or smaller batches"
        )
    for mark in ("Worker exit detail:", "The actor died because", "Error:"):
        if mark in last:
            last = last.rpartition(mark)[2]
            break
    known, causes, _ = last.partition("Some common causes")
    hint = " (if 'dmesg' on its node says 'oom-kill', memory ran out: run fewer at a time there)"
    return (" ".join(known.split())[:200] or "unknown") + (hint if causes else "")


class Room(DriverOnly, tune.Callback):
    """Says when the living nodes have had no room for a training for a minute."""

    def __init__(self, ranks: int, cpus: int, gpus: float) -> None:
        self._needs = ranks, cpus, gpus
        self._next_look, self._since, self._told = 0.0, 0.0, False

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        ranks, cpus, gpus = self._needs
        with suppress(RayError):
            nodes = living_nodes()
            if room(nodes, cpus, gpus) >= ranks:
                self._since, self._told = 0.0, False
                return
            self._since = self._since or now
            if now - self._since >= FULL_S and not self._told:
                self._told = True
                log.warning(
                    "the Ray cluster has had no room for a training for a minute: its %d living "
                    "nodes are too small; the study goes on when nodes are added",
                    len(nodes),
                )


class Board(DriverOnly, TBXLoggerCallback):
    """TensorBoard's event files, straight in the study's folder; what cannot be written is let
    go of, since no result depends on it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder, self._told = folder, False

    def log_trial_start(self, trial: Any) -> None:
        with self._optional():
            if trial in self._trial_writer:
                self._trial_writer[trial].close()
            writer = self._summary_writer_cls(str(self._folder / name_of(trial)), flush_secs=30)
            self._trial_writer[trial], self._trial_result[trial] = writer, {}

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        if trial in self._trial_writer:
            with self._optional():
                super().log_trial_result(iteration, trial, result)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        with self._optional():
            super().log_trial_end(trial, failed)

    @contextmanager
    def _optional(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._told:
                log.warning("no records for TensorBoard: %s", error)
            self._told = True
