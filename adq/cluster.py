"""Commands that work on a Ray cluster through its job server: submit, status, logs, stop, fetch."""

import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adq.options import ConfigFile, Json, studies_folder, with_study_options
from adq.quant.errors import InputError
from adq.search.config import read_toml

if TYPE_CHECKING:
    from adq.search.executors.job_server import Job, JobServer

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="the cluster's job server, like http://HEAD:8265; RAY_API_SERVER_ADDRESS if not given",
    ),
]
JobName = Annotated[
    str, typer.Argument(metavar="JOB", help="the job's id, or its study's name for the latest job")
]
Follow = Annotated[
    bool,
    typer.Option("--follow/--no-follow", help="show the log until the job ends"),
]


@with_study_options
def submit(
    address: Address = None,
    config: ConfigFile = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="NAME", help="go on with a study that is on the cluster"),
    ] = None,
    working_dir: Annotated[
        str,
        typer.Option(
            "--working-dir",
            help="the folder that is sent along, with the task's module; .gitignore and .rayignore "
            "say what is not [.]",
            show_default=False,
        ),
    ] = ".",
    requirements: Annotated[
        str | None,
        typer.Option(
            "--requirements", help="a requirements.txt of what to install on the cluster for this"
        ),
    ] = None,
    driver_cpus: Annotated[
        float | None,
        typer.Option(
            "--driver-cpus",
            min=0,
            help="CPUs to reserve for the driver, which then "
            "sees no GPUs but those of --driver-gpus",
        ),
    ] = None,
    driver_gpus: Annotated[
        float | None,
        typer.Option(
            "--driver-gpus",
            min=0,
            help="GPUs to reserve for the driver, which trains the FP32 model and measures "
            "sensitivities",
        ),
    ] = None,
    job_id: Annotated[
        str | None, typer.Option("--job-id", help="the job's name; one is made if not given")
    ] = None,
    follow: Follow = True,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="the folder of studies on the head node, below the home there unless it starts "
            "with / [adq-runs]",
        ),
    ] = None,
    **values: Any,
) -> None:
    """Send a study to a Ray cluster: the same options, with the working folder.

    There trainings are run by Ray unless --executor local is given. For example:
    adq-search submit --address http://HEAD:8265 --task mymodule:make_task --budget-bits 2.8
    """
    from adq.search.executors.submit import new_study, resumed_study, send

    folder = Path(working_dir)
    if resume is None:
        submission = new_study((read_toml(config) if config else {}) | _given(values), folder, out)
    else:
        if config is not None:
            raise InputError("config: a study that is resumed keeps its options")
        own = {name: values.pop(name) for name in ("trials", "time_budget")}
        submission = resumed_study(resume, values, own, folder, out)
    server, job = send(
        address,
        submission,
        job_id=job_id,
        requirements=None if requirements is None else Path(requirements),
        cpus=driver_cpus,
        gpus=driver_gpus,
        say=_say,
    )
    _say(f"job {job}: study {submission.study} in {submission.out} on the cluster")
    if follow:
        _follow(server, job)
    else:
        _say(f"'adq-search logs {job} --follow' shows it, 'adq-search stop {job}' ends it")
        print(job)


def status(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="one job's id, or its study's name")
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """List the jobs on a cluster, or show one."""
    from adq.console import print_table
    from adq.search.executors.job_server import JobServer
    from adq.search.executors.submit import find_job, outcome

    server = JobServer(address)
    if job is not None:
        found = find_job(server, job)
        if as_json:
            print(json.dumps(_shown(found), indent=1))
            return
        shown = _shown(found) | {"started": _time(found.started), "ended": _time(found.ended)}
        for name, value in shown.items():
            if value not in (None, "") and name not in ("metadata", "message"):
                print(f"{name:10} {value}")
        if found.has_ended:
            print(f"\n{outcome(found)[1]}")
        return
    jobs = server.jobs()
    if as_json:
        print(json.dumps([_shown(each) for each in jobs], indent=1))
    elif jobs:
        rows = [[j.id, j.metadata.get("adq_study", ""), j.status, _time(j.started), _took(j)]
                for j in jobs]  # fmt: skip
        print_table(["job", "study", "status", "started", "took"], rows)
    else:
        print(f"no jobs at {server.url}")


