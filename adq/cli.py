"""The command line: parse, build one configuration, call the API, print.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 something the user can
mend (one line says what), 130 interrupted. Heavy imports happen inside the commands.
"""

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adq import cluster
from adq.doctor_command import doctor
from adq.export_command import export
from adq.measure_commands import profile, sensitivity
from adq.options import ConfigFile, Json, studies_folder, with_study_options
from adq.quant.errors import InputError
from adq.search.config import EXECUTION, make_config, read_toml

if TYPE_CHECKING:
    from adq.search.folder import StudyFolder

app = typer.Typer(
    name="adq-search",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, typer.Argument(help="the study's name, or the path of its folder")]
Limit = Annotated[float | None, typer.Option(help="only models within it, as in a search")]
Out = Annotated[str | None, typer.Option("--out", help="the folder that holds the studies")]


@app.callback(invoke_without_command=True)
@with_study_options
def run(
    context: typer.Context, config: ConfigFile = None, as_json: Json = False, **values: Any
) -> None:
    """Search the bits of every layer of a trained PyTorch model under a budget.

    Prints the Pareto front of accuracy against cost and keeps everything in a study folder, for
    example: adq-search --budget-bits 2.8
    """
    if context.invoked_subcommand is not None:
        extra = [name for name, value in values.items() if value is not None and name != "out"]
        if extra or config or as_json:
            raise InputError(
                f"options before '{context.invoked_subcommand}': only --out; put the others "
                "behind it"
            )
        context.obj = values["out"]
        return
    from adq.console import observing, print_front
    from adq.search.run import start
    from adq.search.task import load_task

    resolved = make_config(read_toml(config) if config else {}, values)
    resolved.budget  # noqa: B018 (a missing budget is said before anything is loaded)
    with _stoppable(), observing() as observer:
        front = start(resolved, load_task(resolved.task, resolved.model), observer)
    print_front(front, as_json)


@app.command()
@partial(with_study_options, names=EXECUTION)
def resume(
    context: typer.Context,
    name: Name,
    trials: Annotated[int | None, typer.Option("--trials", help="raise the trials to this")] = None,
    time_budget: Annotated[
        str | None, typer.Option("--time-budget", help="set the time budget, or raise it to this")
    ] = None,
    out: Out = None,
    as_json: Json = False,
    **execution: Any,
) -> None:
    """Bring a study that was stopped to its end, work along with others, or extend it."""
    from adq.console import observing, print_front
    from adq.search.api import resume

    with _stoppable(), observing() as observer:
        front = resume(
            name,
            out=studies_folder(context, out),
            trials=trials,
            time_budget=time_budget,
            observer=observer,
            **execution,
        )
    print_front(front, as_json)


@app.command("list")
def list_(context: typer.Context, out: Out = None, as_json: Json = False) -> None:
    """List the studies and how far each is."""
    from adq.console import print_table
    from adq.search.folder import list_studies

    rows = [_row(folder) for folder in list_studies(studies_folder(context, out))]
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print_table(["study", "task", "status"], [list(row.values()) for row in rows])
    else:
        print(f"no studies in {studies_folder(context, out)}")


def _row(folder: "StudyFolder") -> dict[str, str]:
    try:
        return {"study": folder.name, "task": folder.config.task, "status": folder.status()}
    except InputError as error:  # one damaged study must not hide the others
        return {"study": folder.name, "task": "?", "status": f"damaged: {error}"}


@app.command()
def show(context: typer.Context, name: Name, out: Out = None, as_json: Json = False) -> None:
    """Show a study: its configuration, how far it is, and the front that it has so far."""
    from adq.console import print_front
    from adq.search.folder import open_study
    from adq.search.run import load_front

    folder = open_study(studies_folder(context, out), name)
    config, status = folder.config, folder.status()
    front = load_front(folder) if folder.file("front.json").exists() else None
    if as_json:
        from dataclasses import asdict

        data = {
            **_row(folder),
            "config": asdict(config),
            "front": None if front is None else front.to_json(),
            "best": None if front is None else front.best.id,
        }
        print(json.dumps(data, indent=1))
        return
    print(f"{folder.name}: {status}\n\n{config.to_toml()}")
    if front is not None:
        print_front(front, as_json=False)


