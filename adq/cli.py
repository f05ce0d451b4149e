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
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adq import cluster
from adq.doctor_command import doctor
from adq.export_command import export
from adq.options import ConfigFile, Json, with_study_options
from adq.quant.errors import InputError
from adq.search.config import EXECUTION, OPTIONS, make_config, read_toml

if TYPE_CHECKING:
    from adq.search.folder import StudyFolder
    from adq.search.front import Front
    from adq.search.observer import Observer

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
    from adq.search.run import start
    from adq.search.task import load_task

    resolved = make_config(read_toml(config) if config else {}, values)
    resolved.budget  # noqa: B018 (a missing budget is said before anything is loaded)
    with _stoppable(), _observer() as observer:
        front = start(resolved, load_task(resolved.task, resolved.model), observer)
    _print_front(front, as_json)


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
    from adq.search.api import resume

    with _stoppable(), _observer() as observer:
        front = resume(
            name,
            out=_out(context, out),
            trials=trials,
            time_budget=time_budget,
            observer=observer,
            **execution,
        )
    _print_front(front, as_json)


@app.command("list")
def list_(context: typer.Context, out: Out = None, as_json: Json = False) -> None:
    """List the studies and how far each is."""
    from adq.search.folder import list_studies

    rows = [_row(folder) for folder in list_studies(_out(context, out))]
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        _print_table(["study", "task", "status"], [list(row.values()) for row in rows])
    else:
        print(f"no studies in {_out(context, out)}")


def _row(folder: "StudyFolder") -> dict[str, str]:
    try:
        return {"study": folder.name, "task": folder.config.task, "status": folder.status()}
    except InputError as error:  # one damaged study must not hide the others
        return {"study": folder.name, "task": "?", "status": f"damaged: {error}"}


@app.command()
def show(context: typer.Context, name: Name, out: Out = None, as_json: Json = False) -> None:
    """Show a study: its configuration, how far it is, and the front that it has so far."""
    from adq.search.folder import open_study
    from adq.search.run import load_front

    folder = open_study(_out(context, out), name)
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
        _print_front(front, as_json=False)


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
    root = _out(context, None)
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
    from adq.quant.files import atomic_path
    from adq.search.folder import open_study
    from adq.search.report.compare import FORMATS, compare, render
    from adq.search.report.units import reference_text
    from adq.search.run import load_front

    root = _out(context, None)
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
    _print_table(*compared.table())
    reference = reference_text(first.metric_name, compared.reference)
    print(f"hypervolumes up to {reference}, with each cost as a share of that")


@app.command()
@with_study_options
def sensitivity(
    context: typer.Context,
    file: Annotated[
        str | None, typer.Argument(help="also write the scores, as .csv, .json or .png")
    ] = None,
    config: ConfigFile = None,
    as_json: Json = False,
    **values: Any,
) -> None:
    """Measure how much each layer suffers at each bit-width, without a search."""
    import tempfile

    from adq.quant.batches import threads
    from adq.quant.files import atomic_path
    from adq.search.folder import StudyFolder
    from adq.search.fp32 import fp32_model
    from adq.search.problem import make_problem
    from adq.search.sensitivity import SCHEMA, rows, sensitivities, to_csv
    from adq.search.task import load_task

    if file is not None and not file.endswith((".csv", ".json", ".png")):
        raise InputError(f"expected a file that ends in .csv, .json or .png, got {file!r}")
    if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise InputError(f"cannot write {file}: it is a folder, or its folder is not there")
    values["out"] = _out(context, values["out"]) if values["out"] or context.obj else None
    resolved = make_config(read_toml(config) if config else {}, values)
    with redirect_stdout(sys.stderr):
        problem = make_problem(resolved, load_task(resolved.task, resolved.model), budgeted=False)
    root = Path(resolved.out)
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".sensitivity-", dir=root)
    except OSError as error:
        raise InputError(f"cannot write in {root}: {error.strerror}") from None
    with scratch as path, threads(problem.threads), _observer() as observer:
        folder = StudyFolder(Path(path))
        try:
            model = fp32_model(problem, folder, observer).model
            found = sensitivities(problem, model, folder, observer)
        except KeyboardInterrupt:
            print("interrupted: without a study no scores are kept", file=sys.stderr)
            sys.exit(130)
    as_text = json.dumps({"schema": SCHEMA, "proxies": [s.to_json() for s in found]}, indent=1)
    if file is not None:
        if file.endswith(".png"):
            from adq.search.report.charts import sensitivity_picture

            content = sensitivity_picture(found)
        else:
            content = (to_csv(found) if file.endswith(".csv") else as_text + "\n").encode()
        with atomic_path(Path(file)) as temporary:
            temporary.write_bytes(content)
    if as_json:
        print(as_text)
        return
    print("expected loss increase when one layer alone is quantized, ± standard error")
    for proxy in found:
        for kind in ("weight", "act"):
            of_kind = [r for r in rows([proxy]) if r[1] == kind]
            if of_kind:
                bits = sorted({r[3] for r in of_kind})
                table: dict[str, list[str]] = {}
                for _, _, layer, _, score, stderr in of_kind:
                    table.setdefault(layer, [layer]).append(f"{score:.2e} ± {stderr:.0e}")
                print(f"\n{proxy.proxy}, {kind} bits ({proxy.samples} samples)")
                _print_table(["layer", *map(str, bits)], list(table.values()))


