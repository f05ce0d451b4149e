"""What every sampler promises, alone and behind `Proposals`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_lattice import Case, cases

from adq.search.config import SAMPLERS
from adq.search.history import History
from adq.search.lattice import Indices
from adq.search.samplers import make_sampler
from adq.search.samplers.base import Proposals, Sampler

optuna.logging.set_verbosity(optuna.logging.WARNING)

FOUR = [(4, 3, 1), (5, 4, 6), (6, 5, 2), (3, 7, 1)]
EXAMPLES = {"gp": 3, "adq": 5}  # their models take a while to fit, Optuna's up to seconds
OBJECTIVES = [(), ("average_bits",), ("size_bytes", "bops")]

every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def over(name: str, test: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
    """Run the test on examples, as many as the sampler's speed allows."""
    settings(max_examples=EXAMPLES.get(name, 15), deadline=None)(given(*strategies)(test))()


def sampler_of(
    name: str, case: Case, objectives: Sequence[str] = (), seeds: int | None = None
) -> Sampler:
    return make_sampler(name, case.lattice, objectives, len(case.seeds) if seeds is None else seeds)


def run(
    name: str,
    case: Case,
    count: int,
    objectives: Sequence[str] = (),
    seed: int = 0,
    metric: Callable[[Indices], float] | None = None,
) -> list[Indices | None]:
    """What `count` trials propose, told one after another."""
    proposals = Proposals(case.lattice, case.seeds, sampler_of(name, case, objectives), seed)
    history, found = History(len(case.lattice.sizes)), []
    for number in range(count):
        point = proposals.propose(number, history, [])
        found.append(point)
        if point is not None:
            history.add(point, (metric or case.metric)(point))
    return found


def texts(case: Case, points: Sequence[Indices | None]) -> list[str]:
    return [str(None if p is None else case.lattice.decode(p)) for p in points]


@every_sampler
def test_a_proposal_is_a_point(name: str) -> None:
    def check(case: Case, count: int, waiting: int, objectives: Sequence[str]) -> None:
        sampler = sampler_of(name, case, objectives, seeds=4)
        pending = [*case.lattice.random(np.random.default_rng(1), waiting)]
        point = sampler.propose(case.history(count), pending, np.random.default_rng(2))
        assert point.shape == case.lattice.sizes.shape
        assert np.issubdtype(point.dtype, np.integer)
        assert ((point >= 0) & (point < case.lattice.sizes)).all()

    over(name, check, cases, st.integers(0, 40), st.integers(0, 3), st.sampled_from(OBJECTIVES))


@every_sampler
def test_seeds_come_first_and_then_new_points_within_all_limits_until_none_is_left(
    name: str,
) -> None:
    def check(case: Case, objectives: Sequence[str]) -> None:
        fitting = list(map(str, case.fitting()))
        count = min(len(fitting), 7 if name == "gp" else 16)
        found = texts(case, run(name, case, count + 1, objectives))
        assert found[: len(case.seeds)] == list(map(str, case.seeds))
        assert len(set(found)) == len(found)
        if count < len(fitting):
            assert set(found) <= set(fitting)
        else:
            assert set(found[:-1]) == set(fitting)
            assert found[-1] == "None"

    over(name, check, cases, st.sampled_from(OBJECTIVES))


