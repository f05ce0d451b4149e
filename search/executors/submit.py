"""A study sent to a Ray cluster as a job: the same command, with the working folder.

The command runs in a copy of the working folder that Ray makes on every node and takes away again;
so files that options name must lie in that folder, and the study is kept outside of it, below the
home of the head node's user unless --out says another place.
"""

import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adq.quant.errors import InputError
from adq.search.config import EXECUTION, OPTIONS, StudyConfig, make_config
from adq.search.executors.job_server import Job, JobServer
from adq.search.executors.package import write_package
from adq.search.tasks.place import IMAGE_TASKS, split_options

REMOTE_OUT = "~/adq-runs"
STUDY, OUT, VERSION = "adq_study", "adq_out", "adq_version"
"""Keys of a job's metadata."""

STOP_S = 60
"""Seconds that a stopped study gets to write the front it has; Ray's own are 3."""


@dataclass(frozen=True)
class Submission:
    """What is sent: `files` are those that the options name, as they lie below `folder`."""

    study: str
    command: str
    out: str
    folder: Path
    files: tuple[Path, ...] = ()


def new_study(values: Mapping[str, Any], folder: Path, out: str | None) -> Submission:
    """The command that makes a study of these options, checked as far as that is possible here.

    Without a name the study gets one of its task and the time. Raises InputError for options that
    cannot be right, and for files outside the working folder.
    """
    given = {name: value for name, value in values.items() if value is not None}
    config = make_config(given)
    config.budget  # noqa: B018 (a missing budget is said before anything is sent)
    config = replace(config, study=config.study or _name(config.task))
    files = _named_files(config, folder)
    _check_places(config)
    paths = {name: relative for name, (relative, _) in files.items()}
    options = {name: getattr(config, name) for name in OPTIONS if name in given} | paths
    options |= _execution(config) | {"study": config.study}
    options.pop("out", None)
    modules = [folder / f"{m}.py" for m in _modules(config) if (folder / f"{m}.py").is_file()]
    where = remote_path(out or given.get("out"))
    return Submission(
        study=config.study or "",
        command=_command(options, where),
        out=where,
        folder=folder,
        files=tuple(path for _, path in files.values()) + tuple(modules),
    )


def resumed_study(
    name: str, values: Mapping[str, Any], more: Mapping[str, Any], folder: Path, out: str | None
) -> Submission:
    """The command that brings a study on the cluster to its end.

    `values` may be of EXECUTION, `more` are the own options of `adq-search resume`.
    """
    given = {key: value for key, value in values.items() if value is not None}
    if extra := sorted(set(given) - set(EXECUTION)):
        raise InputError(
            f"{extra[0].replace('_', '-')}: a study that is resumed keeps its options; only "
            "--trials, --time-budget and how it is run may be said"
        )
    _plain_name(name)
    config = make_config(given)
    _check_places(config)
    options = {key: getattr(config, key) for key in given} | _execution(config)
    options |= {key: value for key, value in more.items() if value is not None}
    where = remote_path(out)
    return Submission(name, _command(options, where, resume=name), where, folder)


