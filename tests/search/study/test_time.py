"""The time budget, and seconds that add up over processes."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_studies import MANY, Bench, make_study

from adq.quant.errors import InputError
from adq.search.folder import TRIALS, Clock
from adq.search.front import front_records


class StoppedClock(Clock):
    """Shows what it is set to."""

    seconds = 0.0  # type: ignore[assignment]

    def __init__(self) -> None:
        pass

    def save(self) -> None:
        pass


def test_the_time_budget_leaves_room_for_the_final_training(tmp_path: Path) -> None:
    """An epoch takes 0.25 s here, final training 10 of them for each model of the front and two
    more; another candidate starts while that still ends in time."""
    options = MANY | {"trials": 50, "time_budget": 20.0, "final_epochs": 10}
    folder, bench = make_study(tmp_path, **options)
    bench.clock = clock = StoppedClock()
    with bench.loop(folder, uniform=2) as loop:
        told = 0
        while True:
            front = len(front_records(folder.records(TRIALS), bench.problem.objectives))
            may = told == 0 or clock.seconds + (front + 2) * 10 * 0.25 <= 20
            job = loop.ask()
            assert (job is not None) == may
            if job is None:
                break
            clock.seconds += 0.5  # type: ignore[misc]
            loop.tell(job, bench.result(job))
            told += 1
        assert 1 < told < 50
        assert re.fullmatch(
            rf"the search ends after {told} trials: final training takes about \d+ s, and \d+ s of "
            r"the time budget of 20 s are over",
            loop.end,
        )


def test_one_candidate_is_trained_to_the_end_however_short_the_time(tmp_path: Path) -> None:
    folder, bench = make_study(tmp_path, **MANY, time_budget=1.0, rungs=(0, 1), reduction=2)
    bench.clock = clock = StoppedClock()
    clock.seconds = 5.0  # type: ignore[misc]
    bench.run(folder)
    (record,) = folder.records(TRIALS)
    assert [rung.epochs for rung in record.rungs] == [0, 1, 2]
    assert record.validation is not None
    more = replace(bench.problem, config=replace(bench.problem.config, time_budget=1e6))
    Bench(more).run(folder)
    assert len(folder.records(TRIALS)) == 14


def test_the_seconds_of_all_processes_add_up(tmp_path: Path) -> None:
    path = tmp_path / "clock.json"
    first = Clock(path)
    time.sleep(0.02)
    first.save()
    second = Clock(path)
    assert second.seconds >= 0.02
    time.sleep(0.01)
    second.save()
    assert Clock(path).seconds >= 0.03
    assert Clock(path).seconds < 60
    path.write_text("[]")
    with pytest.raises(InputError, match=r"clock\.json is damaged"):
        Clock(path)
