"""Trainings by Ray Tune on a real Ray of this machine: what comes of them, whatever dies."""

import functools
import logging
import os
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
import watched_task
from jobs_to_do import JobsToDo
from ray.air.execution._internal import RayActorManager
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayError
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray_cluster import wait_until
from torch import Tensor
from trainings import bench_of, jobs_of, results

from adq.quant.errors import InputError
from adq.search.candidate import Record
from adq.search.config import StudyConfig
from adq.search.executors.local import LocalExecutor
from adq.search.executors.parcel import pack, unpack
from adq.search.executors.ray import (
    RayExecutor,
    _death,
    _Deaths,
    _killed,
    _Room,
    _Search,
    room,
    shares,
)
from adq.search.executors.served import serve
from adq.search.jobs import TRIES, Bench, Job

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # Ray's own sockets and logs
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        patch.setenv("RAY_TMPDIR", folder)  # short: sockets' paths have limits
        patch.setenv("RAY_worker_niceness", "0")  # beside other tests they would starve
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        config = StudyConfig(task="python", budget_bits=4.0, device="cpu", workers=2)
        with RayExecutor(config, "test") as executor:
            yield executor


@pytest.fixture
def watched(tmp_path: Path) -> Bench:
    return bench_of(tmp_path, watched_task.make_task(tmp_path))


def run_here(bench: Bench, jobs: list[Job]) -> dict[str, Record]:
    source = JobsToDo(jobs)
    LocalExecutor().run(source, bench, lambda _: None)
    return source.records


