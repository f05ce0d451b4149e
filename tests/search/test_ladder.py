"""The fidelity ladder against a slow version that looks at everything anew."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq.search.ladder import BANDS, Ladder, Result, band_of, ranked


def dominates(a: Result, b: Result) -> bool:
    mine, other = [-a.metric, *a.costs], [-b.metric, *b.costs]
    return mine != other and all(m <= o for m, o in zip(mine, other, strict=True))


def slow_ranking(results: dict[int, Result]) -> list[int]:
    """Front after front is taken off; each is sorted."""
    left, out = dict(results), list[int]()
    while left:
        front = [n for n, r in left.items() if not any(dominates(o, r) for o in left.values())]
        out += sorted(front, key=lambda n: (-left[n].metric, left[n].loss, n))
        for n in front:
            del left[n]
    return out


few = st.sampled_from([0.1, 0.2, 0.3])  # so that there are ties
results = st.builds(Result, few, few, st.tuples(few, few) | few.map(lambda c: (c, c)))


@given(st.lists(results, max_size=12))
def test_candidates_are_ranked_front_after_front(found: Sequence[Result]) -> None:
    numbered = {7 * i % 13: result for i, result in enumerate(found)}
    assert ranked(numbered) == slow_ranking(numbered)


class SlowLadder:
    """A list of all that happened; every question is answered from it alone."""

    def __init__(self, rungs: int, reduction: int) -> None:
        self.rungs, self.reduction = rungs, reduction
        self.starts: list[tuple[int, int, int]] = []  # candidate, rung, band
        self.results: list[tuple[int, int, Result]] = []  # candidate, rung
        self.failed: list[int] = []
        self.stopped: list[int] = []

    def promotion(self, last: bool) -> tuple[int, int] | None:
        band_of_candidate = {n: band for n, _, band in self.starts}
        done = {(n, rung) for n, rung, _ in self.results}
        running = [
            (n, rung)
            for n, rung, _ in self.starts
            if (n, rung) not in done and n not in self.failed
        ]
        for rung in range(self.rungs - 2, -1, -1):
            for band in range(BANDS):
                here = {
                    n: result
                    for n, r, result in self.results
                    if r == rung and band_of_candidate[n] == band and n not in self.failed
                }
                allowed = len(here) // self.reduction
                coming = any(r <= rung and band_of_candidate[n] == band for n, r in running)
                if last and allowed == 0 and not coming:
                    allowed = 1
                for n in slow_ranking(here)[:allowed]:
                    started = any(m == n and r == rung + 1 for m, r, _ in self.starts)
                    if not started and n not in self.stopped:
                        return n, rung + 1
        return None

    def waiting(self) -> list[int]:
        """Those whose last start has a result, on a rung below the top."""
        latest = {n: rung for n, rung, _ in self.starts}  # starts come in rising rungs
        done = {(n, rung) for n, rung, _ in self.results}
        return sorted(
            n
            for n, rung in latest.items()
            if (n, rung) in done
            and rung < self.rungs - 1
            and n not in self.failed
            and n not in self.stopped
        )


@settings(max_examples=200)
@given(
    st.integers(1, 3),
    st.integers(2, 3),
    st.lists(
        st.tuples(st.sampled_from("nnnppptttttlfs"), st.integers(0, 99), results), max_size=60
    ),
)
def test_the_ladder_does_as_the_slow_one(
    rungs: int, reduction: int, events: list[tuple[str, int, Result]]
) -> None:
    """n: a new candidate, p: a promotion, l: one of the last, t: a result, f: a failure, s: one is
    stopped, at random."""
    fast, slow = Ladder(range(rungs), reduction), SlowLadder(rungs, reduction)
    running: dict[int, int] = {}
    asked = 0
    for kind, choice, result in events:
        if kind == "n":
            band = choice % 2 * 3
            fast.start(asked, 0, band)
            slow.starts.append((asked, 0, band))
            running[asked] = 0
            asked += 1
        elif kind in "pl":
            found = fast.promotion(last=kind == "l")
            assert found == slow.promotion(kind == "l")
            if found is not None:
                candidate, rung = found
                band = next(b for n, _, b in slow.starts if n == candidate)
                fast.start(candidate, rung, band)
                slow.starts.append((candidate, rung, band))
                running[candidate] = rung
        elif kind in "tf" and running:
            candidate = sorted(running)[choice % len(running)]
            rung = running.pop(candidate)
            if kind == "t":
                fast.finish(candidate, result)
                slow.results.append((candidate, rung, result))
            else:
                fast.fail(candidate)
                slow.failed.append(candidate)
        elif kind == "s" and (waiting := fast.waiting()):
            fast.stop(waiting[choice % len(waiting)])
            slow.stopped.append(waiting[choice % len(waiting)])
        assert fast.waiting() == slow.waiting()


def plain(metric: float, cost: float = 1.0) -> Result:
    return Result(metric, 1 - metric, (cost,))


def test_the_best_third_goes_on_as_soon_as_there_are_three() -> None:
    ladder = Ladder((0, 1, 3), 3)
    for n, metric in enumerate([0.5, 0.7, 0.6]):
        ladder.start(n, 0, band=0)
        assert ladder.promotion() is None
        ladder.finish(n, plain(metric))
    assert ladder.promotion() == (1, 1)
    ladder.start(1, 1, band=0)
    assert ladder.promotion() is None
    ladder.finish(1, plain(0.8))
    assert ladder.promotion() is None  # one of one is less than a third
    assert ladder.promotion(last=True) == (1, 2)
    assert ladder.waiting() == [0, 1, 2]


def test_bands_do_not_compete() -> None:
    ladder = Ladder((0, 1), 2)
    for n, (metric, band) in enumerate([(0.1, 0), (0.2, 0), (0.8, 3), (0.9, 3)]):
        ladder.start(n, 0, band)
        ladder.finish(n, plain(metric))
    assert ladder.promotion() == (1, 1)
    ladder.start(1, 1, 0)
    assert ladder.promotion() == (3, 1)


def test_the_last_promotions_wait_for_what_is_on_its_way() -> None:
    ladder = Ladder((0, 1), 3)
    ladder.start(0, 0, 0)
    ladder.start(1, 0, 0)
    ladder.finish(0, plain(0.5))
    assert ladder.promotion(last=True) is None
    ladder.finish(1, plain(0.6))
    assert ladder.promotion(last=True) == (1, 1)


@pytest.mark.parametrize(("least", "limit"), [(0, 400), (37, 1234), (5, 5), (5, 6), (9, 5)])
def test_bands_are_equal_parts_of_the_range(least: int, limit: int) -> None:
    for cost in range(least, max(least, limit) + 1):
        band = band_of(cost, least, limit)
        assert 0 <= band < BANDS
        if limit > least:
            edges = [least + (limit - least) * i / BANDS for i in range(BANDS)]
            assert band == max(i for i, edge in enumerate(edges) if edge <= cost)
        else:
            assert band == 0
