"""Processes killed at random moments of a study: nothing is lost, nothing is done twice."""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lives import Mother, essence
from postgres import PostgresServer, postgres_server

from adq.search.folder import FINAL, TRIALS, StudyFolder

KILLS = 50
OPTIONS = {
    "budget_bits": 4.0,
    "bits": [2, 3, 4, 6],
    "act_bits": [4, 8],
    "proxies": "empirical-fisher",
    "trials": 16,
    "epochs": 2,
    "final_epochs": 2,
    "device": "cpu",
    "study": "s",
    "window": 2,
}
KINDS = {
    "plain": {},
    "rungs and warm starts": {"rungs": [0, 1], "reduction": 2, "warm_start": "on"},
}


class Watch:
    """Looks at a study after each death."""

    def __init__(self, folder: StudyFolder, log: Path) -> None:
        self.folder, self.log = folder, log
        self.kept: dict[str, Any] = {}
        self.read = 0

    def look(self) -> None:
        """Fails where a result is gone or changed, or is worked out once more."""
        words = self.log.read_text().splitlines() if self.log.exists() else []
        for line in words[self.read :]:
            what, job, *_ = line.split()
            kind, id = (FINAL if job.startswith(("t", "uniform")) else TRIALS), job.rpartition("-")
            known = self.kept.get(f"{kind}/{id[0]}")
            if what == "start" and known is not None:
                assert len(known["rungs"]) <= int(id[2]), f"{job} is done once more"
        self.read = len(words)
        now = essence(self.folder)
        for name, before in self.kept.items():
            rungs = before["rungs"]
            assert now[name]["rungs"][: len(rungs)] == rungs, f"{name} is lost or changed"
        self.kept = now


def epochs_done_twice(log: Path) -> list[str]:
    """A checkpoint is written before an epoch is logged: what goes on from it trains it no more."""
    lines = Counter(line for line in log.read_text().splitlines() if line.startswith("epoch"))
    return [line for line, count in lines.items() if count > 1]


@pytest.fixture
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_killed_at_random_moments_loses_and_repeats_nothing(
    tmp_path: Path, kind: str
) -> None:
    check(tmp_path, KINDS[kind], KILLS // len(KINDS), 1, seed=1)


def test_two_processes_on_postgresql_killed_at_random_moments_lose_and_repeat_nothing(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    check(tmp_path, {"storage": postgres.url}, KILLS, 2, seed=2)


def check(
    tmp_path: Path, options: dict[str, Any], kills: int, side_by_side: int, seed: int
) -> None:
    draw = random.Random(seed)
    calm_log, log = tmp_path / "calm.log", tmp_path / "log"
    calm = OPTIONS | options | {"out": str(tmp_path / "calm")}
    calm.pop("storage", None)
    with Mother(calm_log) as mother:
        assert mother.live(calm) == ["done"]  # what is loaded once is loaded now
        again = calm | {"out": str(tmp_path / "timed")}
        began = time.monotonic()
        assert mother.live(again) == ["done"]
        seconds = time.monotonic() - began
    expected = essence(StudyFolder(tmp_path / "calm" / "s"))
    assert essence(StudyFolder(tmp_path / "timed" / "s")) == expected
    trials = len([name for name in expected if name.startswith(TRIALS)])
    assert trials == OPTIONS["trials"]

    killed = number = 0
    with Mother(log) as mother:
        while killed < kills:
            out = tmp_path / f"dying-{number}"
            name = {"study": f"s{number}"} if "storage" in options else {}
            mine = OPTIONS | options | name | {"out": str(out)}
            folder = StudyFolder(out / mine["study"])
            log.write_text("")
            watch = Watch(folder, log)
            while True:
                last = killed >= kills
                deaths = [
                    None if last else draw.uniform(0, seconds / 2) for _ in range(side_by_side)
                ]
                ends = mother.live(mine, deaths)
                assert set(ends) <= {"killed", "done"}, ends
                killed += ends.count("killed")
                watch.look()
                if "done" in ends:
                    break
            assert essence(folder) == expected
            assert epochs_done_twice(log) == []
            assert json.loads(folder.file("results.json").read_text())["trials"] == trials
            number += 1
