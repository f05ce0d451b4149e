"""Tables of a study's README, written by its script."""

from pathlib import Path

from adq.quant.files import write_text


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_between(path: Path, tables: dict[str, str]) -> None:
    """Replace what lies between <!-- NAME --> and <!-- end --> by the table of that name."""
    text = path.read_text(encoding="utf-8")
    for name, content in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition("<!-- end -->")
        if not (mark and end):
            raise ValueError(f"{path}: expected <!-- {name} --> and <!-- end -->")
        text = f"{before}{mark}\n\n{content}\n\n{end}{after}"
    write_text(path, text)
