"""What is sent to a cluster, and what comes back: commands, packages and archives, without one."""

import hashlib
import io
import os
import random
import shlex
import subprocess
import tarfile
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq.quant.errors import InputError
from adq.search.config import OPTIONS, make_config
from adq.search.executors import fetch as fetching
from adq.search.executors import job_server, package, submit
from adq.search.executors.fetch import (
    LINE_BYTES,
    Unpacker,
    _extract,
    _may_replace,
    _put,
    fetch,
    pack,
)
from adq.search.executors.job_server import (
    PATIENCE_S,
    Job,
    JobServer,
    _about_token,
    job_server_url,
)
from adq.search.executors.package import write_package
from adq.search.executors.submit import (
    check_version,
    new_study,
    outcome,
    remote_path,
    resumed_study,
    send,
    shell_path,
)

BUDGET = {"budget_bits": 3.0}


def words(command: str, home: str = "/home/ray") -> list[str]:
    """The words that adq-search gets, as a shell takes the command apart."""
    called = command.replace("exec adq-search", "printf '%s\\0'").replace(
        "adq-search sent-by", "true"
    )
    done = subprocess.run(
        ["/bin/sh", "-c", called], env={"HOME": home}, capture_output=True, check=True
    )
    return done.stdout.decode().split("\0")[:-1]


def options(command: str) -> dict[str, str]:
    found = words(command)
    pairs = dict(zip(found[::2], found[1::2], strict=True))
    return {name.removeprefix("--"): value for name, value in pairs.items()}


def test_the_command_says_the_same_options_and_lets_ray_run_the_trainings(tmp_path: Path) -> None:
    values = {
        "budget_bits": 2.8, "bits": (2, 4), "rungs": (0, 1), "layers": "fc=4+8/8", "lr": 3e-4,
        "time_budget": 5400.0, "study": "one two", "task": "my task.py's:make", "seed": 7,
    }  # fmt: skip
    sent = options(new_study(values, tmp_path, None).command)
    assert sent.pop("executor") == "ray"
    assert sent.pop("address") == "auto"
    assert sent.pop("out") == "/home/ray/adq-runs"
    # what the command line there makes of it is the configuration that was meant here
    assert make_config(parsed(sent)) == make_config(values)


def parsed(sent: dict[str, str]) -> dict[str, Any]:
    """Options as the command line gives them to `make_config`: numbers as numbers."""
    kinds: dict[str, Callable[[str], Any]] = {"whole": int, "number": float, "share": float}
    found = {}
    for name, text in sent.items():
        field = OPTIONS[name.replace("-", "_")]
        found[field.name] = kinds.get(field.metadata["kind"], str)(text)
    return found


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_text_reaches_the_cluster_as_it_is(text: str) -> None:
    assert words(submit._command({"task": text}, "/x"))[1] == text
    assert words(submit._command({}, "/x", resume=text))[-1] == text
    assert words(f"exec adq-search {shell_path('~/' + text)}") == [f"/home/ray/{text}"]


def test_an_executor_that_was_asked_for_is_kept_and_an_address_is_not(tmp_path: Path) -> None:
    local = options(new_study({**BUDGET, "executor": "local"}, tmp_path, None).command)
    assert local["executor"] == "local"
    assert "address" not in local
    elsewhere = {**BUDGET, "executor": "ray", "address": "other:6379", "workers": 3}
    sent = options(new_study(elsewhere, tmp_path, None).command)
    assert (sent["executor"], sent["address"], sent["workers"]) == ("ray", "auto", "3")


def test_a_study_without_a_name_gets_one_of_its_task_and_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20300102-030405")
    sent = new_study({**BUDGET, "task": "my.module:make_task"}, tmp_path, None)
    assert sent.study == "my.module-20300102-030405"
    assert options(sent.command)["study"] == sent.study


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, "~/adq-runs"),
        ("mine", "~/mine"),
        ("./my runs", "~/my runs"),
        ("~/x", "~/x"),
        ("/data/x", "/data/x"),
    ],
)
def test_studies_lie_below_the_home_there_unless_a_full_path_is_given(
    tmp_path: Path, given: str | None, kept: str
) -> None:
    sent = new_study(BUDGET, tmp_path, given)
    assert sent.out == remote_path(given) == kept
    assert options(sent.command)["out"] == kept.replace("~", "/home/ray", 1)


