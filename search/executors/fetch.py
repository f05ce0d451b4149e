"""A study brought home from a cluster, by a job that packs it into its own log.

The job's log is all that a job server gives out over HTTP, so the archive goes through it as text:
a line that says its size and SHA-256, the archive in base64, and a line that ends it.
"""

import base64
import binascii
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from adq.quant.errors import InputError
from adq.search.config import make_config, read_toml
from adq.search.executors.job_server import JobServer
from adq.search.executors.submit import outcome, shell_path, study_folder

SCHEMA = "adq-fetched/1"
MARK = "adq-pack/1"
LINE_BYTES = 1350
"""Of the archive in a line: Ray passes on ten lines, or 20,000 characters, at a time."""

FRONT = (
    "study.toml",
    "front.*",
    "report.html",
    "best.*",
    "results.json",
    "sensitivity.*",
    "seeds.json",
    "fp32.json",
    "layers.json",
    "clock.json",
    "runs.json",
    "trials/*.json",
    "final/*.json",
    "models/*.safetensors",
)
"""What a front is shown, compared and used with: no checkpoints, no weights to start from."""

OF_PROCESSES = ("lock", "drivers", "running", "tune", "fetched.json")
"""What belongs to the processes that work on a study, or to this machine."""


def pack(out: Path, name: str, stream: IO[str], everything: bool = False) -> None:
    """Write study `name` of `out` to `stream` as text: what is in FRONT, or all but what is of
    its processes."""
    folder = out / name
    if not (folder / "study.toml").is_file():
        there = ", ".join(sorted(path.parent.name for path in out.glob("[!.]*/study.toml")))
        raise InputError(f"no study {name!r} in {out} on the cluster; there are: {there or 'none'}")
    with tempfile.TemporaryFile() as archive:
        with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=3) as tar:
            for path in _packed(folder, everything):
                try:
                    tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
                except FileNotFoundError:  # the study goes on, and a file is gone again
                    continue
        size = archive.tell()
        archive.seek(0)
        digest = hashlib.file_digest(archive, "sha256").hexdigest()
        archive.seek(0)
        stream.write(f"\n{MARK} BEGIN {size} {digest}\n")
        while block := archive.read(LINE_BYTES):
            stream.write(base64.b64encode(block).decode() + "\n")
        stream.write(f"{MARK} END\n")
        stream.flush()


def _packed(folder: Path, everything: bool) -> list[Path]:
    patterns = ("**/*",) if everything else FRONT
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not _left_out(path.relative_to(folder)))


def _left_out(path: Path) -> bool:
    return path.parts[0] in OF_PROCESSES or any(part.startswith(".") for part in path.parts)


class Unpacker:
    """Takes a job's log in pieces, and writes the archive in it to a file."""

    def __init__(self, archive: IO[bytes]) -> None:
        self._archive, self._rest = archive, ""
        self._expected: tuple[int, str] | None = None
        self._size, self._hash, self._done = 0, hashlib.sha256(), False
        self.other: list[str] = []
        """Lines that are no part of the archive."""

    def feed(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._take(line.strip())

    def _take(self, line: str) -> None:
        begin = re.fullmatch(rf"{re.escape(MARK)} BEGIN (\d+) ([0-9a-f]{{64}})", line)
        if begin:
            self._expected = int(begin[1]), begin[2]
        elif line == f"{MARK} END":
            self._done = True
        elif self._expected is None or self._done:
            self.other.append(line)
        else:
            try:
                block = base64.b64decode(line, validate=True)
            except (binascii.Error, ValueError):
                raise InputError(f"the packed study is damaged on its way: {line[:60]!r}") from None
            self._archive.write(block)
            self._hash.update(block)
            self._size += len(block)

    def check(self) -> None:
        """Raises InputError unless the whole archive arrived as it was packed."""
        if self._expected is None:
            raise InputError(
                "the job packed nothing: is the cluster's adq-search the same as here?"
            )
        size, digest = self._expected
        if not self._done or (self._size, self._hash.hexdigest()) != (size, digest):
            raise InputError(
                f"the packed study is damaged: expected {size} bytes of SHA-256 {digest}, got "
                f"{self._size} of {self._hash.hexdigest()}; fetch it again"
            )


def fetch(
    address: str | None,
    name: str,
    out: Path,
    *,
    source: str | None = None,
    everything: bool = False,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Bring study `name` from the cluster at `address` into `out`; returns its folder there.

    `source` is the folder of studies on the cluster, if it is not what its last job was told. A
    study that was fetched before is replaced; one that was made or resumed here only with `force`.
    """
    make_config({"study": name})  # a plain name
    _may_replace(out / name, force)
    server = JobServer(address)
    where = study_folder(server, name, source)
    flag = " --all" if everything else ""
    command = f"exec adq-search pack --out {shell_path(where)}{flag} -- {shlex.quote(name)}"
    job_id = f"fetch-{secrets.token_hex(6)}"
    say(f"packing {where}/{name} on the cluster")
    try:
        out.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".fetch-", dir=out)
    except OSError as error:
        raise InputError(f"cannot write in {out}: {error.strerror}") from None
    with (
        scratch as temporary,
        _writing(out),
        open(Path(temporary) / "archive", "w+b") as archive,
    ):
        unpacker = Unpacker(archive)
        server.submit(command, job_id, {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}, {})
        try:
            job = server.follow(job_id, unpacker.feed)
        except BaseException:
            with suppress(InputError):
                server.stop(job_id)
            raise
        if job.status != "SUCCEEDED":
            raise InputError(outcome(job)[1])
        unpacker.check()
        server.delete(job_id)
        archive.seek(0)
        folder = Path(temporary) / name
        _extract(archive, folder)
        make_config(read_toml(folder / "study.toml"))  # a damaged one replaces nothing
        origin = {
            "schema": SCHEMA,
            "address": server.url,
            "folder": where,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (folder / "fetched.json").write_text(json.dumps(origin, indent=1) + "\n")
        _put(folder, out / name, Path(temporary))
    return out / name


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """A full disk, and the like, as one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write in {out}: {error.strerror or error}") from None


def _extract(archive: IO[bytes], folder: Path) -> None:
    folder.mkdir(mode=0o755)
    try:
        with tarfile.open(fileobj=archive, mode="r:gz") as tar:
            for member in tar:
                if not member.isfile():
                    raise InputError(f"the packed study holds {member.name!r}, which is no file")
                tar.extract(member, folder, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"the packed study cannot be unpacked: {error}") from None
    except OSError as error:
        raise InputError(f"cannot write {folder.name}: {error.strerror or error}") from None


def _may_replace(folder: Path, force: bool) -> None:
    if not folder.exists() or force:
        return
    # a study that was resumed here has a lock file, and results that are nowhere else
    if not (folder / "fetched.json").exists() or (folder / "lock").exists():
        raise InputError(
            f"{folder} is there already and was made here: choose another place with --out, or "
            "replace it with --force"
        )


def _put(new: Path, target: Path, scratch: Path) -> None:
    """`new` under the name `target`; what was there before is only gone once that is done."""
    old = scratch / "replaced"
    try:
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from None
    shutil.rmtree(old, ignore_errors=True)
