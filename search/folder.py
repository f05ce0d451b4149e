"""The folder of one study: what is where, made whole or not at all.

OUT/NAME/
  study.toml          the configuration as resolved
  study.db            the Optuna study (unless --storage names another place)
  fp32.safetensors    the FP32 weights;  fp32.json  how they were trained and how good they are
  sensitivity.json    every proxy's table;  sensitivity.csv  the same, one row a layer and bits
  layers.json         what each layer costs at each choice of its bits
  seeds.json          the bit vectors that the search starts with
  trials/NNNN.json    a record per trial
  start/NNNN.safetensors   with --warm-start, weights that other trials may start from
  final/ID.json       a record per final model;  models/ID.safetensors  its packed weights
  front.json, front.csv, front.png, report.html, best.safetensors, best.bits.json
  results.json        which point is best, and the uniform models beside the front
  clock.json          seconds that the study took so far
  runs.json           when it was begun and resumed, by which command, on what
  checkpoints/JOB     of trainings that are under way (unless --checkpoints names another place)
  lock, drivers/, running/   which processes work on it, see `crew`
  tune/               what Ray Tune records, for TensorBoard
OUT/.cache/           FP32 weights by content key, shared by all studies of OUT
"""

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import URL

from adq.quant.errors import InputError
from adq.quant.files import read_json, write_json, write_text
from adq.search.candidate import Record
from adq.search.config import StudyConfig, make_config, read_toml

TRIALS, FINAL, MODELS, START = "trials", "final", "models", "start"
CHECKPOINTS = "checkpoints"


class Clock:
    """The seconds that a study took, summed over the processes that ran it, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._started = path, time.monotonic()
        self.before = 0.0
        """Seconds in the file when this process began."""
        if path.exists():
            data = read_json(path)
            try:
                self.before = float(data["seconds"])
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path} is damaged: {type(error).__name__} {error}") from None

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self._started

    def save(self) -> None:
        write_json(self._path, {"seconds": self.seconds})


class StudyFolder:
    """Paths and records of a study. Make one with `create_study` or `open_study`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def cache(self) -> Path:
        return self.path.parent / ".cache"

    @property
    def config(self) -> StudyConfig:
        return make_config(read_toml(self.path / "study.toml"))

    @property
    def storage_url(self) -> str:
        if self.config.storage is not None:
            return self.config.storage
        path = str(self.path.resolve() / "study.db")
        return URL.create("sqlite", database=path).render_as_string()  # quotes % and ?

    def file(self, name: str) -> Path:
        return self.path / name

    def record_path(self, kind: str, id: str) -> Path:
        return self.path / kind / f"{id}.json"

    def write_record(self, kind: str, record: Record) -> None:
        write_json(self.record_path(kind, record.id), record.to_json())

    def read_record(self, kind: str, id: str) -> Record | None:
        """The record, or None where there is none yet; InputError if it is damaged."""
        path = self.record_path(kind, id)
        return _record(path) if path.exists() else None

    def records(self, kind: str) -> list[Record]:
        return [_record(path) for path in sorted((self.path / kind).glob("*.json"))]

    def extended(self, trials: int | None, time_budget: float | str | None = None) -> StudyConfig:
        """The configuration with its number of trials and its time budget raised, or one set."""
        config = self.config
        more = make_config(vars(config), {"trials": trials, "time_budget": time_budget})
        if more.trials < config.trials:
            raise InputError(
                f"trials: study {self.name!r} has {config.trials}; expected at least as many, got "
                f"{trials}"
            )
        if (more.time_budget or 0) < (config.time_budget or 0):
            raise InputError(
                f"time-budget: study {self.name!r} has {config.time_budget:g} s; expected at least "
                f"as much, got {time_budget}"
            )
        return more

    @property
    def finished(self) -> bool:
        """Whether results.json holds what this many trials, and this much time, led to."""
        path = self.file("results.json")
        if not path.exists():
            return False
        results, config = read_json(path), self.config
        return isinstance(results, dict) and (
            (results.get("trials"), results.get("time_budget"))
            == (config.trials, config.time_budget)
        )

    def status(self) -> str:
        """How far the study is, in words."""
        if self.finished:
            return "finished"
        if any((self.path / FINAL).glob("*.json")):
            return "final training"
        if self.file("sensitivity.json").exists():
            done = len(list((self.path / TRIALS).glob("*.json")))
            return f"searching, {done} of {self.config.trials} trials"
        return "preparing"


def _record(path: Path) -> Record:
    data = read_json(path)
    try:
        return Record.from_json(data)
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}") from None


def create_study(config: StudyConfig, prepare: Callable[[StudyFolder], None]) -> StudyFolder:
    """A new study folder, complete with its configuration, or an InputError and nothing.

    Without a name in `config` the next free TASK-N is taken. `prepare` may put more into the
    folder before it appears under its name.
    """
    root = Path(config.out)
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    except OSError as error:
        raise InputError(
            f"cannot create a study in {root}: {error.strerror}; choose another folder with --out"
        ) from None
    try:
        while True:
            name = config.study or _next_name(root, config.task)
            try:
                if (root / name).exists():  # before `prepare` makes a study in a shared storage
                    raise FileExistsError(errno.EEXIST, "")
                named = make_config(vars(config), {"study": name})
                write_text(temporary / "study.toml", named.to_toml())
                for part in (TRIALS, FINAL, MODELS):
                    (temporary / part).mkdir(exist_ok=True)
                prepare(StudyFolder(temporary))
                os.chmod(temporary, 0o755)
                os.rename(temporary, root / name)
                return StudyFolder(root / name)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise InputError(
                        f"cannot create a study in {root}: {error.strerror}; choose another folder "
                        "with --out, or another name with --study"
                    ) from None
                if config.study is not None:
                    raise InputError(
                        f"study {name!r} exists already in {root}: resume it with 'adq-search "
                        f"resume {name}', or choose another name with --study"
                    ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _next_name(root: Path, task: str) -> str:
    base = re.sub(r"[^A-Za-z0-9_.-]+", "-", task.partition(":")[0]).strip(".-") or "study"
    taken = [
        int(match[1])
        for path in root.iterdir()
        if (match := re.fullmatch(re.escape(base) + r"-(\d+)", path.name))
    ]
    return f"{base}-{max(taken, default=0) + 1}"


def open_study(out: str | Path, name: str) -> StudyFolder:
    """The study NAME in the folder `out`; NAME may be the path of a study folder as well.

    Raises InputError when there is none, naming those that there are.
    """
    for path in (Path(out) / name, Path(name)):
        if (path / "study.toml").is_file():
            folder = StudyFolder(path if path.name not in ("", "..") else path.resolve())
            folder.config  # noqa: B018 (a damaged one is said here, whatever the folder is for)
            return folder
    there = ", ".join(study.name for study in list_studies(out)) or "none"
    if (Path(out) / name).is_dir():
        raise InputError(f"study {name!r} in {out} is damaged: its study.toml is missing")
    raise InputError(f"no study {name!r} in {out}; there are: {there}")


def list_studies(out: str | Path) -> list[StudyFolder]:
    root = Path(out)
    if not root.is_dir():
        return []
    # a name with a dot is a study being prepared
    paths = (p for p in sorted(root.iterdir()) if not p.name.startswith("."))
    return [StudyFolder(path) for path in paths if (path / "study.toml").is_file()]