@every_sampler
@pytest.mark.parametrize("objectives", OBJECTIVES[:2])
def test_a_proposal_follows_from_history_pending_points_and_random_numbers_alone(
    name: str, objectives: Sequence[str]
) -> None:
    limited = () if name == "gp" else ("average_bits", "bops")
    case = Case(FOUR, act=(4, 0), limited=limited, seeds=8)
    history = case.history(26)
    pending = [*case.lattice.random(np.random.default_rng(1), 2)]

    def proposed(sampler: Sampler, told: int, waiting: list[Indices], seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return list(sampler.propose(history.first(told), waiting, rng).tolist())

    def new() -> Sampler:
        return sampler_of(name, case, objectives)

    asks = [(22, pending[:1], 3), (23, pending, 4), (23, [], 5), (26, pending[1:], 6)]
    asks = asks[:1] if name == "gp" else asks
    expected = [proposed(new(), *ask) for ask in asks]
    kept = new()
    for told in (
        0,
        7,
        *([] if name == "gp" else [14]),
    ):  # with others pending, and other random numbers
        proposed(kept, told, pending[told % 2 :], told)
    assert [proposed(kept, *ask) for ask in asks] == expected
    assert [proposed(kept, *ask) for ask in asks[::-1]] == expected[::-1]  # history goes back
    used = new()
    used.propose(case.history(24, seed=9), pending, np.random.default_rng(0))
    assert [proposed(used, *ask) for ask in asks] == expected


@every_sampler
def test_a_resumed_study_proposes_what_the_uninterrupted_one_did(name: str) -> None:
    case = Case(FOUR, act=(4, 8), seeds=5)
    kept = run(name, case, 8 if name == "gp" else 24, ("average_bits",))
    history = History(len(case.lattice.sizes))
    for number, point in enumerate(kept):
        assert point is not None
        if number in (3, 7, 11, 23):
            sampler = sampler_of(name, case, ("average_bits",))
            proposals = Proposals(case.lattice, case.seeds, sampler, seed=0)
            again = proposals.propose(number, history, [])
            assert texts(case, [again]) == texts(case, [point])
        history.add(point, case.metric(point))


@every_sampler
def test_another_seed_gives_other_points(name: str) -> None:
    case = Case(FOUR, bits=(2, 3, 4, 6, 8))
    one, other = (texts(case, run(name, case, 12, ("average_bits",), seed)) for seed in (5, 6))
    assert set(one) != set(other)


@every_sampler
def test_pending_points_are_not_proposed(name: str) -> None:
    case = Case(FOUR[:3], seeds=3)
    fitting = [case.lattice.encode(point) for point in case.fitting()]
    proposals = Proposals(case.lattice, case.seeds, sampler_of(name, case), seed=0)
    none = History(len(case.lattice.sizes))
    waiting: list[Indices] = []
    for number in range(len(fitting)):  # nothing is told: all are pending in the end
        point = proposals.propose(number, none, waiting)
        assert point is not None
        waiting.append(point)
    assert sorted(texts(case, waiting)) == sorted(texts(case, fitting))
    assert proposals.propose(len(fitting), none, waiting) is None
    for left in (0, len(fitting) // 2):
        history = case.history(12)
        taken = {p.tobytes() for p in history.points}
        others = [p for i, p in enumerate(fitting) if i != left and p.tobytes() not in taken]
        found = proposals.propose(99, history, others)
        known = fitting[left].tobytes() in taken
        assert texts(case, [found]) == texts(case, [None if known else fitting[left]])


@every_sampler
@pytest.mark.parametrize("objectives", OBJECTIVES[:2])
def test_failed_candidates_do_not_stop_the_proposals(name: str, objectives: Sequence[str]) -> None:
    case = Case(FOUR, seeds=3)
    fitting = set(map(str, case.fitting()))
    for failed in (lambda p: True, lambda p: p.sum() % 3 > 0):

        def metric(p: Indices, failed: Callable[[Indices], bool] = failed) -> float:
            return float("nan") if failed(p) else float(p.sum())

        count = 8 if name == "gp" else 20
        found = texts(case, run(name, case, count, objectives, metric=metric))
        assert len(set(found)) == count
        assert set(found) <= fitting


@every_sampler
def test_a_space_of_one_point_and_one_of_single_options_but_for_one_group(name: str) -> None:
    one = Case([(2, 3, 1)] * 3, bits=(4,), act=(0,))
    assert texts(one, run(name, one, 2)) == [str([(4, 0)] * 3), "None"]
    # the first and the last layer are pinned, and the inputs are in FP32
    few = Case([(2, 3, 1)] * 3, bits=(2, 3, 4), act=(0,), first_last=8, limits={})
    found = texts(few, run(name, few, 4, ("average_bits",)))
    assert set(found[:3]) == {str([(8, 0), (w, 0), (8, 0)]) for w in (2, 3, 4)}
    assert found[3] == "None"


@every_sampler
def test_the_only_points_of_a_tight_budget_in_a_large_space_are_all_found(name: str) -> None:
    """Of 4^12 points 13 fit: the smallest, and one step up in any one layer."""
    limits = {"average_bits": 12 * 6 * 2 + 6}
    case = Case([(3, 2, 1)] * 12, (2, 3, 4, 8), limits=limits)
    steps = [str([(3 if i == up else 2, 8) for i in range(12)]) for up in range(13)]
    found = texts(case, run(name, case, 14))
    assert sorted(found[:13]) == sorted(steps)
    assert found[13] == "None"


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "random"])
def test_later_proposals_learn_from_the_told_ones(name: str) -> None:
    """Only the second layer's place matters to the metric: proposals come to give it a higher one
    than the 2 of blind draws, whose mean over a dozen has a standard deviation of √(2 / 12)."""
    case = Case([(2, 3, 1)] * 6, (2, 3, 4, 6, 8), limits={})
    count = 120 if name.startswith("nsga") else 24  # twelve generations
    found = run(name, case, count, metric=lambda p: float(p[1]))
    assert np.mean([p[1] for p in found[-12:] if p is not None]) > 2 + 3 * (2 / 12) ** 0.5
