"""What is shown on the terminal: progress on stderr, in bars or, where it is none, in plain lines;
tables and fronts on stdout."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import TracebackType
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from adq.search.observer import Observer

if TYPE_CHECKING:
    from adq.search.front import Front


class PlainObserver(Observer):
    """One line a step: seconds since the start, stage, how far, what came of it."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._stage, self._done, self._total = "", 0, 0

    def stage(self, name: str, total: int) -> None:
        self._stage, self._done, self._total = name, 0, total

    def step(self, note: str = "") -> None:
        self._done += 1
        self.message(f"{self._stage} {self._done}/{self._total} {note}".rstrip())

    def note(self, text: str) -> None:
        self.message(f"{self._stage} {self._done}/{self._total} {text}")

    def best(self, text: str) -> None:
        self.message(text)

    def message(self, text: str) -> None:
        seconds = time.monotonic() - self._started
        print(f"[{seconds:6.1f} s] {text}", file=sys.stderr, flush=True)


class BarObserver(Observer):
    """A bar a stage, with the last note, and below them the best result so far."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:15}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        self._bar: TaskID | None = None
        self._best = Text("", style="bold")
        self._live = Live(Group(self._progress, self._best), console=console)

    def __enter__(self) -> "BarObserver":
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def stage(self, name: str, total: int) -> None:
        self._bar = self._progress.add_task(name, total=total, note="")

    def step(self, note: str = "") -> None:
        if self._bar is not None:
            self._progress.update(self._bar, advance=1, note=note)

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._progress.update(self._bar, note=text)

    def best(self, text: str) -> None:
        self._best.plain = text

    def message(self, text: str) -> None:
        self._live.console.print(text, highlight=False, markup=False)


@contextmanager
def observing() -> Iterator[Observer]:
    """Progress on standard error, and whatever else is printed meanwhile as well."""
    console = Console(stderr=True)
    # what a user's code prints is no result of ours, nor what the solver's C++ does
    with redirect_stdout(sys.stderr), _descriptor_to_stderr():
        if console.is_terminal:
            with BarObserver(console) as observer:
                yield observer
        else:
            yield PlainObserver()


@contextmanager
def _descriptor_to_stderr() -> Iterator[None]:
    """Send what is written to the process's standard output, past Python, to standard error."""
    stdout, stderr = 1, 2
    kept = os.dup(stdout)
    os.dup2(stderr, stdout)
    try:
        yield
    finally:
        os.dup2(kept, stdout)
        os.close(kept)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A table on standard output."""
    table = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # a file or a pipe has no width to fold at
    console.print(table, highlight=False, markup=False)


def print_front(front: "Front", as_json: bool) -> None:
    """A front as a table, with its hypervolume and best model; or as JSON."""
    if as_json:
        print(json.dumps(front.to_json(), indent=1))
        return
    from adq.search.report.units import reference_text

    final = front.split == "test"
    metric = f"{front.split} {front.metric_name}"
    timed = front.best.latency_s is not None
    rows = [["FP32", "32", "32", "", "", *[""] * timed, f"{front.fp32_metric:.4f}"]]
    marks = {front.best.id: "best"}
    if front.knee is not None:
        marks[front.knee.id] = "best, knee" if front.knee.id == front.best.id else "knee"
    for point in (*front.uniform, *front.points):
        latency = [] if point.latency_s is None else [f"{point.latency_s * 1e3:.4g}"]
        rows.append(
            [
                point.id + (f" ({marks[point.id]})" if point.id in marks else ""),
                f"{point.average_bits:.3f}",
                f"{point.average_bits_searched:.3f}",
                f"{point.size_bytes / 1e3:.1f}",
                f"{point.bops / 1e9:.4g}",
                *latency,
                f"{point.metric:.4f} ± {point.metric_stderr:.4f}",
            ]
        )
    header = ["model", "average bits", "searched layers", "kB", "GBOPs", *["ms"] * timed, metric]
    how = "chosen by validation, reported on test"
    if not final:
        how = "partial: stopped before the final training, reported on validation"
    print(f"\nPareto front of study {front.study}, {how}:")
    print_table(header, rows)
    reference = reference_text(front.metric_name, front.reference)
    print(f"hypervolume {front.hypervolume():.4f} up to {reference}, costs as a share of that")
    where = f"in {front.folder}/best.safetensors" if final else "not packed"
    print(f"best under the budget: {front.best.id}, {where}")
    print(f"report: {front.folder}/report.html")
