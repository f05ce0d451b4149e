"""Docstrings as they are read in a terminal: tables of names stay tables.

The rest of a docstring is Markdown as it stands; what is indented, formulas mostly, keeps its
lines.
"""

import re
from typing import Any

from griffe import Extension, Object

ROW = re.compile(r"\S+(?: \S+)*  +\S|\s{4,}\S")  # a name, at least two spaces and what it is


class Tables(Extension):
    """Fences each paragraph that is a table of names, so that its columns stay columns."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = "\n\n".join(map(_fenced, obj.docstring.value.split("\n\n")))


def _fenced(paragraph: str) -> str:
    lines = paragraph.splitlines()
    if lines and not lines[0][0:1].isspace() and all(map(ROW.match, lines)):
        return f"```text\n{paragraph}\n```"
    return paragraph
