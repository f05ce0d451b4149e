"""A study on a cluster of three nodes, in which a process, a machine and the driver die."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from lives import essence
from ray_cluster import RayCluster, ray_cluster, wait_until

from adq.search.folder import FINAL, TRIALS, StudyFolder

SUPPORT = Path(__file__).parents[1] / "support"
SLOW = """
import time
from dataclasses import replace
from torch.nn import functional as F
from helper import make_task as fast

def loss(outputs, targets):
    time.sleep(0.02)  # so that an epoch takes a fifth of a second
    return F.cross_entropy(outputs, targets)

def make_task():
    return replace(fast(), loss=loss)
"""
STUDY = [
    "--task", "slow:make_task", "--budget-bits", "4", "--bits", "2,3,4,6", "--act-bits", "4,8",
    "--proxies", "empirical-fisher", "--trials", "14", "--epochs", "3", "--final-epochs", "1",
    "--window", "4", "--device", "cpu", "--study", "s",
]  # fmt: skip


def command(folder: Path, env: dict[str, str], *words: str) -> str:
    """What adq-search prints; fails where that fails."""
    found = subprocess.run(
        ["adq-search", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=400
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found.stdout


def called(pids: list[int], words: str) -> list[int]:
    """Those of the processes whose command line has these words."""
    found = []
    for pid in pids:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if words in line:
            found.append(pid)
    return found


def records(folder: Path) -> int:
    return len([*folder.glob("trials/*.json")])


def test_records_are_those_of_an_undisturbed_study_whatever_dies(tmp_path: Path) -> None:
    there, home = tmp_path / "there", tmp_path / "home"
    there.mkdir()
    project = home / "project"
    project.mkdir(parents=True)
    shutil.copy(SUPPORT / "tiny_task.py", project / "helper.py")
    (project / "slow.py").write_text(SLOW)
    with ray_cluster(nodes=2, cpus=1, env={"HOME": str(there)}) as cluster:
        env = cluster.env | {"HOME": str(home)}
        command(project, env, *STUDY, "--executor", "local", "--out", "calm")
        expected = essence(StudyFolder(project / "calm" / "s"))
        assert len([name for name in expected if name.startswith(TRIALS)]) == 14

        command(project, env, "submit", *STUDY, "--workers", "3", "--no-follow")
        folder = there / "adq-runs" / "s"
        wait_until(lambda: records(folder) >= 2, "two trials")
        kill_one_training(cluster, folder)
        wait_until(lambda: records(folder) >= 5, "five trials")
        cluster.kill_node(2)
        wait_until(lambda: records(folder) >= 8, "eight trials")
        kill_driver(cluster)
        kept = essence(StudyFolder(folder))
        assert len(kept) < 14
        wait_until(lambda: job(project, env)["status"] == "FAILED", "the job's end")

        out = command(project, env, "submit", "--resume", "s", "--workers", "2", "--follow")
        assert "Pareto front of study s" in out
        command(project, env, "fetch", "s")
        found = essence(StudyFolder(project / "runs" / "s"))
    assert {name: found[name] for name in kept} == kept
    assert found == expected
    assert {path.name for path in (project / "runs" / "s" / FINAL).iterdir()} == {
        path.name for path in (project / "calm" / "s" / FINAL).iterdir()
    }


def kill_one_training(cluster: RayCluster, folder: Path) -> None:
    def training() -> list[int]:
        pids = [pid for node in cluster.nodes for pid in node.pids()]
        return called(pids, "ImplicitFunc.train")

    pid, *_ = wait_until(training, "a training")
    os.kill(pid, signal.SIGKILL)


def kill_driver(cluster: RayCluster) -> None:
    drivers = called(cluster.nodes[0].pids(), "adq-search --task")  # and the shell it runs in
    assert drivers
    for pid in reversed(drivers):
        os.kill(pid, signal.SIGKILL)


def job(project: Path, env: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command(project, env, "status", "s", "--json"))
    return found
