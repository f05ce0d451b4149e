"""A configuration as the command line that gives it."""

import shlex
from typing import Any

from adq.search.config import OPTIONS, StudyConfig, option_name


def command_line(config: StudyConfig) -> str:
    """`adq-search` with every option that is not at its default, quoted for a POSIX shell."""
    words = ["adq-search"]
    for option, text in options(config, changed_only=True):
        words += [f"--{option}", shlex.quote(text)]
    return " ".join(words)


def options(config: StudyConfig, changed_only: bool = False) -> list[tuple[str, str]]:
    """(name, value as the command line takes it) of each option that has a value."""
    return [
        (option_name(field), _text(getattr(config, name)))
        for name, field in OPTIONS.items()
        if getattr(config, name) is not None
        and not (changed_only and getattr(config, name) == field.default)
    ]


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
