"""A cluster on a simulated clock, driven by a real study or by a model of one.

The driver does one thing at a time. Where a training has ended it takes the result; where a worker
is free it asks for the next training. Both take simulated time: with a real study as long as they
took on this machine's clock. Workers train for a simulated time, and wait in between.
"""

import heapq
import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from grounds.made_up import record_of

from adq.search.jobs import Job
from adq.search.study import StudyLoop


@dataclass(frozen=True)
class Cluster:
    """Workers, and how long they train.

    trial_s  mean seconds of a training, with a relative standard deviation `spread` (lognormal)
    deaths   the share of trainings whose worker dies in the end, so that they take twice as long
    failures the share of trials that fail, and so end, half-way through
    per_trial_s  seconds of the driver for a training beside ask and tell
    """

    workers: int
    trial_s: float = 120.0
    spread: float = 0.1
    deaths: float = 0.01
    failures: float = 0.01
    per_trial_s: float = 0.0
    seed: int = 0

    def training(self, number: int) -> tuple[float, bool]:
        """Seconds that the number-th training occupies a worker, and whether it fails."""
        rng = np.random.default_rng([self.seed, number])
        width = np.sqrt(np.log1p(self.spread**2))
        seconds = self.trial_s * float(rng.lognormal(-(width**2) / 2, width))
        dies, fails = rng.random(2) < (self.deaths, self.failures)
        return seconds * (2.0 if dies else 1.0) * (0.5 if fails else 1.0), bool(fails)


class Driver(Protocol):
    """What says which training is next; times are seconds of the driver."""

    def ask(self) -> tuple[int | None, float]:
        """The number of the next training, None where there is none now."""

    def tell(self, number: int, failed: bool) -> float:
        """A training has ended."""


class RealDriver:
    """A study, its trials numbered as they are asked for."""

    def __init__(self, loop: StudyLoop) -> None:
        self._loop, self._jobs = loop, dict[int, Job]()

    def ask(self) -> tuple[int | None, float]:
        started = time.perf_counter()
        job = self._loop.ask()
        took = time.perf_counter() - started
        if job is None:
            return None, took
        self._jobs[int(job.id)] = job
        return int(job.id), took

    def tell(self, number: int, failed: bool) -> float:
        job = self._jobs.pop(number)
        record = record_of(self._loop.problem, job, "made up" if failed else None)
        started = time.perf_counter()
        self._loop.tell(job, record)
        return time.perf_counter() - started


@dataclass(frozen=True)
class Seconds:
    """What the driver takes for an ask while no result is due yet, for one later, for a tell."""

    blind_ask_s: float
    ask_s: float
    tell_s: float


class ModelDriver:
    """The rule of the window alone: training i may begin when the results of all before
    i − window + 1 are there."""

    def __init__(self, trials: int, window: int, seconds: Seconds) -> None:
        self._trials, self._window, self._seconds = trials, window, seconds
        self._asked = self._taken = 0
        self._done: set[int] = set()

    def ask(self) -> tuple[int | None, float]:
        if self._asked == min(self._trials, self._taken + self._window):
            return None, 0.0
        self._asked += 1
        blind = self._asked <= self._window
        return self._asked - 1, self._seconds.blind_ask_s if blind else self._seconds.ask_s

    def tell(self, number: int, failed: bool) -> float:
        self._done.add(number)
        while self._taken in self._done:
            self._done.remove(self._taken)
            self._taken += 1
        return self._seconds.tell_s


@dataclass
class Course:
    """What came of a simulation, seconds of its clock.

    begun, ended  of each training, by number
    ask_s, tell_s of the driver, in the order in which it did them; asks without an answer count
                  in `vain_s`
    """

    cluster: Cluster
    begun: dict[int, float] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    ask_s: list[float] = field(default_factory=list)
    tell_s: list[float] = field(default_factory=list)
    vain_s: float = 0.0

    def busy(self, low: float, high: float) -> float:
        """The share of the workers' time between two moments in which they trained."""
        spans = np.array([[self.begun[i], self.ended[i]] for i in self.begun])
        inside = np.clip(spans[:, 1], low, high) - np.clip(spans[:, 0], low, high)
        return float(inside.sum()) / (self.cluster.workers * (high - low))

    @property
    def supplied_s(self) -> float:
        """When the last training began: from there on there is not enough to do."""
        return max(self.begun.values())

    @property
    def from_start(self) -> float:
        return self.busy(0.0, self.supplied_s)

    @property
    def steady(self) -> float:
        """From when every worker has had a result, on average, for as long as there is enough."""
        return self.busy(min(2 * self.cluster.trial_s, self.supplied_s / 2), self.supplied_s)

    @property
    def driver_s_per_trial(self) -> float:
        """Seconds of the driver a trial, without those of `Cluster.per_trial_s`."""
        return (sum(self.ask_s) + sum(self.tell_s) + self.vain_s) / len(self.begun)


def simulate(cluster: Cluster, driver: Driver) -> Course:
    """Until the driver has nothing more and every training has ended."""
    course = Course(cluster)
    now, idle, none_now = 0.0, cluster.workers, False
    running: list[tuple[float, int, bool]] = []
    while True:
        if idle and not none_now:
            number, took = driver.ask()
            now += took
            if number is None:
                none_now = True
                course.vain_s += took
                continue
            now += cluster.per_trial_s
            idle -= 1
            seconds, fails = cluster.training(number)
            course.begun[number], course.ended[number] = now, now + seconds
            course.ask_s.append(took)
            heapq.heappush(running, (now + seconds, number, fails))
        elif running:
            end, number, fails = heapq.heappop(running)
            now = max(now, end)
            took = driver.tell(number, fails)
            now += took
            course.tell_s.append(took)
            idle, none_now = idle + 1, False
        else:
            return course
