"""Trainings by Ray Tune on a real Ray of this machine: what comes of them, whatever dies."""

import os
import shutil
import signal
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
from ray_cluster import wait_until
from torch import Tensor
from trainings import bench_of, jobs_of, results

from adq.quant.errors import InputError
from adq.search.candidate import Record
from adq.search.config import StudyConfig
from adq.search.executors.local import LocalExecutor
from adq.search.executors.parcel import pack, unpack
from adq.search.executors.ray import RayExecutor, _killed
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
