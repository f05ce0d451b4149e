"""Trainings that are given up, and nodes that are too small: when it is told, and how."""

import logging
import re
import types
from pathlib import Path
from typing import Any

import pytest
from jobs_to_do import JobsToDo
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from trainings import jobs_of

from adq.search.executors.callbacks import LOSSES, Deaths, Room, _death
from adq.search.executors.searcher import Search
from adq.search.jobs import TRIES, Bench


def a_trial(folder: Path) -> Any:
    trial: Any = Trial("train", stub=True, max_failures=TRIES - 1)
    trial.storage = types.SimpleNamespace(trial_driver_staging_path=str(folder))
    trial.set_status(Trial.RUNNING)
    return trial


def deaths_until_given_up(trial: Any, deaths: Deaths, epochs: list[int]) -> int:
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
    deaths = Deaths(Search(JobsToDo([]), watched, lambda _: None))
    assert deaths_until_given_up(a_trial(tmp_path), deaths, epochs) == expected


NODE = "The actor died because its node has died. Node Id: 1c69. A component crashed"
RESET = "RPC error: recvmsg:Connection reset by peer rpc_code: 14. The task may or may not"
KILLED = "The actor died unexpectedly before finishing this task. Worker unexpectedly exits."


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([KILLED, KILLED, KILLED], TRIES),
        ([KILLED, NODE, RESET, KILLED, KILLED], 5),
        ([KILLED, KILLED, NODE], 3),  # Tune gives up before it asks
        ([NODE] * (LOSSES + TRIES), LOSSES + TRIES),  # one that takes its node with it
        ([NODE, RESET] * (LOSSES // 2), 0),
    ],
)
def test_a_lost_node_is_no_death_of_the_training(
    texts: list[str], expected: int, watched: Bench, tmp_path: Path
) -> None:
    deaths, trial = Deaths(Search(JobsToDo([]), watched, lambda _: None)), a_trial(tmp_path)
    given_up = 0
    for count, text in enumerate(texts, 1):
        trial.handle_error(TuneError(text))
        if not trial.should_recover():
            given_up = count
            break
        deaths.on_trial_recover(0, [], trial)
    assert given_up == expected


def test_a_training_that_is_given_up_tells_for_how_long_it_was_tried(
    watched: Bench, tmp_path: Path
) -> None:
    source = JobsToDo(jobs_of(watched, 1, epochs=1))
    search = Search(source, watched, lambda _: None)
    trial = a_trial(tmp_path)
    assert search.suggest(trial.trial_id)
    trial.run_metadata.start_time -= 100
    trial.handle_error(TuneError("a node is gone"))
    Deaths(search).on_trial_error(0, [], trial)
    assert search.error is None
    record = source.records["0000-0"]
    assert record.error == f"given up after {TRIES} deaths of its process: a node is gone"
    assert record.seconds == pytest.approx(100, abs=20)


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
    monkeypatch.setattr("adq.search.executors.callbacks.time.monotonic", lambda: now[0])
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    full = Room(2, 1, 0.0)

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
