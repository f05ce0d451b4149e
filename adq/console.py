"""What is shown on the terminal: progress on stderr, in bars or, where it is none, in plain lines;
tables on stdout."""

import sys
import time
from types import TracebackType

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


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A table on standard output."""
    table = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # a file or a pipe has no width to fold at
    console.print(table, highlight=False, markup=False)