@app.command()
@with_study_options
def profile(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="the table to write (JSON), for --latency")],
    repeats: Annotated[int, typer.Option("--repeats", help="readings of each layer")] = 30,
    config: ConfigFile = None,
    **values: Any,
) -> None:
    """Measure how long each layer of a packed model runs here, at every choice of bits."""
    from adq.proxies.profile import measure
    from adq.quant.batches import resized
    from adq.search.problem import make_problem
    from adq.search.task import load_task

    if not file.endswith(".json"):
        raise InputError(f"expected a file that ends in .json, got {file!r}")
    resolved = make_config(read_toml(config) if config else {}, values)
    with redirect_stdout(sys.stderr):
        problem = make_problem(resolved, load_task(resolved.task, resolved.model), budgeted=False)
        pairs = [pair for pairs in problem.space.bit_options.values() for pair in pairs]
        table = measure(
            problem.initial_model,
            problem.layers,
            resized(problem.calibration[0][0], resolved.latency_batch or 1),
            sorted({w for w, _ in pairs}),
            sorted({a for _, a in pairs}, key=lambda a: a or 32),
            problem.device,
            repeats,
            scheme=resolved.scheme,
        )
    table.save(file)
    _print_table(
        ["layer", "weight, input", "bits", "µs a sample"],
        [
            [
                e.kind,
                "×".join(map(str, e.weight_shape)) + ", " + "×".join(map(str, e.input_shape)),
                f"{e.weight_bits}/{e.act_bits or 'float'}",
                f"{e.seconds * 1e6:.4g} ± {e.stderr * 1e6:.1g}",
            ]
            for e in table.entries
        ],
    )
    for note in table.notes:
        print(note, file=sys.stderr)
    print(f"beyond its layers the model takes {table.rest_seconds * 1e6:.4g} µs a sample")
    print(f"{file}: {table.device}, batch {table.batch}; use it with --latency {file}")


cluster.register(app)
app.command()(doctor)
app.command()(export)


def _out(context: typer.Context, own: str | None) -> str:
    """The studies' folder: the subcommand's own --out, else the one given before it."""
    return own or context.obj or str(OPTIONS["out"].default)


@contextmanager
def _observer() -> "Iterator[Observer]":
    from rich.console import Console

    from adq.console import BarObserver, PlainObserver

    console = Console(stderr=True)
    # what a user's code prints is no result of ours, nor what the solver's C++ does
    with redirect_stdout(sys.stderr), _descriptor_to_stderr():
        if console.is_terminal:
            with BarObserver(console) as observer:
                yield observer
        else:
            yield PlainObserver()


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


@contextmanager
def _descriptor_to_stderr() -> Iterator[None]:
    """Send what is written to the process's standard output, past Python, to standard error."""
    stdout, stderr = 1, 2
    kept = os.dup(stdout)
    os.dup2(stderr, stdout)
    try:
        yield
    finally:
        os.dup2(kept, stdout)
        os.close(kept)


def _print_front(front: "Front", as_json: bool) -> None:
    if as_json:
        print(json.dumps(front.to_json(), indent=1))
        return
    from adq.search.report.units import reference_text

    final = front.split == "test"
    metric = f"{front.split} {front.metric_name}"
    timed = front.best.latency_s is not None
    rows = [["FP32", "32", "32", "", "", *[""] * timed, f"{front.fp32_metric:.4f}"]]
    marks = {front.best.id: "best"}
    if front.knee is not None:
        marks[front.knee.id] = "best, knee" if front.knee.id == front.best.id else "knee"
    for point in (*front.uniform, *front.points):
        latency = [] if point.latency_s is None else [f"{point.latency_s * 1e3:.4g}"]
        rows.append(
            [
                point.id + (f" ({marks[point.id]})" if point.id in marks else ""),
                f"{point.average_bits:.3f}",
                f"{point.average_bits_searched:.3f}",
                f"{point.size_bytes / 1e3:.1f}",
                f"{point.bops / 1e9:.4g}",
                *latency,
                f"{point.metric:.4f} ± {point.metric_stderr:.4f}",
            ]
        )
    header = ["model", "average bits", "searched layers", "kB", "GBOPs", *["ms"] * timed, metric]
    how = "chosen by validation, reported on test"
    if not final:
        how = "partial: stopped before the final training, reported on validation"
    print(f"\nPareto front of study {front.study}, {how}:")
    _print_table(header, rows)
    reference = reference_text(front.metric_name, front.reference)
    print(f"hypervolume {front.hypervolume():.4f} up to {reference}, costs as a share of that")
    where = f"in {front.folder}/best.safetensors" if final else "not packed"
    print(f"best under the budget: {front.best.id}, {where}")
    print(f"report: {front.folder}/report.html")


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    from adq.console import print_table

    print_table(header, rows)


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