def logs(
    job: JobName,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="go on until the job ends")
    ] = False,
) -> None:
    """Show the log of a job; with --follow, the exit code is the job's as with submit."""
    from adq.search.executors.job_server import JobServer
    from adq.search.executors.submit import find_job

    server = JobServer(address)
    found = find_job(server, job)
    if follow:
        _follow(server, found.id)
    else:
        print(server.log(found.id), end="")


def stop(job: JobName, address: Address = None) -> None:
    """Stop a job; what its study finished is kept, and it can be resumed."""
    from adq.search.executors.job_server import JobServer
    from adq.search.executors.submit import find_job

    server = JobServer(address)
    found = find_job(server, job)
    if server.stop(found.id):
        study = found.metadata.get("adq_study")
        again = f"; 'adq-search submit --resume {shlex.quote(study)}' goes on" if study else ""
        print(f"job {found.id} is being stopped{again}")
    else:
        print(f"job {found.id} has ended already: {found.status}")


def fetch(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="the study's name")],
    address: Address = None,
    out: Annotated[
        str | None, typer.Option("--out", help="the folder of studies here [runs]")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="the folder of studies on the cluster; where its last job put it if not given",
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="also what is only needed to resume it here")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="replace a study of this name that was made here")
    ] = False,
) -> None:
    """Bring a study's front, models and records home from a cluster."""
    from adq.search.executors.fetch import fetch

    folder = fetch(
        address,
        name,
        Path(studies_folder(context, out)),
        source=source,
        everything=everything,
        force=force,
        say=_say,
    )
    _say(f"'adq-search show {shlex.quote(name)}' shows it")
    print(folder)


def pack(
    name: str,
    out: Annotated[str, typer.Option("--out")],
    everything: Annotated[bool, typer.Option("--all")] = False,
) -> None:
    """Write a study as text, for `fetch` at the other end of a job's log."""
    from adq.search.executors.fetch import pack

    pack(Path(out), name, sys.stdout, everything)


def sent_by(version: str) -> None:
    """Stop a job whose sender has another version."""
    from adq.search.executors.submit import check_version

    check_version(version)


def register(app: typer.Typer) -> None:
    """Add these commands to `adq-search`."""
    for command in (submit, status, logs, stop, fetch):
        app.command()(command)
    for hidden in (pack, sent_by):
        app.command(hidden=True)(hidden)


def _follow(server: "JobServer", job: str) -> None:
    """Show the log until the job ends, and end with the exit code that stands for its end."""
    from adq.search.executors.submit import outcome

    try:
        ended = server.follow(job, _write)
    except KeyboardInterrupt:
        _say(
            f"\njob {job} goes on: 'adq-search logs {job} --follow' shows it again, 'adq-search "
            f"stop {job}' ends it"
        )
        sys.exit(130)
    code, message = outcome(ended)
    if code:
        _say(f"error: {message}")
        sys.exit(code)
    _say(message)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _shown(job: "Job") -> dict[str, Any]:
    """All that is known of a job, but for passwords in its command."""
    data = job.to_json()
    for name in ("command", "message"):
        data[name] = re.sub(r"(://[^\s:/@]+):[^\s@/]+@", r"\1:***@", data[name])
        data[name] = re.sub(r"([?&]\w*passw(?:or)?d=)[^\s&'\"]*", r"\1***", data[name])
    return {"study": job.metadata.get("adq_study", ""), "folder": job.metadata.get("adq_out", ""),
            **data}  # fmt: skip


def _time(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _took(job: "Job") -> str:
    if job.started is None:
        return ""
    seconds = round((job.ended or time.time()) - job.started)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