def test_records_are_those_of_the_local_executor(
    executor: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = 0.5

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:  # a closure: no worker can import it
        return scale * F.cross_entropy(outputs, targets)

    task = replace(watched_task.make_task(tmp_path), loss=loss)
    bench = bench_of(tmp_path, task)
    jobs = jobs_of(bench, 5, epochs=2, keep=True)
    jobs.append(replace(jobs[0], id="0005", parent="0001", epochs=1))
    jobs.append(replace(jobs[0], id="best", final=True, epochs=1))
    expected = run_here(bench, jobs)
    written = {
        path.relative_to(tmp_path): path.read_bytes()
        for path in tmp_path.glob("files/**/*.safetensors")
    }
    shutil.rmtree(tmp_path / "files" / "models")
    bench = replace(bench, logs=tmp_path / "tune")
    source, heard = JobsToDo(jobs, first=5), []  # the last two wait for weights of earlier ones

    executor.run(source, bench, heard.append)

    assert source.done
    assert sorted(heard, key=lambda r: r.id) == sorted(source.records.values(), key=lambda r: r.id)
    assert {name: results(r) for name, r in source.records.items()} == {
        name: results(r) for name, r in expected.items()
    }
    assert len({record.train_losses for record in heard}) >= 4  # they do differ
    for path, content in written.items():  # but for the order of the metadata, which varies
        found = (tmp_path / path).read_bytes()
        assert len(found) == len(content)
        assert found[8 + int.from_bytes(found[:8], "little") :] == content[-tensor_bytes(content) :]
    assert not list((tmp_path / "checkpoints").glob("*"))

    # torch was imported by two processes for seven jobs, with their threads set before
    lines = watched_task.epochs(tmp_path)
    assert len({line[0] for line in lines}) <= 2
    assert str(os.getpid()) not in {line[0] for line in lines}
    assert {tuple(line[1:]) for line in lines} == {("1", "PASSIVE", "1")}

    # TensorBoard's records say what the records say
    for name, record in source.records.items():
        shown = scalars(tmp_path / "tune" / name)
        assert record.validation is not None
        assert shown["ray/tune/validation/metric"] == pytest.approx([record.validation.metric])
        assert shown["ray/tune/costs/average_bits"] == pytest.approx([record.costs.average_bits])
        assert shown["ray/tune/loss"][: record.epochs] == pytest.approx(record.train_losses)
    assert not list(tmp_path.glob("tune/**/*.pkl"))

    assert executor.timings["trainings"] == 7
    assert all(executor.timings[part] > 0 for part in ("send", "first", "load", "driver"))


def tensor_bytes(content: bytes) -> int:
    """How much of a safetensors file comes after its header."""
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def scalars(folder: Path) -> dict[str, list[float]]:
    """All values of each tag in a folder's event files, by the files' own framing: length (8
    bytes), its checksum (4), a protobuf Event, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append(value.simple_value)
    return found


def test_a_training_goes_on_where_its_process_died_and_is_given_up_after_three_deaths(
    executor: RayExecutor, watched: Bench, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(watched, 3, epochs=3)
    expected = run_here(watched, jobs)
    # in the first training's third epoch, then in all that the second one begins
    (tmp_path / "kill").write_text("3 5 6 7")
    source = JobsToDo(jobs, first=1)

    executor.run(source, watched, lambda _: None)

    assert results(source.records["0000-0"]) == results(expected["0000-0"])
    failed = source.records["0001-0"]
    assert failed.error is not None
    assert failed.error.startswith(f"given up after {TRIES} deaths of its process: ")
    assert failed.validation is None
    assert failed.bits == jobs[1].bits
    assert results(source.records["0002-0"]) == results(expected["0002-0"])
    # 3 epochs and the one that was cut short, 3 deaths, 3 epochs
    assert len(watched_task.epochs(tmp_path)) == 4 + TRIES + 3
    assert "Worker unexpectedly exits" in failed.error
    assert capfd.readouterr() == ("", "")


def test_what_does_not_lie_in_the_candidate_ends_the_run(
    executor: RayExecutor, watched: Bench
) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise InputError("data: expected a disk with room, got a full one")

    task = replace(watched.problem.task, loss=loss)
    bench = replace(watched, problem=replace(watched.problem, task=task))
    source = JobsToDo(jobs_of(bench, 4, epochs=1))

    with pytest.raises(InputError, match=r"^data: expected a disk with room, got a full one$"):
        executor.run(source, bench, lambda _: None)
    assert not source.records


def test_files_of_the_driver_are_reached_through_an_actor(
    executor: RayExecutor, tmp_path: Path
) -> None:
    from adq.search.files import FolderFiles

    class Memory(dict[str, bytes]):  # as a URL: reached by every worker itself
        def read(self, name: str) -> bytes | None:
            return self.get(name)

        def write(self, name: str, content: bytes) -> None:
            self[name] = content

        def remove(self, name: str) -> None:
            del self[name]

    memory = Memory()
    served, same = serve(FolderFiles(tmp_path / "folder"), memory)

    assert same is memory
    assert served.read("a/b") is None
    served.write("a/b", b"\0\1" * 10**6)
    assert (tmp_path / "folder/a/b").read_bytes() == b"\0\1" * 10**6
    assert served.read("a/b") == b"\0\1" * 10**6
    served.remove("a/b")
    assert served.read("a/b") is None

    (tmp_path / "file").touch()
    (through,) = serve(FolderFiles(tmp_path / "file"))
    with pytest.raises(InputError, match=r"^cannot write .*/file/a: File exists$"):
        through.write("a", b"")


def test_a_task_that_cannot_be_sent_or_loaded_is_said_in_one_line(
    executor: RayExecutor, watched: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = watched.problem
    locked = replace(problem.task, train=[threading.Lock()])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"^task 'python' cannot be sent to workers \(TypeError"):
        pack(replace(watched, problem=replace(problem, task=locked)), 1, 1, 0.0)

    module = types.ModuleType("only_the_driver_has_it")
    exec("def loss(outputs, targets):\n    return 0", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    task = replace(problem.task, loss=module.loss)
    parcel = pack(replace(watched, problem=replace(problem, task=task)), 1, 1, 0.0)
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(InputError, match=r"cannot load the task .*only_the_driver_has_it.*submit"):
        unpack(parcel)


def test_an_interrupt_leaves_the_checkpoint_and_no_process(
    executor: RayExecutor, watched: Bench, tmp_path: Path
) -> None:
    """The last one here: it ends this module's Ray."""
    short, long = jobs_of(watched, 2, epochs=1)
    long = replace(long, epochs=50_000)
    source = JobsToDo([long, short])

    def interrupt(record: Record) -> None:
        assert record.id == short.id
        while watched.checkpoints.read(long.name) is None:
            pass
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        executor.run(source, watched, interrupt)
    executor.__exit__()

    assert list(source.records) == [short.name]
    assert watched.checkpoints.read(long.name) is not None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    pids = {line[0] for line in watched_task.epochs(tmp_path)}
    wait_until(lambda: not any(map(alive, pids)), "the end of the workers", 60)


def alive(pid: str) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (1, 1, 1.0)),
        ({"device": "cpu"}, (1, 1, 0.0)),
        ({"cpus_per_trial": 4, "gpus_per_trial": 0.5}, (1, 4, 0.5)),
        ({"gpus_per_trial": 2}, (2, 1, 1.0)),
        ({"gpus_per_trial": 2, "ranks": 1}, (1, 1, 2.0)),
        ({"gpus_per_trial": 1, "ranks": 2, "cpus_per_trial": 6}, (2, 3, 0.5)),
        ({"ranks": 4, "device": "cpu"}, (4, 1, 0.0)),
        ({"ranks": 3, "cpus_per_trial": 2, "device": "cpu"}, (3, 1, 0.0)),
    ],
)
def test_shares_of_a_training(options: dict[str, Any], expected: tuple[int, int, float]) -> None:
    config = StudyConfig(task="python", budget_bits=4.0, **options)
    assert shares(config, [{"CPU": 8, "GPU": 2}, {"CPU": 2}]) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_trial": 9}, "no room for a training with 9 CPUs: its largest node has 8 CPUs"),
        ({"gpus_per_trial": 2}, "no room .* 1 CPUs and 1 GPUs for each of its 2 processes"),
        ({"ranks": 11}, "for each of its 11 processes"),
        ({"device": "cuda"}, "^device cuda: no node of the Ray cluster has a GPU$"),
        ({"gpus_per_trial": 3, "ranks": 2}, "expected whole GPUs, or a share of one"),
    ],
)
def test_what_no_node_has_is_said_at_once(options: dict[str, Any], message: str) -> None:
    config = StudyConfig(task="python", budget_bits=4.0, **options)
    with pytest.raises(InputError, match=message):
        shares(config, [{"CPU": 8.0}, {"CPU": 2.0}])


