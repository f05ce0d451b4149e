"""Every code block of README and of docs/ runs, page by page, as a reader would run them.

Searches get two trials and one epoch, whatever the text asks for; nothing else is changed. Blocks
that need a cluster, a GPU or an installation say so in the page's source: of them only the options
are checked.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from code_blocks import Block, code_blocks
from typer.main import get_command

from adq.cli import app
from adq.search.config import OPTIONS, make_config, read_toml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_BLOCKS = [page for page in PAGES if code_blocks(page)]

WRAPPER = """\
#!{python}
import sys
from adq.cli import main

few = {{"--trials": "2", "--epochs": "1", "--final-epochs": "1"}}
command = sys.argv[1] if len(sys.argv) > 1 else ""
if command == "resume":
    sys.argv += ["--trials", "3"]
elif command.startswith("--budget") or command in ("--task", "--config"):
    sys.argv += [word for pair in few.items() for word in pair]
if command.startswith("-") or command in ("sensitivity", "profile"):
    sys.argv += [] if "--weights" in sys.argv else ["--fp32-epochs", "2"]
    sys.argv += ["--device", "cpu"]
sys.exit(main())
"""


@pytest.fixture
def shell_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose `adq-search` trains little."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "adq-search"
    script.write_text(WRAPPER.format(python=sys.executable))
    script.chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path}


def commands(block: Block) -> list[list[str]]:
    """The arguments of each adq-search in a block of shell commands."""
    lines = block.code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.partition("$ ")[2] or line, comments=True) for line in lines]
    return [w[1:] for w in words if w and w[0] == "adq-search"]


def check_options(arguments: list[str]) -> None:
    """Parse as the command line does, and check the values of a study; nothing is begun."""
    group: Any = get_command(app)
    context = group.make_context("adq-search", [a for a in arguments if a != "--help"])
    if context._protected_args or context.args:
        name, command, rest = group.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = command.make_context(name, rest)
    make_config({name: value for name, value in context.params.items() if name in OPTIONS})


def run(block: Block, page: Path, folder: Path, env: dict[str, str], names: dict[str, Any]) -> None:
    if block.title is not None:
        (folder / block.title).write_text(block.code)
    if block.language == "toml":
        path = folder / (block.title or "unnamed.toml")
        path.write_text(block.code)
        make_config(read_toml(path))
    elif block.title is not None:
        return
    elif block.language == "python":
        code = "\n" * (block.line - 1) + block.code  # so that errors name the page's line
        exec(compile(code, str(page), "exec"), names)
    else:
        done = subprocess.run(
            ["sh", "-e"], input=block.code, cwd=folder, env=env, capture_output=True, text=True
        )
        expected = 2 if block.fails else 0
        assert done.returncode == expected, f"{page.name}:{block.line}\n{done.stderr}"
        assert not block.fails or done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_its_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell_env: dict[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    before = set(sys.modules)
    try:
        for block in code_blocks(page):
            if block.not_run is None:
                run(block, page, tmp_path, shell_env, names)
    finally:
        for name in set(sys.modules) - before:  # two pages may each have a mytask.py
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
                del sys.modules[name]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_options_of_all_commands_on_a_page_are_ours(page: Path) -> None:
    for block in code_blocks(page):
        if block.language == "sh":
            for arguments in commands(block):
                check_options(arguments)
        elif block.language == "python":
            compile(block.code, str(page), "exec")


def test_an_option_that_is_not_ours_is_noticed() -> None:
    [ours, unknown, wrong] = commands(
        Block(
            1, "sh", "head$ adq-search show x  # y\nadq-search \\\n --bitz 2\nadq-search --bits 1\n"
        )
    )
    check_options(ours)
    for arguments, said in ((unknown, "bitz"), (wrong, "different whole numbers")):
        with pytest.raises(Exception, match=said):
            check_options(arguments)


def test_what_is_not_run_says_why() -> None:
    skipped = [b for page in PAGES for b in code_blocks(page) if b.not_run is not None]
    assert skipped
    assert all(block.not_run for block in skipped)
