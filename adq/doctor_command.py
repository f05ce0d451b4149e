"""The command `doctor`: a table of what was looked at, and what to do."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from adq.options import Json, studies_folder


def doctor(
    context: typer.Context,
    storage: Annotated[
        str | None, typer.Option("--storage", help="an Optuna storage URL to look at")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="the folder that holds the studies")
    ] = None,
    checkpoints: Annotated[
        str | None, typer.Option("--checkpoints", help="folder or URL for checkpoints")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="a Ray cluster: auto or HOST:PORT, with all its nodes; or its job server, like "
            "http://HEAD:8265",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at versions, GPUs, storage, folders and cluster; say what to do about each finding.

    The exit code is 2 if a search would fail, else 0.
    """
    from adq.console import print_table
    from adq.search.doctor import examine
    from adq.search.finding import OK, PROBLEM, WARNING

    found = examine(studies_folder(context, out), storage, checkpoints, address)
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    else:
        header = ["", "what", "found", "what to do"]
        print_table(header, [[each.state, each.check, each.text, each.remedy] for each in found])
        counts = [sum(each.state == state for each in found) for state in (PROBLEM, WARNING, OK)]
        print("{} problems, {} warnings, {} ok".format(*counts))
    if any(each.state == PROBLEM for each in found):
        sys.exit(2)