def test_room_counts_what_fits_into_each_node_alone() -> None:
    nodes = [{"CPU": 3.0, "GPU": 2.0}, {"CPU": 3.0}, {"memory": 1e9}]
    assert room(nodes, 2, 0.0) == 2
    assert room(nodes, 1, 0.0) == 6
    assert room(nodes, 1, 1.0) == 2
    assert room(nodes, 1, 0.1) == 3  # by its CPUs; 2 GPUs would do for 20
    assert room([{"CPU": 100.0, "GPU": 0.3}], 1, 0.1) == 3


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("here", "expected auto or HOST:PORT of a Ray cluster, got 'here'"),
        ("ray://127.0.0.1:10001", "expected auto or HOST:PORT"),
        ("127.0.0.1:{free}", "no Ray cluster answers there .*Connection refused"),
        ("auto", "no Ray cluster runs on this machine"),
    ],
)
def test_a_cluster_that_is_not_there_is_said_in_one_line(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("adq.search.executors.ray.ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(set))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config = StudyConfig(
            task="python",
            budget_bits=4.0,
            address=address.format(free=free.getsockname()[1]),
        )
        with pytest.raises(InputError, match=message), RayExecutor(config):
            pass


def test_a_ray_that_does_not_start_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*given: Any, **options: Any) -> None:  # as ray/_private/node.py does
        raise Exception("The current node timed out during startup.\n\nIt is slow.")

    monkeypatch.setattr("adq.search.executors.ray.ray.is_initialized", lambda: False)
    monkeypatch.setattr("adq.search.executors.ray.ray.init", late)
    config = StudyConfig(task="python", budget_bits=4.0)
    with pytest.raises(
        InputError, match=r"^Ray cannot be started on this machine: .*startup\. It is slow\.$"
    ):
        RayExecutor(config).__enter__()


@pytest.mark.parametrize("kind", [RayError, TuneError])
def test_a_cluster_that_is_lost_is_said_in_one_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, watched: Bench
) -> None:
    def run(*given: Any, **options: Any) -> None:
        raise kind("the head\nis gone")

    executor = RayExecutor(StudyConfig(task="python", budget_bits=4.0))
    executor.ranks, executor.cpus, executor.gpus = 1, 1, 0.0
    executor._parcel = watched, types.SimpleNamespace(ranks=1, cpus=1, gpus=0.0)  # type: ignore[assignment]
    monkeypatch.setattr("adq.search.executors.ray.tune.run", run)
    with pytest.raises(InputError, match=r"^the Ray cluster was lost: the head is gone; look at"):
        executor.run(JobsToDo([]), watched, lambda _: None)


def a_trial(folder: Path) -> Any:
    trial: Any = Trial("train", stub=True, max_failures=TRIES - 1)
    trial.storage = types.SimpleNamespace(trial_driver_staging_path=str(folder))
    trial.set_status(Trial.RUNNING)
    return trial


