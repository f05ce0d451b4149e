"""A configuration as the command line that gives it."""

import shlex
from typing import Any

from adq.search.config import OPTIONS, StudyConfig, option_name
from adq.search.storage_url import shown


def command_line(config: StudyConfig) -> str:
    """`adq-search` with every option that is not at its default, quoted for a POSIX shell."""
    return _line(["adq-search"], options(config, changed_only=True))


def resume_line(before: StudyConfig, now: StudyConfig) -> str:
    """`adq-search resume NAME` with every option that `now` gives and `before` did not."""
    had, default = options(before), OPTIONS["out"].default
    words = ["adq-search", "resume", shlex.quote(before.study or "")]
    where = [] if before.out == default else [("out", before.out)]
    return _line(words, where + [option for option in options(now) if option not in had])


def _line(words: list[str], given: list[tuple[str, str]]) -> str:
    for option, text in given:
        words = [*words, f"--{option}", shlex.quote(text)]
    return " ".join(words)


def options(config: StudyConfig, changed_only: bool = False) -> list[tuple[str, str]]:
    """(name, value as the command line takes it) of each option that has a value.

    A password in a storage's address is left out, as the page may go anywhere.
    """
    return [
        (option_name(field), _text(name, getattr(config, name)))
        for name, field in OPTIONS.items()
        if getattr(config, name) is not None
        and not (changed_only and getattr(config, name) == field.default)
    ]


def _text(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if name == "storage":
        return shown(str(value))
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
