"""A process that dies at any step: the study goes on as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_studies import Bench, Deaths, copy_of, fitting_points, load, make_study, state_of
from optuna.trial import TrialState
from toy_space import smallest

from adq.search.folder import TRIALS, StudyFolder

RUNGS = [{"trials": 3}, {"trials": 7, "rungs": (0, 1), "reduction": 2}]


@pytest.mark.parametrize("options", RUNGS, ids=["no rungs", "rungs"])
def test_a_process_killed_at_any_step_is_resumed_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """A seed, a proposal that fails in training, proposals that do not. What a kill leaves is the
    disk as it was: a copy of the folder after each change."""
    folder, bench = make_study(tmp_path / "calm", **options)
    bench.seeds = [bench.problem.space.uniform(3)]
    deaths = Deaths(monkeypatch)
    copies: list[StudyFolder] = []
    states: list[dict[Path, bytes]] = []

    def keep() -> None:
        parts = (p for name in ("study.db", "trials") for p in folder.path.rglob(f"{name}*"))
        state = {p: p.read_bytes() for d in parts for p in (d, *d.glob("*")) if p.is_file()}
        if not states or state != states[-1]:
            states.append(state)
            copies.append(copy_of(folder, tmp_path / f"killed-{len(copies)}"))

    deaths.on_tick = keep
    bench.die = deaths.tick
    assert deaths.run(bench, folder, at=-1) is True
    expected, deaths.on_tick = state_of(folder), None
    assert set(bench.evaluated.values()) == {1}
    # nothing yet; then for each trial: asked, promoted, a record a rung, marked as pruned, and told
    changes = 2 * options["trials"] + 2 * len(bench.evaluated) - options["trials"] + pruned(folder)
    assert len(copies) == 1 + changes
    for step, copy in enumerate(copies):
        again = Bench(bench.problem, seeds=bench.seeds)
        done = {f"{r.id}@{rung.epochs}" for r in copy.records(TRIALS) for rung in r.rungs}
        assert again.run(copy) is True
        assert state_of(copy) == expected, f"killed at step {step}"
        assert again.evaluated.keys() == bench.evaluated.keys() - done


def pruned(folder: StudyFolder) -> int:
    return sum(t.state == TrialState.PRUNED for t in load(folder).get_trials())


def test_an_error_at_any_step_of_a_trial_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C has it: the code between the error and the top runs on its way out."""
    template, bench = make_study(tmp_path / "template", trials=2)
    deaths = Deaths(monkeypatch)
    bench.seeds, bench.failing, bench.die = [bench.problem.space.uniform(3)], (), deaths.tick
    calm = copy_of(template, tmp_path / "calm")
    assert deaths.run(bench, calm, at=-1) is True
    expected, steps = state_of(calm), deaths.count
    for at in range(steps // 2, steps, 2):  # the end of one step is the beginning of the next
        folder = copy_of(template, tmp_path / f"died-{at}")
        bench.evaluated.clear()
        assert deaths.run(bench, folder, at) is None
        assert deaths.run(bench, folder, at=-1) is True
        assert state_of(folder) == expected, f"after a death at step {at}"
        # a candidate is evaluated again only where its record was never written
        assert sum(bench.evaluated.values()) <= 3


def test_a_process_that_dies_again_and_again_gets_there(
    fresh: Callable[[str], StudyFolder], template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = Deaths(monkeypatch)
    calm, folder = fresh("calm"), fresh("dying")
    deaths.run(Bench(template[1].problem, die=deaths.tick), calm, at=-1)
    for life in range(60):
        bench = Bench(template[1].problem, die=deaths.tick)
        if deaths.run(bench, folder, at=5 + 3 * (life % 2)):
            break
    else:
        pytest.fail("it never got there")
    assert life > 4
    assert state_of(folder) == state_of(calm)


def test_death_while_the_end_of_the_space_is_noticed_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, bench = make_study(tmp_path / "a", bits=(2, 3), trials=9, budget_bits=2.8)
    bench.seeds = [smallest(bench.problem.space)]
    assert fitting_points(bench.problem) == 2
    first = copy_of(template, tmp_path / "first")
    deaths = Deaths(monkeypatch)
    assert deaths.run(bench, first, at=-1) is False
    expected, steps = state_of(first), deaths.count
    for at in range(steps - 6, steps):  # a record, a tell, and the end noticed
        folder = copy_of(template, tmp_path / f"died-{at}")
        assert deaths.run(bench, folder, at) is None
        assert deaths.run(bench, folder, at=-1) is False
        assert state_of(folder) == expected