@app.command()
def pareto(
    context: typer.Context,
    name: Name,
    format: Annotated[str, typer.Option("--format", help="json, csv, png or html")] = "json",
    budget_bits: Limit = None,
    budget_size_mb: Limit = None,
    budget_gbops: Limit = None,
    budget_latency_ms: Limit = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="the file to write, stdout if not given; a folder that holds NAME is where the "
            "study is looked for, as with the other commands",
        ),
    ] = None,
) -> None:
    """Write a study's front; with budgets, the part of it within them, and name its best model."""
    from adq.quant.files import atomic_path
    from adq.search.budget import Budget
    from adq.search.folder import open_study
    from adq.search.report import FORMATS, render
    from adq.search.run import load_front

    if format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    root = studies_folder(context)
    if out is not None and Path(name).name == name and (Path(out) / name).is_dir():
        root, out = out, None
    folder = open_study(root, name)
    front = load_front(folder)
    limits = (budget_bits, budget_size_mb, budget_gbops, budget_latency_ms)
    if any(limit is not None for limit in limits):
        front = front.within(Budget(*limits).limits())
        where = "not packed" if front.best.weights is None else folder.path / front.best.weights
        print(f"best within these budgets: {front.best.id}, {where}", file=sys.stderr)
    content = render(folder, front, format)
    if out is not None:
        with atomic_path(Path(out)) as temporary:
            temporary.write_bytes(content)
    elif format == "png" and sys.stdout.isatty():
        raise InputError("a PNG is no text for a terminal: name a file with --out FILE")
    else:
        sys.stdout.buffer.write(content)


@app.command()
def compare(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="studies of one task")],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="also write the comparison, as .png, .html, .json or .csv; a folder is where the "
            "studies are looked for, as with the other commands",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Lay the fronts of several studies over each other, and compare their hypervolumes."""
    from adq.console import print_table
    from adq.quant.files import atomic_path
    from adq.search.folder import open_study
    from adq.search.report.compare import FORMATS, compare, render
    from adq.search.report.units import reference_text
    from adq.search.run import load_front

    root = studies_folder(context)
    if out is not None and Path(out).is_dir():
        root, out = out, None
    format = None if out is None else Path(out).suffix.removeprefix(".")
    if format is not None and format not in FORMATS:
        raise InputError(f"expected a file that ends in .{', .'.join(FORMATS)}, got {out!r}")
    compared = compare([load_front(open_study(root, name)) for name in names])
    if out is not None and format is not None:
        content = render(compared, format)
        with atomic_path(Path(out)) as temporary:
            temporary.write_bytes(content)
    if as_json:
        sys.stdout.buffer.write(render(compared, "json"))
        return
    first = compared.first
    partial = "" if first.split == "test" else "partial "
    print(f"\n{partial}fronts of task {first.task}, best models chosen by validation:")
    print_table(*compared.table())
    reference = reference_text(first.metric_name, compared.reference)
    print(f"hypervolumes up to {reference}, with each cost as a share of that")


app.command()(sensitivity)
app.command()(profile)
cluster.register(app)
app.command()(doctor)
app.command()(export)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let a study that is stopped, by Ctrl-C or SIGTERM, write what it has; the second time the
    process ends at once."""
    signals = [
        s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN
    ]

    def stop(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = {each: signal.signal(each, stop) for each in signals}
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not str(interrupt):  # there was no study yet, or it is all there but its report
            raise
        print(interrupt, file=sys.stderr)
        sys.exit(130)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def main() -> None:
    """The entry point of `adq-search`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± gets a question mark
    # Spinning OpenMP threads make two busy processes ten times slower; read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        code = _fail(str(error))
    except typer.TyperException as error:
        code = _fail(error.format_message())
    except KeyboardInterrupt:
        code = 130
    if code == 130:
        print("interrupted: nothing finished is lost; 'adq-search list' names the study and "
              "'adq-search resume NAME' goes on", file=sys.stderr)  # fmt: skip
    sys.exit(code or 0)


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
