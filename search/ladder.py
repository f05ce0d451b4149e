"""The fidelity ladder: which candidates are worth a longer training, by rank within a cost band.

Asynchronous successive halving (ASHA, Li et al., arXiv 1810.05934). Rungs are numbers of epochs,
cheapest first. A candidate that finished rung r goes on to rung r + 1 when it is among the best
⌊n/η⌋ of the n candidates of its band that finished rung r.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adq.search.pareto import levels

BANDS = 4
"""So that cheap models need not beat dear ones. Of 24 trials each band gets about 6, of which η = 3
sends 2 up; in more bands there would be nothing to compare."""


@dataclass(frozen=True)
class Result:
    """What a candidate reached on a rung (validation metric, loss), and what it costs."""

    metric: float
    loss: float
    costs: tuple[float, ...]


def band_of(cost: int, least: int, limit: int, bands: int = BANDS) -> int:
    """Which of equal parts of [least, limit] a cost is in, 0 for the cheapest."""
    if limit <= least:
        return 0
    return max(0, min(bands - 1, (cost - least) * bands // (limit - least)))


def ranked(results: Mapping[int, Result]) -> list[int]:
    """Candidates from best to worst.

    By level of non-dominated sorting in (metric, costs), then by metric, by loss, by number.
    """
    numbers = sorted(results)
    rows = [[-results[n].metric, *results[n].costs] for n in numbers]
    keys = {
        n: (level, -results[n].metric, results[n].loss, n)
        for n, level in zip(numbers, levels(rows).tolist(), strict=True)
    }
    return sorted(numbers, key=keys.__getitem__)


class Ladder:
    """Where each candidate stands. What is promoted follows from the results so far, in whatever
    order they came, and from what is running."""

    def __init__(self, rungs: Sequence[int], reduction: int) -> None:
        self.rungs, self.reduction = tuple(rungs), reduction
        self._band: dict[int, int] = {}
        self._running: dict[int, int] = {}  # candidate -> rung
        self._results: dict[tuple[int, int], dict[int, Result]] = {}  # (band, rung) -> candidates
        self._started: list[set[int]] = [set() for _ in self.rungs]
        self._out: set[int] = set()
        self._order: dict[tuple[int, int], list[int]] = {}  # `ranked`, until a result changes it

    @property
    def top(self) -> int:
        return len(self.rungs) - 1

    @property
    def running(self) -> bool:
        return bool(self._running)

    def start(self, candidate: int, rung: int, band: int) -> None:
        """The candidate is being trained on this rung."""
        self._band[candidate] = band
        self._running[candidate] = rung
        self._started[rung].add(candidate)

    def finish(self, candidate: int, result: Result) -> None:
        """The rung that the candidate was on is done."""
        place = self._band[candidate], self._running.pop(candidate)
        self._results.setdefault(place, {})[candidate] = result
        self._order.pop(place, None)

    def fail(self, candidate: int) -> None:
        """The candidate leaves the ladder: it is compared with nothing any more."""
        self._running.pop(candidate, None)
        for place in [p for p in self._results if p[0] == self._band[candidate]]:
            if self._results[place].pop(candidate, None) is not None:
                self._order.pop(place, None)

    def stop(self, candidate: int) -> None:
        """The candidate goes no further; what it reached still counts."""
        self._out.add(candidate)

    def waiting(self) -> list[int]:
        """Candidates that finished a rung below the top one and may go on, by number."""
        done = {n for (_, rung), found in self._results.items() if rung < self.top for n in found}
        return sorted(done - self._out - set(self._running) - self._started[self.top])

    def promotion(self, last: bool = False) -> tuple[int, int] | None:
        """(candidate, rung to train it on), the highest rung first; None where none is due.

        When no new candidate will come (`last`), the best one of a band goes on even where there
        are fewer than η, as soon as nothing in the band is on its way to that rung.
        """
        for rung in reversed(range(self.top)):
            for band in range(BANDS):
                found = self._results.get((band, rung), {})
                quota = len(found) // self.reduction
                if last and not quota and not self._coming(band, rung):
                    quota = 1
                for candidate in self._best(band, rung)[:quota] if quota else ():
                    if candidate not in self._started[rung + 1] and candidate not in self._out:
                        return candidate, rung + 1
        return None

    def _coming(self, band: int, rung: int) -> bool:
        return any(r <= rung and self._band[n] == band for n, r in self._running.items())

    def _best(self, band: int, rung: int) -> list[int]:
        place = band, rung
        if place not in self._order:
            self._order[place] = ranked(self._results.get(place, {}))
        return self._order[place]
