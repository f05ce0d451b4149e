"""The reference of the command line, read from the commands themselves when the pages are built."""

from dataclasses import Field
from typing import Any

from mkdocs.structure.pages import Page
from typer.core import TyperArgument, TyperCommand, TyperOption
from typer.main import get_command

from adq.cli import app
from adq.search.config import OPTIONS, option_name

COMMANDS_HERE, OPTIONS_HERE = "<!-- the commands -->", "<!-- the options of a study -->"


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    if page.file.src_uri != "docs/command-line.md":
        return markdown
    return markdown.replace(OPTIONS_HERE, study_options()).replace(COMMANDS_HERE, commands())


def study_options() -> str:
    rows = [(f"`--{option_name(f)}`", _default(f), f.metadata["help"]) for f in OPTIONS.values()]
    return _table(("option", "unless given", "what"), rows)


def commands() -> str:
    group = get_command(app)
    shown = {name: c for name, c in group.commands.items() if not c.hidden}  # type: ignore[attr-defined]
    return "\n\n".join(_command(name, command) for name, command in shown.items())


def _command(name: str, command: TyperCommand) -> str:
    arguments = [p for p in command.params if isinstance(p, TyperArgument)]
    usage = " ".join(["adq-search", name, "[OPTIONS]", *map(_metavar, arguments)])
    rows = [(f"`{_metavar(p)}`", p.help or "") for p in arguments]
    studys = 0
    for option in (p for p in command.params if isinstance(p, TyperOption)):
        f = OPTIONS.get(option.name or "")
        if f is not None and (option.help or "").startswith(f.metadata["help"]):
            studys += 1
        elif option.name != "help":
            rows.append((", ".join(f"`{o}`" for o in option.opts), option.help or ""))
    if studys > len(OPTIONS) / 2:
        rows.append(("and", "the [options of a study](#the-options-of-a-study)"))
    elif studys:
        names = [p.opts[0] for p in command.params if p.name in OPTIONS]
        rows.append(("and", f"of the [options of a study](#the-options-of-a-study): "
                            f"{', '.join(f'`{n}`' for n in names)}"))  # fmt: skip
    about = command.help or ""
    return f"### {name}\n\n    {usage}\n\n{about}\n\n{_table(('', 'what'), rows)}"


def _metavar(argument: TyperArgument) -> str:
    return argument.metavar or (argument.name or "").upper()


def _default(f: "Field[Any]") -> str:
    if f.default is None:
        return ""
    text = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
    return f"`{text}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, tuple("---" for _ in head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