def send(
    address: str | None,
    submission: Submission,
    *,
    job_id: str | None = None,
    requirements: Path | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[JobServer, str]:
    """Send it, with the working folder, to the job server at `address`; returns that and the
    job's id.

    Raises InputError, before the server is asked, for what cannot be sent.
    """
    if not submission.folder.is_dir():
        raise InputError(f"working-dir: {submission.folder} is no folder")
    if job_id is not None and job_id != _as_id(job_id):
        raise InputError(f"job-id: expected letters, digits and any of _.-, got {job_id!r}")
    if gpus and not submission.out.startswith("/"):
        raise InputError(
            "driver-gpus: the driver then runs where there are GPUs, not always on the head node; "
            "give --out the full path of a folder that all nodes see"
        )
    runtime_env: dict[str, Any] = {
        "env_vars": {"OMP_WAIT_POLICY": "PASSIVE", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
    }
    if requirements is not None:
        runtime_env["pip"] = _requirements(requirements)
    server = JobServer(address)
    with tempfile.TemporaryDirectory(prefix="adq-submit-") as scratch:
        package = Path(scratch) / "working_dir.zip"
        count = write_package(submission.folder, submission.files, package)
        if count:
            size = package.stat().st_size
            say(f"sending {count} files of {submission.folder.resolve()} ({size / 1e6:.1f} MB)")
            runtime_env["working_dir"] = str(package)
        id = server.submit(
            submission.command,
            job_id or f"{_as_id(submission.study)}-{secrets.token_hex(3)}",
            runtime_env,
            {STUDY: submission.study, OUT: submission.out, VERSION: version("adq-search")},
            cpus,
            gpus,
        )
    return server, id


def check_version(sender: str) -> None:
    """Raises InputError where this installation is another one than the sender's."""
    here = version("adq-search")
    if sender != here:
        raise InputError(
            f"this job was sent by adq-search {sender}, and the cluster has {here}: install the "
            "same version on all machines"
        )


def find_job(server: JobServer, name: str) -> Job:
    """The job of this id, or else the latest one of the study of this name."""
    jobs = server.jobs()
    for job in jobs:
        if job.id == name:
            return job
    for job in jobs:
        if job.metadata.get(STUDY) == name:
            return job
    raise InputError(f"no job and no study {name!r} at {server.url}: 'adq-search status' lists all")


def study_folder(server: JobServer, name: str, given: str | None = None) -> str:
    """Where the cluster keeps the study, as `remote_path` gives it: what its last job was told."""
    if given is None:
        for job in server.jobs():
            if job.metadata.get(STUDY) == name:
                return job.metadata.get(OUT, REMOTE_OUT)
    return remote_path(given)


def outcome(job: Job) -> tuple[int, str]:
    """The exit code that stands for a job's end, and what to say."""
    study = shlex.quote(job.metadata[STUDY]) if STUDY in job.metadata else ""
    if job.status == "SUCCEEDED":
        home = f": 'adq-search fetch {study}' brings its study home" if study else ""
        return 0, f"job {job.id} is done{home}"
    again = f"; 'adq-search submit --resume {study}' goes on" if study else ""
    if job.status == "STOPPED":
        return 1, f"job {job.id} was stopped, and what it finished is kept{again}"
    if job.exit_code == 127:
        return 2, (
            f"job {job.id} failed: adq-search is not installed on the head node, or not on the "
            "PATH of its 'ray start'"
        )
    lines = [line.strip() for line in job.message.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if job.exit_code == 2 and errors:
        return 2, f"job {job.id} failed: {errors[-1].removeprefix('error: ')}"
    code = "" if job.exit_code is None else f" with exit code {job.exit_code}"
    last = f": {lines[-1]}" if lines else ""
    return 2 if job.exit_code == 2 else 1, f"job {job.id} failed{code}{last}{again}"


def remote_path(path: str | None) -> str:
    """A folder on the head node: relative ones lie below its user's home, for a shell to expand."""
    if path is None:
        return REMOTE_OUT
    if path.startswith(("/", "~/")):
        return path
    return f"~/{path.removeprefix('./')}"


def shell_path(path: str) -> str:
    """`remote_path` quoted for a shell, but for the ~ that it expands."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)


def _command(options: Mapping[str, Any], out: str, resume: str | None = None) -> str:
    word = "" if resume is None else " resume"
    parts = [f"adq-search sent-by {version('adq-search')} && exec adq-search{word}"]
    for name, value in options.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            parts.append(f"--{name.replace('_', '-')} {shlex.quote(text)}")
    parts.append(f"--out {shell_path(out)}")
    return " ".join(parts if resume is None else [*parts, "--", shlex.quote(resume)])


def _execution(config: StudyConfig) -> dict[str, str | None]:
    """On the cluster a study is run by Ray, unless it was asked to be run by the driver alone."""
    if config.executor == "local":
        return {"executor": "local", "address": None}
    return {"executor": "ray", "address": "auto"}


def _named_files(config: StudyConfig, folder: Path) -> dict[str, tuple[str, Path]]:
    """The options that name files: their text in the working folder, and the files."""
    found = {}
    if config.weights is not None:
        found["weights"] = _inside(folder, config.weights, "weights")
    if config.latency is not None and config.latency.endswith(".json"):
        found["latency"] = _inside(folder, config.latency, "latency")
    kind, _, rest = config.task.partition(":")
    place, _ = split_options(rest)
    if kind in IMAGE_TASKS and place and not Path(place).is_absolute():
        text, path = _inside(folder, place, f"task {kind}")
        found["task"] = f"{kind}:{text}{rest[len(place) :]}", path
    return found


def _inside(folder: Path, named: str, option: str) -> tuple[str, Path]:
    path = Path(named)
    if not path.exists():
        raise InputError(f"{option}: cannot read {named}: there is no such file here to send along")
    absolute = path.parent.resolve() / path.name
    if not absolute.is_relative_to(folder.resolve()):
        raise InputError(
            f"{option}: {named} is not in the working folder {folder.resolve()}, and only that is "
            "sent: put it there, or name a folder that holds all with --working-dir"
        )
    relative = absolute.relative_to(folder.resolve())
    return relative.as_posix(), folder / relative


def _check_places(config: StudyConfig) -> None:
    """Raises InputError for places that would be taken away with the job's copy of the folder."""
    storage = config.storage or ""
    path = re.fullmatch(r"sqlite(?:\+\w+)?:///(?!/)(.*)|journal:(?!/)(.*)", storage)
    if path:
        raise InputError(
            f"storage: {storage} would be lost with the job's temporary folder: give the file's "
            "full path on the head node, or a database's URL (postgresql://...), or leave it out"
        )
    places = config.checkpoints
    if places is not None and "://" not in places and not places.startswith("/"):
        raise InputError(
            f"checkpoints: {places} would be lost with the job's temporary folder: give a URL "
            "(s3://...), or the full path of a folder that all nodes see"
        )


def _modules(config: StudyConfig) -> Iterator[str]:
    """The user's own modules that options name."""
    for spec in (config.task, config.latency):
        if spec is not None and ":" in spec and not spec.endswith(".json"):
            yield spec.partition(":")[0].replace(".", "/")


def _requirements(path: Path) -> str:
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"requirements: cannot read {path}: {error}") from None
    return str(path)


def _name(task: str) -> str:
    base = re.sub(r"[^A-Za-z0-9_.-]+", "-", task.partition(":")[0]).strip(".-") or "study"
    return f"{base}-{time.strftime('%Y%m%d-%H%M%S')}"


def _as_id(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def _plain_name(name: str) -> None:
    make_config({"study": name})
