"""What the doctor says of one thing that it looked at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OK, WARNING, PROBLEM = "ok", "warning", "problem"

Values = Mapping[str, Any]
"""What a check is given: `out`, `storage`, `checkpoints`, `address`, each a string or None."""


@dataclass(frozen=True)
class Finding:
    """`state` is ok, warning or problem; `remedy` says what to do unless all is well."""

    check: str
    state: str
    text: str
    remedy: str = ""


def size_text(size_bytes: float) -> str:
    return (
        f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"
    )


def error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
