"""Calls to another machine, tried again while that is gone for a while."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0


class Patience:
    """Repeats a call that fails with a passing error, after 0.1 s, 0.2 s, ... at most 10 s each.

    `say` hears of the first failure, and of the call that worked again. The last error is raised
    when `seconds` are over; one that `passing` refuses is raised at once. `clock` is monotonic.
    """

    def __init__(
        self,
        what: str,
        passing: Callable[[Exception], bool],
        say: Callable[[str], None],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.what, self.passing, self.say, self.seconds = what, passing, say, seconds
        self.clock, self.sleep = clock, sleep

    def __call__(self, operation: Callable[[], T]) -> T:
        since: float | None = None
        pause = FIRST_PAUSE_S
        while True:
            try:
                result = operation()
            except Exception as error:
                now = self.clock()
                since = now if since is None else since
                left = self.seconds - (now - since)
                if not self.passing(error) or left <= 0:
                    raise
                if now == since:
                    self.say(
                        f"{self.what} does not answer ({reason(error)}): trying again for up to "
                        f"{self.seconds:.0f} s"
                    )
                self.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                if since is not None:
                    self.say(f"{self.what} is back after {self.clock() - since:.0f} s")
                return result


def reason(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters, from where it began."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