def test_a_resumed_study_keeps_its_options(tmp_path: Path) -> None:
    more = {"trials": 30, "time_budget": None}
    sent = resumed_study("one two", {"workers": 2}, more, tmp_path, None)
    assert words(sent.command) == shlex.split(
        "resume --workers 2 --executor ray --address auto --trials 30 --out /home/ray/adq-runs "
        "-- 'one two'"
    )
    with pytest.raises(InputError, match=r"epochs: a study that is resumed keeps its options"):
        resumed_study("x", {"epochs": 2}, more, tmp_path, None)
    with pytest.raises(InputError, match="expected a plain name"):
        resumed_study("../x", {}, more, tmp_path, None)


def test_files_that_options_name_go_along_by_their_place_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    (folder / "data" / "train").mkdir(parents=True)
    (folder / "data" / "train" / "a.png").write_text("a")
    (folder / "w.safetensors").write_text("w")
    (folder / "t4.json").write_text("{}")
    (folder / ".gitignore").write_text("*.safetensors\n/data\nmine.py\nsecret\n")
    (folder / "mine.py").write_text("pass")
    (folder / "secret").write_text("s")
    monkeypatch.chdir(tmp_path)
    values = {
        **BUDGET, "weights": "project/w.safetensors", "latency": "project/t4.json",
        "task": "imagefolder:project/data",
    }  # fmt: skip
    sent = new_study(values, Path("project"), None)
    found = options(sent.command)
    assert found["weights"] == "w.safetensors"
    assert found["latency"] == "t4.json"
    assert found["task"] == "imagefolder:data"
    values["task"] = "webdataset:project/data,size=64,workers=2"
    assert options(new_study(values, Path("project"), None).command)["task"] == (
        "webdataset:data,size=64,workers=2"
    )
    count = write_package(sent.folder, sent.files, tmp_path / "p.zip")
    names = zipfile.ZipFile(tmp_path / "p.zip").namelist()
    assert names == [".gitignore", "data/train/a.png", "t4.json", "w.safetensors"]
    assert count == 4
    # the task's own module goes along whatever .gitignore says
    sent = new_study({**BUDGET, "task": "mine:make"}, Path("project"), None)
    write_package(sent.folder, sent.files, tmp_path / "p.zip")
    assert zipfile.ZipFile(tmp_path / "p.zip").namelist() == [".gitignore", "mine.py", "t4.json"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"weights": "/etc/hostname"}, r"weights: /etc/hostname is not in the working folder"),
        ({"weights": "no.pt"}, r"weights: cannot read no.pt"),
        ({"latency": "../x.json"}, r"latency: cannot read ../x.json"),
        ({"task": "imagefolder:data"}, r"task imagefolder: cannot read data"),
        ({"storage": "sqlite:///x.db"}, r"storage: sqlite:///x.db would be lost"),
        ({"storage": "journal:x.log"}, r"storage: journal:x.log would be lost"),
        ({"checkpoints": "ckpt"}, r"checkpoints: ckpt would be lost"),
        ({"budget_bits": None}, r"budget"),
        ({"epochs": -1}, r"epochs: expected"),
        ({"study": "a/b"}, r"study: expected a plain name"),
    ],
)
def test_what_cannot_be_right_there_is_said_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        new_study({**BUDGET, **values}, Path("."), None)