def deaths_until_given_up(trial: Any, deaths: _Deaths, epochs: list[int]) -> int:
    """How many deaths it takes, where each follows the end of the next of these epochs."""
    for count, epoch in enumerate(epochs, 1):
        if epoch:
            deaths.on_trial_result(0, [], trial, {"epoch": epoch})
        trial.handle_error(TuneError("a node is gone"))
        if not trial.should_recover():
            return count
    return 0


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([0, 0, 0], TRIES),
        ([1, 2, 3, 4, 5, 6], 0),
        ([1, 2, 0, 3, 0, 0], 6),
        ([2, 2, 1, 2], TRIES),  # without a checkpoint, it begins again and comes no further
    ],
)
def test_deaths_are_counted_anew_when_a_training_came_further(
    epochs: list[int], expected: int, watched: Bench, tmp_path: Path
) -> None:
    deaths = _Deaths(_Search(JobsToDo([]), watched, lambda _: None))
    assert deaths_until_given_up(a_trial(tmp_path), deaths, epochs) == expected


def test_a_training_that_is_given_up_tells_for_how_long_it_was_tried(
    watched: Bench, tmp_path: Path
) -> None:
    source = JobsToDo(jobs_of(watched, 1, epochs=1))
    search = _Search(source, watched, lambda _: None)
    trial = a_trial(tmp_path)
    assert search.suggest(trial.trial_id)
    trial.run_metadata.start_time -= 100
    trial.handle_error(TuneError("a node is gone"))
    _Deaths(search).on_trial_error(0, [], trial)
    assert search.error is None
    record = source.records["0000-0"]
    assert record.error == f"given up after {TRIES} deaths of its process: a node is gone"
    assert record.seconds == pytest.approx(100, abs=20)


@pytest.mark.parametrize("error", [OutOfMemoryError("low on memory"), ActorDiedError()])
def test_a_training_that_ray_kills_is_one_death_and_not_the_end_of_the_run(
    error: Exception,
) -> None:
    """Tune raises RuntimeError for the first of them."""
    heard: list[Exception] = []
    actor = types.SimpleNamespace(actor_id=7, _on_error=lambda actor, error: heard.append(error))
    task: Any = types.SimpleNamespace(_tracked_actor=actor, _on_error=None)
    manager: Any = types.SimpleNamespace(
        _failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None
    )
    with _killed():
        RayActorManager._actor_task_failed(manager, tracked_actor_task=task, exception=error)
    assert manager._failed_actor_ids == {7}
    (death,) = heard
    assert isinstance(death, RayActorError)
    assert str(error) in str(death)


RAY_KILLS = """Failure # 1 (occurred at 2026-01-01_00-00-00)
The actor died unexpectedly before finishing this task. Worker unexpectedly exits.
Failure # 2 (occurred at 2026-01-01_00-00-01)
1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, \
ID: 1c69) was 22.67GB used / 23.54GB limit (0.96)
OOM kill reason: Memory usage 1704964096B exceeded threshold of 252760624B (1.0% of 25276063744B)
Top 10 memory users: PID	MEM(GB)	COMMAND
"""
KERNEL_KILLS = """Failure # 3 (occurred at 2026-01-01_00-00-00)
The actor died unexpectedly before finishing this task.
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes \
include: (1) the process was killed by the OOM killer due to high memory usage, (2) ...
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RAY_KILLS, r"^out of memory: .*\(192\.0\.2\.2: 22\.67GB of 23\.54GB used\); run fewer"),
        (KERNEL_KILLS, r"^Worker unexpectedly exits .*End of file\. \(if 'dmesg' on its node says"),
        ("Failure # 1 (occurred at now)\nKeyError: 'weights'\n", r"^'weights'$"),
        ("", "^unknown$"),
    ],
)
def test_a_death_is_told_in_one_line(text: str, expected: str) -> None:
    """Texts as Ray 2.60 writes them."""
    told = _death(text)
    assert re.search(expected, told)
    assert "\n" not in told


def test_a_cluster_without_room_is_told_once_after_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, nodes = [1000.0], [{"Alive": True, "Resources": {"CPU": 1.0}}]
    monkeypatch.setattr("adq.search.executors.ray.time.monotonic", lambda: now[0])
    monkeypatch.setattr("adq.search.executors.ray.ray.nodes", lambda: nodes)
    full = _Room(2, 1, 0.0)

    def told_in(seconds: int) -> list[str]:
        caplog.clear()
        for _ in range(seconds):
            now[0] += 1
            full.on_step_end(0, [])
        return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]

    assert told_in(50) == []
    nodes.append({"Alive": True, "Resources": {"CPU": 1.0}})
    assert told_in(100) == []
    nodes[1]["Alive"] = False
    assert told_in(50) == []
    (line,) = told_in(200)
    assert line.startswith("the Ray cluster has had no room for a training for a minute: its 1 ")
    nodes[1]["Alive"] = True
    assert told_in(100) == []
