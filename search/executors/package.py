"""The working folder as one file that a job server takes and Ray unpacks on every node."""

import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from adq.quant.errors import InputError
from adq.search.config import OPTIONS

LIMIT_BYTES = 100 * 2**20
"""The largest package that a job server takes (Ray's DASHBOARD_CLIENT_MAX_SIZE)."""

LEFT_OUT = frozenset(
    {".git", ".venv", "venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
)


def write_package(folder: Path, named: tuple[Path, ...], target: Path) -> int:
    """Zip the working folder to `target`; returns the number of files.

    Left out is what .gitignore and .rayignore say, as with `ray job submit`, the folder of local
    studies and what Python and git make; `named` files, and all of `named` folders, go along in
    any case. The same files give the same bytes, and so are sent once.

    Raises InputError once the package is larger than a job server takes.
    """
    if not folder.is_dir():
        raise InputError(f"working-dir: {folder} is no folder")
    try:
        return _write(folder, named, target)
    except OSError as error:
        where = error.filename or target
        raise InputError(f"working-dir: cannot send {where}: {error.strerror or error}") from None
    except InputError:
        raise
    except ValueError as error:  # of an ignore file
        raise InputError(f"working-dir: cannot read what to leave out: {error}") from None


def _write(folder: Path, named: tuple[Path, ...], target: Path) -> int:
    paths = {path.relative_to(folder).as_posix(): path for path in _working_files(folder)}
    for path in named:
        for each in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
            paths[each.relative_to(folder).as_posix()] = each
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as package:
        for name, path in sorted(paths.items()):
            entry = zipfile.ZipInfo(name)  # its time is always 1980
            entry.external_attr = path.stat().st_mode << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            sizes[name] = path.stat().st_size
            with path.open("rb") as source, package.open(entry, "w", force_zip64=True) as out:
                while block := source.read(2**20):
                    out.write(block)
                    if target.stat().st_size > LIMIT_BYTES:
                        raise InputError(_too_large(folder, sizes))
    if target.stat().st_size > LIMIT_BYTES:
        raise InputError(_too_large(folder, sizes))
    return len(paths)


def _too_large(folder: Path, sizes: Mapping[str, int]) -> str:
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    shown = ", ".join(f"{name} ({sizes[name] / 1e6:.0f} MB)" for name in largest)
    return (
        f"working-dir: {folder.resolve()} is more than the {LIMIT_BYTES / 2**20:.0f} MiB that a "
        f"job server takes; large are {shown}: name what may stay here in .rayignore, choose "
        "another --working-dir, and keep data where all nodes see it"
    )


def _working_files(folder: Path) -> Iterator[Path]:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    logger = logging.getLogger(__name__)
    visited: set[Path] = set()

    def below(path: Path, ignored: list[Callable[[Path], bool]]) -> Iterator[Path]:
        real = path.resolve()
        if real in visited:  # a link back up
            return
        visited.add(real)
        rules = get_excludes_from_ignore_files(path, include_gitignore=True, logger=logger)
        ignored = [*ignored, *rules]
        for each in sorted(path.iterdir()):
            if each.name in LEFT_OUT or each == folder / str(OPTIONS["out"].default):
                continue
            if any(rule(each) for rule in ignored):
                continue
            if each.is_dir():
                yield from below(each, ignored)
            elif each.is_file():
                yield each

    yield from below(folder, [])
