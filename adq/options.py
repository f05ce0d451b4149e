"""Options that several commands share, and those that stand for the fields of a configuration."""

import inspect
from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from adq.search.config import OPTIONS, option_name

_TYPES = {
    "text": str,
    "whole": int,
    "number": float,
    "share": float,
    "weight-bits": str,
    "act-bits": str,
    "ties": str,
    "layers": str,
    "epochs": str,
    "duration": str,
}

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
ConfigFile = Annotated[
    str | None, typer.Option("--config", help="a study file (TOML) with the same names as keys")
]


def studies_folder(context: typer.Context, own: str | None = None) -> str:
    """The folder of studies: the command's own --out, else the one given before it."""
    return own or context.obj or str(OPTIONS["out"].default)


def with_study_options(
    function: Callable[..., None], names: Iterable[str] = OPTIONS
) -> Callable[..., None]:
    """Give a command that takes `**values` an option for each of these fields of StudyConfig.

    An option of the command's own stands before a field of its name.
    """
    own = [
        p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD
    ]
    taken = {p.name for p in own}
    generated = []
    for f in (OPTIONS[name] for name in names if name not in taken):
        default = f.default
        if default is not None:
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = f.metadata["help"] + ("" if default is None else f" [{shown}]")
        option = typer.Option(f"--{option_name(f)}", help=text, show_default=False)
        kind = _TYPES[f.metadata["kind"]]
        generated.append(
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )
    parameters = [*own, *generated]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function
