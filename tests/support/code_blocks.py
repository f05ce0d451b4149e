"""The code blocks of a Markdown page, in its order, and what its source says of each.

<!-- not run: WHY -->   before a block: it needs what a test has not; its options are checked
<!-- prepare: PYTHON -->  anywhere: what the page takes for granted, run but not shown
```python title="net.py"  a file to save
```sh fails             commands that end with exit code 2
"""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

LANGUAGES = ("python", "sh", "toml")


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    code: str
    title: str | None = None
    fails: bool = False
    not_run: str | None = None


def code_blocks(page: Path) -> list[Block]:
    """Raises ValueError for a block in another language, but for plain text."""
    found, not_run = [], None
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "html_block":
            comment = re.fullmatch(r"<!-- (not run|prepare):\s(.*?)\s*-->\s*", token.content, re.S)
            if comment and comment[1] == "prepare":
                assert token.map is not None
                found.append(Block(token.map[0] + 1, "python", comment[2]))
            not_run = comment[2] if comment and comment[1] == "not run" else None
        elif token.type == "fence":
            language, *rest = token.info.split(maxsplit=1)
            if language not in (*LANGUAGES, "text"):
                raise ValueError(f"{page.name}: a block in {language!r}: expected {LANGUAGES}")
            more = rest[0] if rest else ""
            title = re.search(r'title="(.+?)"', more)
            assert token.map is not None
            if language != "text":
                found.append(
                    Block(
                        token.map[0] + 2,
                        language,
                        token.content,
                        title and title[1],
                        more == "fails",
                        not_run,
                    )
                )
            not_run = None
    return found
