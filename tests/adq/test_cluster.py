"""Studies on a real cluster by the commands that a user gives: sent, followed, stopped, fetched."""

import hashlib
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ray_cluster import RayCluster, ray_cluster, wait_until

SUPPORT = Path(__file__).parents[1] / "support"
QUICK = [
    "--task", "mine:make_task", "--budget-bits", "3.5", "--bits", "2,4", "--epochs", "1",
    "--final-epochs", "1", "--device", "cpu",
]  # fmt: skip
LOCAL = ["--executor", "local"]
HELD = """
import dataclasses, pathlib, time
from mine_helper import make_task as tiny

def make_task():
    task = tiny()
    def loss(outputs, targets):
        while (pathlib.Path.home() / "hold").exists():  # trains no further
            time.sleep(0.05)
        return task.loss(outputs, targets)
    return dataclasses.replace(task, loss=loss)
"""
TOKEN_PLACES = "RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Laptop:
    """The commands at home, in a folder with a task of the user's own."""

    def __init__(self, cluster: RayCluster, there: Path, home: Path) -> None:
        self.cluster, self.there, self.home = cluster, there, home
        self.folder = home / "project"
        self.folder.mkdir(parents=True)
        # a module that is nowhere on the path but in this folder, and another one that it needs
        shutil.copy(SUPPORT / "tiny_task.py", self.folder / "mine_helper.py")
        (self.folder / "mine.py").write_text("from mine_helper import make_task as make_task\n")
        (self.folder / "held.py").write_text(HELD)
        (self.folder / "broken.py").write_text("import os\nos._exit(7)\n")
        self.env = cluster.env | {"HOME": str(home)}

    def __call__(self, *arguments: str, **env: str | None) -> Done:
        with self.started(*arguments, **env) as process:
            out, err = process.communicate(timeout=600)
        return Done(process.returncode, out, err)

    def started(self, *arguments: str, **env: str | None) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["adq-search", *arguments],
            cwd=self.folder,
            env={k: v for k, v in (self.env | env).items() if v is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def done(self, *arguments: str) -> Done:
        found = self(*arguments)
        assert found.code == 0, found
        return found

    def refused(self, *arguments: str, **env: str | None) -> str:
        """The one line of an error that a user can mend."""
        found = self(*arguments, **env)
        lines = found.err.splitlines()
        assert (found.code, found.out, len(lines)) == (2, "", 1), found
        assert lines[0].startswith("error: ")
        return lines[0]

    def status(self, name: str) -> dict[str, Any]:
        return json.loads(self.done("status", name, "--json").out)


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    there = tmp_path_factory.mktemp("there")
    with ray_cluster(nodes=1, cpus=2, env={"HOME": str(there)}) as cluster:
        yield Laptop(cluster, there, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def finished(laptop: Laptop) -> Done:
    """Study `first`, sent and followed to its end; Ray's workers train."""
    return laptop.done("submit", *QUICK, "--workers", "1", "--trials", "2", "--study", "first")


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_study_is_sent_with_its_module_and_its_log_comes_back(
    laptop: Laptop, finished: Done
) -> None:
    assert "search 2/2 0001" in finished.out
    assert "Pareto front of study first" in finished.out
    assert not any("━" in line or "\r" in line for line in finished.out.splitlines())  # no bars
    said = finished.err.splitlines()
    assert said[0].startswith(f"sending 4 files of {laptop.folder}")
    assert said[-1].endswith("is done: 'adq-search fetch first' brings its study home")
    shown = laptop.status("first")
    assert (shown["status"], shown["exit_code"], shown["folder"]) == ("SUCCEEDED", 0, "~/adq-runs")
    assert shown["command"].endswith("--study first --executor ray --address auto --out ~/adq-runs")
    assert shown["id"] in laptop.done("status").out
    assert laptop.done("logs", "first").out == finished.out


def test_front_and_winners_come_home_and_are_used_there(laptop: Laptop, finished: Done) -> None:
    done = laptop.done("fetch", "first")
    assert done.out == "runs/first\n"
    here, there = hashes(laptop.folder / "runs/first"), hashes(laptop.there / "adq-runs/first")
    del here["fetched.json"]
    assert {name: there[name] for name in here} == here
    assert {"study.toml", "front.json", "report.html", "best.safetensors", "results.json"} <= set(
        here
    )
    assert {p for p in there if p.startswith(("trials/", "final/", "models/"))} <= set(here)
    assert not any(p.startswith(("checkpoints", "fp32.safetensors", "study.db")) for p in here)
    shown = json.loads(laptop.done("show", "first", "--json").out)
    front = json.loads((laptop.there / "adq-runs/first/front.json").read_text())
    assert shown["status"] == "finished"
    assert [p["id"] for p in shown["front"]["points"]] == [p["id"] for p in front["points"]]
    assert "t000" in laptop.done("pareto", "first", "--format", "csv").out
    assert not [path for path in (laptop.folder / "runs").iterdir() if path.name != "first"]
    assert "fetch-" not in laptop.done("status").out  # its job is off the list again


def test_a_study_of_ones_own_is_not_replaced_by_one_that_is_fetched(
    laptop: Laptop, finished: Done
) -> None:
    own = laptop.folder / "other" / "first"
    own.mkdir(parents=True)
    (own / "study.toml").write_text("mine")
    line = laptop.refused("fetch", "first", "--out", "other")
    assert "other/first is there already and was made here" in line
    assert (own / "study.toml").read_text() == "mine"
    laptop.done("--out", "other", "fetch", "first", "--force", "--all", "--from", "~/adq-runs")
    assert (own / "fp32.safetensors").exists()


def test_a_followed_study_goes_on_without_us_and_is_stopped_and_resumed(laptop: Laptop) -> None:
    records, hold = laptop.there / "adq-runs" / "long" / "trials", laptop.there / "hold"
    options = ["--task", "held:make_task", *QUICK[2:], *LOCAL, "--bits", "2,3,4,5"]
    with laptop.started("submit", *options, "--trials", "9", "--study", "long") as process:
        wait_until(lambda: list(records.glob("*.json")), "the first trial")
        hold.touch()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "goes on: 'adq-search logs long-" in err
    assert "Traceback" not in err
    assert laptop.status("long")["status"] == "RUNNING"
    out = laptop.done("stop", "long").out
    assert "is being stopped; 'adq-search submit --resume long' goes on" in out
    ended = wait_until(
        lambda: (shown := laptop.status("long"))["status"] != "RUNNING" and shown, "its end"
    )
    assert ended["status"] == "STOPPED"
    before = hashes(records)
    assert 0 < len(before) < 9
    assert (laptop.there / "adq-runs/long/front.json").exists()  # it had the time to write it
    followed = laptop("logs", "long", "--follow")
    assert followed.code == 1
    assert followed.err.startswith("error: job long-")
    hold.unlink()
    done = laptop.done("submit", "--resume", "long", *LOCAL, "--job-id", "second")
    assert "Pareto front of study long, chosen by validation, reported on test" in done.out
    assert laptop.status("long")["id"] == "second"
    after = hashes(records)
    assert len(after) == 9
    assert {name: after[name] for name in before} == before


def test_a_job_that_fails_says_why_and_gives_its_exit_code(laptop: Laptop) -> None:
    other = [*QUICK[2:], *LOCAL, "--trials", "1", "--no-follow"]
    started = [
        laptop.done("submit", "--task", task, *other, "--job-id", id)
        for task, id in [("mine:no_task", "wrong"), ("broken:make_task", "dead")]
    ]
    assert [done.out for done in started] == ["wrong\n", "dead\n"]
    wrong = laptop("logs", "wrong", "--follow")
    assert wrong.code == 2
    last = wrong.err.splitlines()[-1]
    assert last.startswith("error: job wrong failed: task 'mine:no_task': module 'mine' (")
    assert last.endswith("stands behind installed ones")
    dead = laptop("logs", "dead", "--follow")
    assert dead.code == 1
    assert dead.err.startswith("error: job dead failed with exit code 7")
    assert "already exists" in laptop("submit", "--task", "x:y", *other, "--job-id", "wrong").err
    line = laptop("fetch", "nothing", "--from", "/no").err.splitlines()[-1]
    assert line.endswith("no study 'nothing' in /no on the cluster; there are: none")
    assert not (laptop.folder / "runs" / "nothing").exists()


def test_tokens_that_are_missing_or_wrong_are_said_with_what_to_do(laptop: Laptop) -> None:
    url = laptop.cluster.dashboard_url
    line = laptop.refused("status", RAY_AUTH_MODE=None)
    assert line.startswith(f"error: the cluster at {url} wants a token: set RAY_AUTH_MODE=token")
    assert TOKEN_PLACES in line
    line = laptop.refused("status", RAY_AUTH_TOKEN=None)
    assert f"{url} wants a token, and there is none in ~/.ray/auth_token" in line
    line = laptop.refused("status", RAY_AUTH_TOKEN="0" * 64)
    assert f"{url} refuses the token in RAY_AUTH_TOKEN" in line
    file = laptop.home / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text(laptop.cluster.token)
    assert laptop("status", RAY_AUTH_TOKEN=None).code == 0
    file.unlink()


def test_addresses_and_jobs_that_are_not_there_are_one_line(laptop: Laptop) -> None:
    nowhere = "http://127.0.0.1:1"
    line = laptop.refused("submit", *QUICK, "--address", nowhere)
    assert line.startswith(f"error: cannot reach a Ray job server at {nowhere} (")
    gcs = f"http://{laptop.cluster.address}"
    assert f"{gcs} is no Ray job server" in laptop.refused("status", "--address", gcs)
    line = laptop.refused("status", RAY_API_SERVER_ADDRESS=None)
    assert "expected the cluster's job server like http://HEAD:8265" in line
    assert "no job and no study 'no-such'" in laptop.refused("logs", "no-such")
