"""The doctor: every finding has a remedy, nothing hangs it, and it leaves nothing behind."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from postgres import PostgresServer, postgres_server
from ray_cluster import RayCluster, ray_cluster

from adq.search import doctor, doctor_machine, doctor_places
from adq.search.doctor_places import file_system
from adq.search.finding import Finding

ADQ = Path(sys.executable).with_name("adq-search")


def command(*arguments: object, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [ADQ, "doctor", *map(str, arguments)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def findings(done: "subprocess.CompletedProcess[str]") -> list[dict[str, str]]:
    assert "Traceback" not in done.stdout + done.stderr
    found: list[dict[str, str]] = json.loads(done.stdout)
    for each in found:
        assert each["remedy"] or each["state"] == "ok", each
        assert "\n" not in each["text"]
    return found


def check(name: str, **values: Any) -> list[Finding]:
    """The findings of one check, made in this process."""
    given = {"out": "/nowhere", "storage": None, "checkpoints": None, "address": None}
    return doctor.CHECKS[name](given | values)


def test_a_sound_machine_has_no_problem_and_keeps_nothing(tmp_path: Path) -> None:
    out, log, checkpoints = tmp_path / "a" / "runs", tmp_path / "s.log", tmp_path / "c"
    done = command(
        *("--out", out, "--storage", f"journal:{log}", "--checkpoints", checkpoints, "--json")
    )
    rows = findings(done)
    assert [each["check"] for each in rows[:3]] == ["python", "torch", "optuna"]
    found = {each["check"]: each for each in rows}
    assert done.returncode == 0, done.stdout
    assert {"python", "torch", "optuna", "ray", "CPUs", "out folder", "storage"} <= set(found)
    assert found["python"]["text"] == sys.version.split()[0]
    assert found["out folder"]["state"] == found["checkpoints"]["state"] == "ok"
    assert [*tmp_path.iterdir()] == []


def test_what_is_wrong_is_a_row_each_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    done = command(
        *("--out", tmp_path / "file" / "runs", "--storage", "postgresql://me:secret@127.0.0.1:1/x"),
        *("--checkpoints", "nosuch://x", "--address", "127.0.0.1:1"),
        OMP_WAIT_POLICY="ACTIVE",
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert "secret" not in done.stdout
    rows = [line.split(None, 1)[1] for line in done.stdout.splitlines() if "problem  " in line]
    assert [re.split(r"\s{2,}", row)[0] for row in rows] == [
        "out folder", "storage", "checkpoints", "Ray",
    ]  # fmt: skip
    assert all(len(re.split(r"\s{3,}", row.strip())) == 3 for row in rows)  # with a remedy
    assert re.search(r"warning +OpenMP +.*ten times slower", done.stdout)


def test_a_check_that_hangs_is_ended(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections and never answers
        url = f"postgresql://me@127.0.0.1:{deaf.getsockname()[1]}/x?connect_timeout=100"
        started = time.monotonic()
        found = doctor._apart(
            "storage", {"out": "", "storage": url, "checkpoints": None, "address": None}, 5
        )
        assert time.monotonic() - started < 15
    assert [(each.state, each.text) for each in found] == [("problem", "no answer within 5 s")]


def test_a_check_that_dies_is_a_finding() -> None:
    [found] = doctor._apart("storage", {"storage": 3}, 60)
    assert found.state == "problem"
    assert "the check could not be made: AttributeError" in found.text


def test_a_folder_without_rights_or_room_or_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    [found] = check("out folder", out=str(tmp_path / "file"))
    assert (found.state, "cannot write in" in found.text) == ("problem", True)
    usage = shutil.disk_usage(tmp_path)
    for free, state in ((50 * 2**20, "problem"), (2**30, "warning"), (2**40, "ok")):
        monkeypatch.setattr(
            doctor_places.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free)
        )
        [found] = check("out folder", out=str(tmp_path))
        assert found.state == state
    monkeypatch.setattr(doctor_places, "file_system", lambda path: "nfs4")
    [_, found] = check("out folder", out=str(tmp_path))
    assert (found.check, found.state) == ("storage", "warning")
    assert "--storage journal:" in found.remedy
    monkeypatch.setattr("fcntl.flock", lambda *given: None)  # as on a mount with 'nolock'
    locks = [each for each in check("out folder", out=str(tmp_path)) if each.check == "file locks"]
    assert [each.state for each in locks] == ["problem"]


def test_the_kind_of_file_system_is_what_df_says(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/proc/self"), Path("/dev/shm")):
        said = subprocess.run(
            ["df", "--output=fstype", path], capture_output=True, text=True, check=True
        )
        assert file_system(path) == said.stdout.split()[-1]


def test_versions_that_are_missing_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("ray", "triton"):
            raise doctor_machine.importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor_machine.importlib.metadata, "version", version)
    found = {each.check: each.state for each in check("versions")}
    assert (found["ray"], found["triton"], found["torch"]) == ("problem", "warning", "ok")


@pytest.mark.parametrize(
    ("cuda", "warning", "remedy"),
    [
        (None, None, "install PyTorch with CUDA"),
        ("13.0", "The NVIDIA driver on your system is too old (found version 11040).", "driver"),
        ("13.0", None, "nvidia-smi"),
    ],
)
def test_a_gpu_that_pytorch_cannot_use_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, warning: str | None, remedy: str
) -> None:
    import warnings

    import torch

    def unavailable() -> bool:
        if warning is not None:
            warnings.warn(warning, stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    [found] = check("GPUs")
    assert found.state == "problem"
    assert remedy in found.remedy
    assert warning is None or warning in found.text


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


def test_a_storage_is_used_and_left_as_it_was(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_places, "SLOW_STORAGE_S", 60)  # this machine may be busy
    first, second = check("storage", storage=server.url)
    assert first.state == "ok"
    assert "tester:***@" in first.text
    assert (second.state, "study.toml" in second.text) == ("warning", True)
    with psycopg.connect(server.url) as connection:
        assert connection.execute("SELECT study_name FROM studies").fetchall() == []
    [found] = check("storage", storage=server.url.replace("secret", "wrong"))
    assert (found.state, "password authentication failed" in found.text) == ("problem", True)


def test_a_storage_that_is_there_keeps_its_studies(tmp_path: Path) -> None:
    from optuna.study import StudyDirection

    from adq.search.storage import StudyStorage, create_study_in

    for url in (f"sqlite:///{tmp_path}/s.db", f"journal:{tmp_path}/s.log"):
        create_study_in(url, "s", ["accuracy"], [StudyDirection.MAXIMIZE])
        [found] = check("storage", storage=url)
        assert found.state == "ok"
        study = StudyStorage(url, "s")
        assert study.trials() == []
        study.close()


def on_cluster(
    cluster: RayCluster, address: str, out: Path, checkpoints: Path | None = None
) -> list[dict[str, str]]:
    """The findings of the check of the cluster alone."""
    values = {"address": address, "out": str(out), "checkpoints": checkpoints and str(checkpoints)}
    done = subprocess.run(
        [sys.executable, "-m", "adq.search.doctor", "cluster", json.dumps(values)],
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    found: list[dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_cluster_is_looked_at_node_by_node(tmp_path: Path) -> None:
    out, checkpoints = tmp_path / "runs", tmp_path / "checkpoints"
    with ray_cluster(nodes=1) as cluster:
        found = on_cluster(cluster, cluster.address, out, checkpoints)
        texts = [each["text"] for each in found]
        assert f"{cluster.address}: 2 nodes, 2 CPUs, 0 GPUs" in texts
        for said in ("the same versions as here", f"reads and writes {out}", "reads checkpoints"):
            assert sum(said in text for text in texts) == 2, texts
        assert {each["state"] for each in found} == {"ok"}  # the clocks agree as well
        assert [*tmp_path.iterdir()] == []

        found = on_cluster(cluster, cluster.dashboard_url, out)
        assert {each["state"] for each in found} == {"ok"}
        assert "takes jobs" in found[0]["text"]


def test_what_differs_on_a_node_is_said() -> None:
    from adq.search.executors import cluster

    mine = {name: doctor_machine.importlib.metadata.version(name) for name in cluster.PACKAGES}
    look = {"versions": mine | {"python": sys.version.split()[0]}, "read": "", "file": None}
    [found] = cluster._of_node("10.0.0.2", look, (1.0, 0.1), 4)
    assert found[0] == "ok"
    # half of the time that the answer took is no difference of clocks
    assert len(cluster._of_node("10.0.0.2", look, (4.0, 3.0), 4)) == 1
    for seconds, way in ((7.0, "7.0 s ahead"), (-7.0, "7.0 s behind")):
        _, (state, text, remedy) = cluster._of_node("10.0.0.2", look, (seconds, 0.1), 4)
        assert (state, way in text, "chrony" in remedy) == ("warning", True, True)
    look["versions"] = look["versions"] | {"torch": "1.0"}
    [(state, text, _)] = cluster._of_node("10.0.0.2", look, None, 4)
    assert (state, "torch 1.0, not" in text) == ("warning", True)
    look["versions"] = look["versions"] | {"adq-search": "none"}
    [(state, text, _)] = cluster._of_node("10.0.0.2", look, None, 4)
    assert (state, "adq-search none, not" in text) == ("problem", True)


def test_a_folder_or_checkpoints_that_a_node_does_not_see_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adq.search.executors import cluster

    monkeypatch.setattr(cluster, "SEEN_S", 0.3)
    state, text, remedy = cluster._seen("n", "/out", tmp_path, "probe", "id", "No such file")
    assert (state, "does not see /out" in text, "s3://" in remedy) == ("warning", True, True)
    state, text, _ = cluster._seen("n", "/out", tmp_path, "probe", "id", "probe")
    assert (state, "is not seen here" in text) == ("warning", True)
    (tmp_path / "id").write_text("probe")
    assert cluster._seen("n", "/out", tmp_path, "probe", "id", "probe")[0] == "ok"
    assert cluster._seen_checkpoint("n", "s3://b", b"probe", "probe")[0] == "ok"
    for file in (None, "cannot read s3://b/x: denied"):
        assert cluster._seen_checkpoint("n", "s3://b", file, "probe")[0] == "problem"