@pytest.mark.parametrize(
    "values",
    [
        {"storage": "sqlite:////home/ray/x.db"},
        {"storage": "postgresql://me@db/studies"},
        {"storage": "journal:/shared/x.log"},
        {"checkpoints": "s3://bucket/x"},
        {"checkpoints": "/shared/x"},
        {"task": "imagefolder:/shared/images"},
        {"latency": "nvidia-t4", "budget_latency_ms": 1.0},
    ],
)
def test_places_on_the_cluster_need_not_be_here(tmp_path: Path, values: dict[str, Any]) -> None:
    sent = options(new_study({**BUDGET, **values}, tmp_path, None).command)
    assert {name: sent[name.replace("_", "-")] for name in values} == {
        name: str(value) for name, value in values.items()
    }


def test_a_package_holds_the_folder_but_for_what_is_made_or_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    for name in (
        "task.py", "sub/helper.py", "sub/runs/kept.txt", "runs/done/front.json", ".git/config",
        ".venv/bin/python", "__pycache__/task.pyc", "sub/__pycache__/x.pyc", "big.bin", "a.log",
        "sub/a.log", "sub/only/b.txt",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("*.log\n")
    (folder / ".rayignore").write_text("big.bin\n")
    (folder / "sub" / ".gitignore").write_text("only/\n")
    os.symlink("..", folder / "sub" / "up")  # a way round in circles
    target = tmp_path / "p.zip"
    write_package(folder, (), target)
    with zipfile.ZipFile(target) as inside:
        assert inside.namelist() == [
            ".gitignore", ".rayignore", "sub/.gitignore", "sub/helper.py", "sub/runs/kept.txt",
            "task.py",
        ]  # fmt: skip
        assert inside.read("sub/helper.py") == b"sub/helper.py"
    first = target.read_bytes()
    os.utime(folder / "task.py", (1, 1))
    write_package(folder, (), target)
    assert target.read_bytes() == first  # so that Ray sends it once
    (folder / "task.py").write_text("other")
    write_package(folder, (), target)
    assert target.read_bytes() != first


def test_a_folder_that_is_too_large_is_said_with_what_makes_it_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "LIMIT_BYTES", 2**20)
    (tmp_path / "data.bin").write_bytes(random.Random(0).randbytes(2**20 + 2**18))
    (tmp_path / "task.py").write_text("pass")
    with pytest.raises(
        InputError, match=r"^working-dir: /.* is more than the 1 MiB .* large are data.bin \(1 MB\)"
    ):
        write_package(tmp_path, (), tmp_path.parent / "p.zip")
    (tmp_path / "data.bin").write_bytes(bytes(2**22))  # what compresses well may be larger
    assert write_package(tmp_path, (), tmp_path.parent / "p.zip") == 2
    (tmp_path / ".gitignore").write_bytes(b"\xff")
    with pytest.raises(InputError, match="cannot read what to leave out"):
        write_package(tmp_path, (), tmp_path.parent / "p.zip")
    with pytest.raises(InputError, match="is no folder"):
        write_package(tmp_path / "none", (), tmp_path.parent / "p.zip")


def test_only_the_same_version_is_let_in() -> None:
    check_version(version("adq-search"))
    with pytest.raises(InputError, match=r"sent by adq-search 99\.0, and the cluster has"):
        check_version("99.0")


def job(status: str, message: str = "", exit_code: int | None = None) -> Job:
    return Job("j-1", status, "adq-search", 1.0, 2.0, message, exit_code, {"adq_study": "s"})


@pytest.mark.parametrize(
    ("ended", "code", "said"),
    [
        (job("SUCCEEDED", exit_code=0), 0, "j-1 is done: 'adq-search fetch s'"),
        (job("STOPPED"), 1, "was stopped, .*'adq-search submit --resume s' goes on"),
        (
            job("FAILED", "failed with exit code 2, last\n[1 s] x\nerror: no task\n", 2),
            2,
            "j-1 failed: no task$",
        ),
        (job("FAILED", "failed\nValueError: bad\n", 1), 1, "with exit code 1: ValueError: bad"),
        (job("FAILED", "sh: adq-search: not found", 127), 2, "is not installed on the head node"),
        (job("FAILED", "runtime env\nno such package"), 1, "j-1 failed: no such package"),
    ],
)
def test_the_end_of_a_job_is_an_exit_code_and_a_line(ended: Job, code: int, said: str) -> None:
    import re

    got, line = outcome(ended)
    assert got == code
    assert re.search(said, line), line
    assert "\n" not in line


