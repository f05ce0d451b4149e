"""The commands `sensitivity` and `profile`: what layers suffer and how long they take, without a
search."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from adq.options import ConfigFile, Json, studies_folder, with_study_options
from adq.quant.errors import InputError
from adq.search.config import make_config, read_toml


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

    from adq.console import observing, print_table
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
    values["out"] = studies_folder(context, values["out"]) if values["out"] or context.obj else None
    resolved = make_config(read_toml(config) if config else {}, values)
    with redirect_stdout(sys.stderr):
        problem = make_problem(resolved, load_task(resolved.task, resolved.model), budgeted=False)
    root = Path(resolved.out)
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".sensitivity-", dir=root)
    except OSError as error:
        raise InputError(f"cannot write in {root}: {error.strerror}") from None
    with scratch as path, threads(problem.threads), observing() as observer:
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
                print_table(["layer", *map(str, bits)], list(table.values()))


@with_study_options
def profile(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="the table to write (JSON), for --latency")],
    repeats: Annotated[int, typer.Option("--repeats", help="readings of each layer")] = 30,
    config: ConfigFile = None,
    **values: Any,
) -> None:
    """Measure how long each layer of a packed model runs here, at every choice of bits."""
    from adq.console import print_table
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
    print_table(
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
