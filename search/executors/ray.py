"""Trainings on a Ray cluster, by Ray Tune: one Tune trial for each training.

What is to be trained comes from a `Source`, through a Searcher of our own:

- Tune's OptunaSearch would ask a study of its own. It knows no constraints, passes over errors when
  it tells a result, and tells stopped trials as completed.
- The ladder of fidelities is in the source, not in a Tune scheduler, so that the same trials are
  promoted under every executor; and a rung is a training of its own, with its own learning rates,
  where a scheduler would go on from a shorter one's last epoch.
- Checkpoints are written by the training, not handed to Tune: a study may go on under another
  executor, and a new driver must find them without Tune's state, which is thrown away.

Errors of the user's code end inside `run_job`. What Tune sees is the death of a process or a node:
it starts the trial again, and the training goes on from its last checkpoint.
"""

import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import ray
from ray import tune
from ray.air.execution._internal import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.error import TuneError

from adq.quant.errors import InputError
from adq.search.candidate import Record
from adq.search.config import StudyConfig
from adq.search.executors.callbacks import Board, Deaths, Room
from adq.search.executors.distributed import resources
from adq.search.executors.join import connect, environment, living_nodes, message_of
from adq.search.executors.parcel import Parcel, pack
from adq.search.executors.searcher import Search, Stop
from adq.search.executors.shares import room, shares
from adq.search.executors.trainable import name_of, trainable_of
from adq.search.jobs import TRIES, Bench, Source

TUNE_ENV = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the old output can be silenced
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else Tune would end as if all were done
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # it warns, or fails, when nothing has run for so long: as while another driver does the rest
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1e9",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S_AUTOSCALER": "1e9",
}


class RayExecutor(AbstractContextManager["RayExecutor"]):
    """Many trainings at a time, in processes of a Ray cluster that import torch once each.

    With --address the cluster is that one, else one on this machine that ends with the block.

    name     which Ray shows beside what runs for it
    workers  how many trainings there may be at a time
    timings  seconds: `connect`, `send` (pickling the bench and storing it), `first` (from there
             until the first training starts: its process, torch), `load` (opening the bench
             there); `driver` is the CPU time of this process while it ran so many `trainings`

    Raises InputError for a cluster that cannot be reached, or that has no room for one training.
    """

    def __init__(self, config: StudyConfig, name: str = "adq") -> None:
        self.config, self.name = config, name
        self.workers = 0
        self.timings: dict[str, float] = {}
        self._ours = False
        self._parcel: tuple[Bench, Parcel] | None = None

    def __enter__(self) -> "RayExecutor":
        started = time.monotonic()
        if not ray.is_initialized():
            connect(self.config, self.name)
            self._ours = True
        self.timings["connect"] = time.monotonic() - started
        try:
            nodes = living_nodes()
            self.ranks, self.cpus, self.gpus = shares(self.config, nodes)
            self.workers = self.config.workers or room(nodes, self.cpus, self.gpus) // self.ranks
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            ray.shutdown()
        self._ours, self._parcel = False, None

    def run(self, source: Source, bench: Bench, heard: Callable[[Record], None]) -> None:
        """Run all jobs of a source until it is done; `heard` gets each record.

        In `bench.logs` each training gets a folder for TensorBoard's event files.

        Raises InputError where a training meets what does not lie in its candidate, or where the
        cluster is lost, and whatever `source` and `heard` raise.
        """
        parcel = self._send(bench)
        started, used = time.time(), time.process_time()
        search = Search(source, bench, heard)
        callbacks: list[Any] = [Deaths(search), Room(parcel.ranks, parcel.cpus, parcel.gpus)]
        if bench.logs is not None:
            callbacks.append(Board(bench.logs))
        trainable = tune.with_resources(
            trainable_of(parcel),
            tune.PlacementGroupFactory([resources(parcel.cpus, parcel.gpus)])
            if parcel.ranks == 1
            else tune.PlacementGroupFactory([{"memory": 1}]),  # a byte; Tune wants something
        )
        with (
            _quiet_tune(),
            _killed(),
            _lost(search),
            tempfile.TemporaryDirectory(prefix="adq-") as scratch,
        ):
            tune.run(
                trainable,
                name=f"{self.name}-{os.getpid()}",
                storage_path=scratch,
                search_alg=search,
                num_samples=-1,
                max_concurrent_trials=self.workers,
                reuse_actors=True,
                max_failures=TRIES - 1,
                raise_on_failed_trial=False,
                stop=Stop(search),
                callbacks=callbacks,
                trial_name_creator=name_of,
                trial_dirname_creator=name_of,
                verbose=0,
            )
        if search.error is not None:
            raise search.error
        self._note(search, started, time.process_time() - used)

    def _send(self, bench: Bench) -> Parcel:
        if self._parcel is None or self._parcel[0] is not bench:
            started = time.monotonic()
            self._parcel = bench, pack(bench, self.ranks, self.cpus, self.gpus)
            self.timings["send"] = time.monotonic() - started
        return self._parcel[1]

    def _note(self, search: Search, started: float, used: float) -> None:
        times = self.timings
        if search.first is not None and "first" not in times:
            times["first"] = search.first[0] - started
            times["load"] = search.first[1]
        times["driver"] = times.get("driver", 0.0) + used
        times["trainings"] = times.get("trainings", 0) + search.told


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune without its tables, logs, signal handlers and files, for the time of a run."""
    loggers = {name: logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")}
    levels = {name: logger.level for name, logger in loggers.items()}
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGUSR1)
    for logger in loggers.values():
        logger.setLevel(logging.CRITICAL)
    try:
        with environment(TUNE_ENV):
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        if main:
            signal.signal(signal.SIGUSR1, handler)


@contextmanager
def _killed() -> Iterator[None]:
    """Whatever Ray says of a process that it ended is that process's death.

    Tune itself ends the whole run when Ray's memory monitor kills a training: it knows no other
    errors than RayActorError and RayTaskError.
    """
    failed = RayActorManager._actor_task_failed

    def failed_as_actor(manager: Any, tracked_actor_task: Any, exception: Exception) -> None:
        known = isinstance(exception, RayActorError | RayTaskError)
        if isinstance(exception, RayError) and not known:
            id = tracked_actor_task._tracked_actor.actor_id
            exception = RayActorError(str(id), f"{type(exception).__name__}: {exception}")
        failed(manager, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed_as_actor  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = failed  # type: ignore[method-assign]


@contextmanager
def _lost(search: Search) -> Iterator[None]:
    """Ray's own errors in one line, after what the source or a training had to say."""
    try:
        yield
    except (RayError, TuneError) as error:
        if search.error is None:
            raise InputError(
                f"the Ray cluster was lost: {message_of(error)[:300]}; look at its nodes with "
                "'adq-search doctor --address', and start the study again: it goes on"
            ) from error