def test_the_address_is_given_or_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # a driver's, not the job server's
    with pytest.raises(InputError, match=r"expected the cluster's job server like http://HEAD"):
        job_server_url(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265/")
    assert job_server_url(None) == "http://10.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://head.example")
    assert job_server_url(None) == "https://head.example"
    assert job_server_url("http://other:1") == "http://other:1"
    for wrong in ("head:8265", "ray://head:10001", "auto", "http://"):
        with pytest.raises(InputError, match="address: expected"):
            job_server_url(wrong)
    with pytest.raises(InputError, match="is the address for workers"):
        job_server_url("head:6379")


def test_what_is_said_of_a_token_names_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert f"there is none in {tmp_path}/token:" in _about_token("http://h:1", "no token")
    (tmp_path / "token").write_text("abc\n")
    refused = "Token authentication is enabled but the authentication token is invalid"
    assert f"refuses the token in {tmp_path}/token:" in _about_token("http://h:1", refused)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    assert "refuses the token in RAY_AUTH_TOKEN:" in _about_token("http://h:1", refused)
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert "wants a token: set RAY_AUTH_MODE=token" in _about_token("http://h:1", refused)


def test_only_what_was_fetched_and_not_touched_since_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    _may_replace(folder, force=False)
    folder.mkdir()
    with pytest.raises(InputError, match="was made here"):
        _may_replace(folder, force=False)
    _may_replace(folder, force=True)
    (folder / "fetched.json").touch()
    _may_replace(folder, force=False)
    (folder / "lock").touch()  # as after `adq-search resume`
    with pytest.raises(InputError, match="was made here"):
        _may_replace(folder, force=False)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study's folder as to what lies where."""
    folder = tmp_path / "cluster" / "s"
    for name in (
        "front.json", "front.csv", "report.html", "best.safetensors", "trials/0000.json",
        "final/t0000.json", "models/t0000.safetensors", "fp32.safetensors", "lock",
        "checkpoints/0001.ckpt", ".half.1.tmp", "trials/.0001.json.1.tmp", "start/0000.safetensors",
        "drivers/a-1", "running/0001-0", "tune/events.out",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(random.Random(name).randbytes(5000))
    (folder / "study.toml").write_text(make_config({**BUDGET, "study": "s"}).to_toml())
    return folder


def unpacked(text: str, target: Path, step: int) -> Path:
    """The archive of a log that comes in pieces of `step` characters."""
    with io.BytesIO() as archive:
        unpacker = Unpacker(archive)
        for at in range(0, len(text), step):
            unpacker.feed(text[at : at + step])
        unpacker.check()
        archive.seek(0)
        _extract(archive, target)
    return target


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("step", [1, 7, 20_000, 10**9])
def test_what_is_packed_comes_out_the_same_however_the_log_is_cut(
    study: Path, tmp_path: Path, step: int
) -> None:
    stream = io.StringIO()
    stream.write("Runtime env is setting up.\nRunning entrypoint\n")
    pack(study.parent, "s", stream)
    assert max(map(len, stream.getvalue().splitlines())) <= 2000  # ten a chunk of Ray's
    there, here = files(study), files(unpacked(stream.getvalue(), tmp_path / "home", step))
    assert here == {
        name: there[name]
        for name in there
        if not name.startswith((".", "checkpoints/", "start/", "trials/.", "tune/", "drivers/"))
        and not name.startswith("running/")
        and name not in ("lock", "fp32.safetensors")
    }


def test_all_of_a_study_can_be_packed_but_what_is_of_its_processes(
    study: Path, tmp_path: Path
) -> None:
    stream = io.StringIO()
    pack(study.parent, "s", stream, everything=True)
    there, here = files(study), files(unpacked(stream.getvalue(), tmp_path / "home", 4096))
    assert set(there) - set(here) == {
        "lock", ".half.1.tmp", "trials/.0001.json.1.tmp", "drivers/a-1", "running/0001-0",
        "tune/events.out",
    }  # fmt: skip
    assert all(there[name] == here[name] for name in here)


def test_a_study_that_is_not_there_is_said_with_those_that_are(study: Path) -> None:
    with pytest.raises(InputError, match=r"no study 'x' in .* on the cluster; there are: s$"):
        pack(study.parent, "x", io.StringIO())


def test_a_damaged_archive_is_refused(study: Path, tmp_path: Path) -> None:
    stream = io.StringIO()
    pack(study.parent, "s", stream)
    lines = stream.getvalue().splitlines(keepends=True)
    middle = len(lines) // 2
    assert len(lines) > 10
    other = lines[middle].translate({ord("A"): "B", ord("b"): "A"})
    for spoilt, said in [
        (lines[:-1], "is damaged: expected"),  # cut off
        (lines[:middle] + lines[middle + 1 :], "is damaged: expected"),
        ([*lines[:middle], other, *lines[middle + 1 :]], "is damaged: expected"),
        ([*lines[:middle], "(raylet) a word from Ray\n", *lines[middle:]], "damaged on its way"),
        (["nothing\n"], "packed nothing"),
    ]:
        with pytest.raises(InputError, match=said):
            unpacked("".join(spoilt), tmp_path / "never", 10**9)
    assert not (tmp_path / "never").exists()
    assert LINE_BYTES % 3 == 0  # no padding within


@pytest.mark.parametrize("kind", ["up", "link", "device"])
def test_an_archive_writes_nowhere_but_in_its_folder(tmp_path: Path, kind: str) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        entry = tarfile.TarInfo("../escaped" if kind == "up" else "entry")
        if kind == "link":
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        elif kind == "device":
            entry.type = tarfile.CHRTYPE
        tar.addfile(entry, io.BytesIO())
    archive.seek(0)
    with pytest.raises(InputError, match=r"cannot be unpacked|which is no file"):
        _extract(archive, tmp_path / "new")
    assert not (tmp_path / "escaped").exists()


def test_a_study_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, target, scratch = tmp_path / "new", tmp_path / "s", tmp_path / "scratch"
    for folder in (new, target, scratch):
        folder.mkdir()
    (target / "old").touch()
    rename = os.rename

    def full(source: Path, to: Path) -> None:
        if source == new:
            raise OSError(28, "No space left on device")
        rename(source, to)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(InputError, match="No space left"):
        _put(new, target, scratch)
    assert (target / "old").exists()
    monkeypatch.undo()
    _put(new, target, scratch)
    assert not (target / "old").exists()
    assert not list(scratch.iterdir())


class Line:
    """A job server whose connections bring texts and break, on a clock that only they move.

    `connections` are texts, seconds in which nothing happens, and errors; the last one that is
    left ends the job.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *connections: list[Any]) -> None:
        self.now, self.left = 1000.0, [*connections]
        self.server = JobServer.__new__(JobServer)
        self.server.url = "http://head:8265"
        self.server._client = self  # type: ignore[assignment]
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(job_server, "time", clock)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    async def tail_job_logs(self, id: str) -> AsyncIterator[str]:
        for event in self.left.pop(0):
            if isinstance(event, Exception):
                raise event
            if isinstance(event, str):
                yield event
            else:
                self.now += event

    def get_job_info(self, id: str) -> Any:
        return SimpleNamespace(
            submission_id=id, status="RUNNING" if self.left else "SUCCEEDED", entrypoint="x",
            start_time=0, end_time=None, message="", driver_exit_code=None, metadata={},
        )  # fmt: skip


BREAKS = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
LONG = PATIENCE_S + 1


def test_a_job_that_was_quiet_for_long_may_lose_its_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line(
        monkeypatch,
        ["a\n", LONG, BREAKS],
        ["a\n", "b\n", LONG, BREAKS],
        [BREAKS],
        [LONG, BREAKS],  # this one held, though nothing came
        [BREAKS],
        ["a\n", "b\n", "c\n"],
    )
    got: list[str] = []
    assert line.server.follow("j", got.append).status == "SUCCEEDED"
    assert "".join(got) == "a\nb\nc\n"


@pytest.mark.parametrize("answer", [[["a\n", 40.0, BREAKS]], [[40.0, BREAKS], []]])
def test_whatever_answers_gives_a_job_server_its_time_again(
    monkeypatch: pytest.MonkeyPatch, answer: list[list[Any]]
) -> None:
    line = Line(monkeypatch, *answer * 5, ["a\n"])
    got: list[str] = []
    assert line.server.follow("j", got.append).has_ended
    assert got == ["a\n"]


def test_a_job_server_that_is_gone_is_given_up_a_while_after_it_first_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line(monkeypatch, ["a\n", LONG, BREAKS], *[[TimeoutError("no answer")]] * 1000)
    with pytest.raises(InputError, match=r"^lost the job server at http://head:8265 \(no answer"):
        line.server.follow("j", print)
    assert line.now - 1000 == pytest.approx(LONG + PATIENCE_S, abs=2)


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space"), InputError("damaged")]
)
def test_what_the_log_cannot_be_written_to_is_no_lost_connection(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    line = Line(monkeypatch, ["a\n", "b\n"], ["a\n", "b\n"])
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        raise error

    with pytest.raises(type(error)) as raised:
        line.server.follow("j", write)
    assert raised.value is error
    assert written == ["a\n"]


def test_a_full_disk_ends_a_fetch_with_one_line_and_stops_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[str] = []

    def follow(id: str, write: Callable[[str], None]) -> Job:
        raise OSError(28, "No space left on device")

    server = SimpleNamespace(submit=lambda *a: None, follow=follow, stop=stopped.append)
    monkeypatch.setattr(fetching, "JobServer", lambda address: server)
    with pytest.raises(InputError, match=r"^cannot write in .*: No space left on device$"):
        fetch("http://head:8265", "s", tmp_path, source="/there")
    assert len(stopped) == 1
    assert [*tmp_path.iterdir()] == []


def test_what_is_wrong_here_is_said_before_a_server_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(address: str | None) -> None:
        raise AssertionError("the server was asked")

    monkeypatch.setattr(submit, "JobServer", never)
    monkeypatch.setattr(fetching, "JobServer", never)
    there = new_study(BUDGET, tmp_path, None)
    with pytest.raises(InputError, match="working-dir: /nosuch is no folder"):
        send("http://head:8265", new_study(BUDGET, Path("/nosuch"), None))
    with pytest.raises(InputError, match="job-id: expected letters"):
        send("http://head:8265", there, job_id="a b")
    with pytest.raises(InputError, match="requirements: cannot read"):
        send("http://head:8265", there, requirements=tmp_path / "none.txt")
    with pytest.raises(InputError, match="expected a plain name"):
        fetch("http://head:8265", "../x", tmp_path)
    (tmp_path / "s").mkdir()
    with pytest.raises(InputError, match="was made here"):
        fetch("http://head:8265", "s", tmp_path)
    with pytest.raises(AssertionError, match="was asked"):
        send("http://head:8265", there)


def test_a_job_is_shown_without_the_passwords_of_its_command() -> None:
    from adq.cluster import _shown

    urls = "postgresql://me:secret@db/x", "'postgresql://me@db/x?a=1&password=secret&b=2'"
    for url in urls:
        command = f"adq-search --storage {url} --seed 7"
        shown = _shown(Job("j", "FAILED", command, 1.0, 2.0, command, 1, {}))
        assert "secret" not in str(shown)
        assert "--seed 7" in shown["command"]
        assert "***" in shown["message"]
