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

import importlib.metadata
import json
import logging
import os
import platform
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.air.execution._internal import RayActorManager
from ray.exceptions import AuthenticationError, RayActorError, RayError, RayTaskError
from ray.tune.error import TuneError
from ray.tune.logger import TBXLoggerCallback
from ray.tune.search import Searcher

from adq.quant.errors import InputError
from adq.quant.spec import BitVector
from adq.search.candidate import Record, failed_record
from adq.search.config import StudyConfig
from adq.search.executors.distributed import resources, train_together
from adq.search.executors.parcel import Parcel, pack, unpack
from adq.search.jobs import TRIES, Bench, Job, Source, hand_in, run_job

ASK_S, REACH_S = 0.5, 5.0
LOOK_S, FULL_S = 10.0, 60.0
RECORD, MISFIT = "record", "misfit"
JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray keeps what a submitted job was given, in the job's environment."""

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
_NO_MEMORY = re.compile(r"low on memory|OutOfMemory|out of memory|OUT_OF_MEMORY|OOM kill reason")
_MEMORY = re.compile(r"Memory on the node \(IP: ([^,]+).*?was (\S+) used / (\S+) limit")
log = logging.getLogger(__name__)


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
            _connect(self.config, self.name)
            self._ours = True
        self.timings["connect"] = time.monotonic() - started
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
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
        search = _Search(source, bench, heard)
        callbacks: list[Any] = [_Deaths(search), _Room(parcel.ranks, parcel.cpus, parcel.gpus)]
        if bench.logs is not None:
            callbacks.append(_Board(bench.logs))
        trainable = tune.with_resources(
            _trainable(parcel),
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
                stop=_Stop(search),
                callbacks=callbacks,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
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

    def _note(self, search: "_Search", started: float, used: float) -> None:
        times = self.timings
        if search.first is not None and "first" not in times:
            times["first"] = search.first[0] - started
            times["load"] = search.first[1]
        times["driver"] = times.get("driver", 0.0) + used
        times["trainings"] = times.get("trainings", 0) + search.told


def room(nodes: Sequence[Mapping[str, float]], cpus: int, gpus: float) -> int:
    """How many processes with so many CPUs and GPUs fit into nodes with such resources."""
    return sum(
        min(
            int(node.get("CPU", 0) // cpus),
            int(node.get("GPU", 0) / gpus + 1e-9) if gpus else 2**31,
        )
        for node in nodes
    )


def shares(config: StudyConfig, nodes: Sequence[Mapping[str, float]]) -> tuple[int, int, float]:
    """(ranks, CPUs of each, GPUs of each) of a training.

    cpus-per-trial and gpus-per-trial are shared out among the ranks. Each gets whole CPUs, and at
    least one: 3 ranks with 2 CPUs take 3.

    Raises InputError where the nodes have no room for one.
    """
    most = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in ("CPU", "GPU")}
    ranks = config.ranks or max(1, int(config.gpus_per_trial or 1))
    together = config.gpus_per_trial or float(ranks if most["GPU"] else 0)
    if config.device == "cpu":
        together = 0.0
    cpus, gpus = max(1, (config.cpus_per_trial or 1) // ranks), together / ranks
    if gpus > 1 and gpus != int(gpus):
        raise InputError(
            f"gpus-per-trial: expected whole GPUs, or a share of one, for each of {ranks} "
            f"processes, got {together:g}"
        )
    if config.device.startswith("cuda") and not gpus:
        raise InputError(f"device {config.device}: no node of the Ray cluster has a GPU")
    if room(nodes, cpus, gpus) < ranks:
        wanted = f"{cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        many = f" for each of its {ranks} processes" if ranks > 1 else ""
        raise InputError(
            f"the Ray cluster has no room for a training with {wanted}{many}: its largest node has "
            f"{most['CPU']:g} CPUs and {most['GPU']:g} GPUs; lower --cpus-per-trial, "
            "--gpus-per-trial or --ranks, or add nodes"
        )
    return ranks, cpus, gpus


def _log_messages(data: Mapping[str, Any], **_: Any) -> None:
    log.info("Ray: %s", " ".join(map(str, data.get("lines", ()))))


def _connect(config: StudyConfig, name: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # else it prints on stdout of every worker that dies, which no option of Ray's turns off
    ray._private.worker.print_to_stdstream = _log_messages  # type: ignore[assignment]
    address = None if config.address == "local" else config.address
    env = _worker_env(config)
    options: dict[str, Any] = {
        "namespace": f"adq-{name}",
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    if address not in (None, "auto"):
        reach(address)
    try:
        with _silence():
            if address is None:  # workers get what this process has, and those kept ready serve
                with _environment(env):
                    ray.init("local", include_dashboard=False, **options)
            else:
                ray.init(address, runtime_env={"env_vars": env}, **options)
    except AuthenticationError as error:
        raise InputError(
            f"address: the Ray cluster wants a token ({_one_line(error)[:120]})"
        ) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 (Ray raises plain Exceptions, too)
        with suppress(Exception):
            ray.shutdown()
        raise InputError(reason_of(address, error)) from None


@contextmanager
def _silence() -> Iterator[None]:
    """Without what Ray's native code writes to stderr while it tries to connect."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def reach(address: str | None) -> None:
    """InputError where nothing listens: Ray itself tries for two minutes, then ends the process."""
    host, _, port = (address or "").rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise InputError(f"address: expected auto or HOST:PORT of a Ray cluster, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"address {address}: no Ray cluster answers there ({error}); start one with 'ray start "
            "--head', or leave out --address for this machine alone"
        ) from None


def reason_of(address: str | None, error: BaseException) -> str:
    text = _one_line(error)
    if address is None:
        return f"Ray cannot be started on this machine: {text[:300]}"
    if "Version mismatch" in text or "version mismatch" in text:
        mine = f"Ray {importlib.metadata.version('ray')}, Python {platform.python_version()}"
        return (
            f"address {address}: the cluster's versions are others than here ({mine}): {text[:300]}"
        )
    if "find any running Ray instance" in text:
        return (
            f"address {address}: no Ray cluster runs on this machine; start one with 'ray start "
            "--head', or give its HOST:PORT"
        )
    if "Failed to connect to Ray cluster" in text:
        return (
            f"address {address}: something answers there but does not let this process in; check "
            "RAY_AUTH_MODE and RAY_AUTH_TOKEN, and that the port is the cluster's own (6379)"
        )
    return (
        f"address {address}: cannot join the Ray cluster: {text[:300]}; this machine must be one "
        "of its nodes, or use 'adq-search submit'"
    )


def _worker_env(config: StudyConfig) -> dict[str, str]:
    """What workers find in their environment before they import torch."""
    ranks = config.ranks or max(1, int(config.gpus_per_trial or 1))
    wanted = {
        "OMP_NUM_THREADS": str(max(1, (config.cpus_per_trial or 1) // ranks)),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin cost a factor of ten on shared cores
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # no GPUs are seen by those who asked for none
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    }
    job = json.loads(os.environ.get(JOB_ENV, "{}")).get("runtime_env") or {}
    given = job.get("env_vars") or {}  # Ray refuses to have one given twice
    return {name: value for name, value in wanted.items() if name not in given}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
        with _environment(TUNE_ENV):
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
def _lost(search: "_Search") -> Iterator[None]:
    """Ray's own errors in one line, after what the source or a training had to say."""
    try:
        yield
    except (RayError, TuneError) as error:
        if search.error is None:
            raise InputError(
                f"the Ray cluster was lost: {_one_line(error)[:300]}; look at its nodes with "
                "'adq-search doctor --address', and start the study again: it goes on"
            ) from error


def _trainable(parcel: Parcel) -> Callable[[dict[str, Any]], None]:
    """What Tune runs on a worker: one training, its record in the last report."""

    def train(config: dict[str, Any]) -> None:
        _train(config, parcel)

    return train


def _train(config: dict[str, Any], parcel: Parcel) -> None:
    started = time.time()
    job = _job(config)
    try:
        bench = unpack(parcel)
        opened = time.time()
        attempt = partial(train_together, parcel, job) if parcel.ranks > 1 else None
        record = run_job(bench, job, _report, attempt)
    except InputError as error:
        tune.report({MISFIT: str(error)})
        return
    tune.report(
        _metrics(record)
        | {RECORD: json.dumps(record.to_json()), "started": started, "load": opened - started}
    )


def _report(epoch: int, loss: float) -> None:
    tune.report({"epoch": epoch, "loss": loss})


def _metrics(record: Record) -> dict[str, Any]:
    """What TensorBoard shows of a record."""
    found: dict[str, Any] = {"epoch": record.epochs, "seconds": record.seconds}
    if record.train_losses:
        found["loss"] = record.train_losses[-1]
    for split in ("validation", "test"):
        if (evaluation := getattr(record, split)) is not None:
            found[split] = {"loss": evaluation.loss, "metric": evaluation.metric}
    return found | {"costs": {k: v for k, v in asdict(record.costs).items() if v is not None}}


def _config(job: Job) -> dict[str, Any]:
    """The job as Tune's hyperparameters."""
    values = asdict(replace(job, bits=BitVector({}))) | {"bits": job.bits.to_json()}
    return {name: value for name, value in values.items() if value is not None}


def _job(config: dict[str, Any]) -> Job:
    return Job(**config | {"bits": BitVector.from_json(config["bits"])})


def _name(trial: Any) -> str:
    return _job(trial.config).name


class _Driver:
    """Tune pickles what it is given with its state; nothing ever reads that."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (object, ())


class _Search(_Driver, Searcher):
    """Asks the source and tells it. An error of either ends the run."""

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
                return _config(job)
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


class _Stop(_Driver, tune.Stopper):
    def __init__(self, search: _Search) -> None:
        self._search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._search.error is not None


class _Deaths(_Driver, tune.Callback):
    """Hears of trials that Tune gives up, and why; counts deaths anew after each epoch done.

    An epoch done over again does not count, else a training that keeps no checkpoints could die
    for ever.
    """

    def __init__(self, search: _Search) -> None:
        self._search = search
        self._epochs: dict[str, int] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        epoch = result.get("epoch", 0)
        if epoch > self._epochs.get(trial.trial_id, 0):
            self._epochs[trial.trial_id] = epoch
            trial.run_metadata.num_failures = 0

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        path = trial.error_file
        text = Path(path).read_text() if path and os.path.exists(path) else ""
        started = trial.run_metadata.start_time
        seconds = 0.0 if started is None else time.time() - started
        self._search.fail(trial.trial_id, _death(text), seconds)


class _Room(_Driver, tune.Callback):
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
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
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


def _death(text: str) -> str:
    """The last of Tune's reports of failures, in one line; what to do where memory ran out."""
    last = text.rpartition("Failure # ")[2].partition("\n")[2]
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


class _Board(_Driver, TBXLoggerCallback):
    """TensorBoard's event files, straight in the study's folder; what cannot be written is let
    go of, since no result depends on it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder, self._told = folder, False

    def log_trial_start(self, trial: Any) -> None:
        with self._optional():
            if trial in self._trial_writer:
                self._trial_writer[trial].close()
            writer = self._summary_writer_cls(str(self._folder / _name(trial)), flush_secs=30)
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
