"""A Ray cluster as `adq-search doctor` sees it: its nodes, one by one."""

import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from adq.quant.errors import InputError
from adq.search.executors.job_server import JobServer
from adq.search.executors.join import reach, reason_of
from adq.search.files import open_files
from adq.search.finding import OK, PROBLEM, WARNING

PACKAGES = ("ray", "torch", "optuna", "adq-search")
NODE_S, SEEN_S = 60.0, 5.0
CLOCK_S = 2.0

Finding = tuple[str, str, str]
"""State, text, remedy."""


def examine_cluster(address: str, out: str, checkpoints: str | None) -> list[Finding]:
    """What there is to say of a cluster, through its job server or as one of its drivers."""
    if address.startswith(("http://", "https://")):
        return _through_job_server(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    token = "Ray's token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what 'ray get-auth-token' "
    token += "prints on the head"
    try:
        if address != "auto":
            reach(address)
        ray.init(address, namespace="adq-doctor", logging_level=logging.ERROR, log_to_driver=False)
    except AuthenticationError as error:
        return [(PROBLEM, f"{address} refuses this driver: {_line(error)}", token)]
    except (Exception, SystemExit) as error:  # noqa: BLE001 (Ray raises plain Exceptions, too)
        text = str(error) if isinstance(error, InputError) else reason_of(address, error)
        text, _, remedy = text.partition("; ")
        return [(PROBLEM, text, remedy or "see 'ray status' on the head")]
    try:
        return _nodes(address, out, checkpoints)
    finally:
        ray.shutdown()


def _through_job_server(address: str) -> list[Finding]:
    try:
        server = JobServer(address)
        jobs = server.jobs()
    except InputError as error:
        text, _, remedy = str(error).partition(": ")
        return [(PROBLEM, text, remedy)]
    found = [(OK, f"{server.url} takes jobs, and knows {len(jobs)}", "")]
    if server.url.startswith("http://") and os.environ.get("RAY_AUTH_MODE", "") != "token":
        found.append(
            (
                WARNING,
                f"{server.url} runs whatever anybody who reaches it sends",
                "start the head with RAY_AUTH_MODE=token, or keep its port behind a tunnel",
            )
        )
    with suppress(OSError, ValueError, KeyError, TypeError):
        with urllib.request.urlopen(f"{server.url}/api/version", timeout=10) as answer:
            theirs = json.load(answer)["ray_version"]
        if theirs != ray.__version__:
            found.append(
                (
                    WARNING,
                    f"Ray is {ray.__version__} here and {theirs} on the cluster",
                    f"pip install 'ray[tune]=={theirs}' here if a job is refused",
                )
            )
    found.append(
        (
            OK,
            "its nodes were not looked at",
            "for that, run 'adq-search doctor --address auto' on one of them",
        )
    )
    return found


def _nodes(address: str, out: str, checkpoints: str | None) -> list[Finding]:
    """Versions, GPUs, clock and folders of each living node, by a task that is pinned to it."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    names = {n["NodeID"]: f"{n['NodeManagerAddress']} ({n['NodeID'][:6]})" for n in nodes}
    gpus = {n["NodeID"]: n["Resources"].get("GPU", 0) for n in nodes}
    found: list[Finding] = [
        (
            OK,
            f"{address}: {len(nodes)} nodes, {sum(n['Resources'].get('CPU', 0) for n in nodes):g} "
            f"CPUs, {sum(gpus.values()):g} GPUs",
            "",
        )
    ]
    if os.environ.get("RAY_AUTH_MODE", "") != "token":
        found.append(
            (
                WARNING,
                "the cluster works without a token: who reaches its ports can run anything",
                "start all nodes with RAY_AUTH_MODE=token, or let nobody else reach them",
            )
        )
    probe = uuid.uuid4().hex
    folder = Path(out) / f".doctor-{probe}"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if checkpoints is not None and "://" not in checkpoints:
        checkpoints = str(Path(checkpoints).absolute())
        made += [path for path in (Path(checkpoints),) if not path.exists()]
    files = None
    try:
        with suppress(OSError):  # said by the check of the folder
            folder.mkdir(parents=True)
            (folder / "driver").write_text(probe)
        if checkpoints is not None:
            with suppress(InputError):  # said by the check of that place
                files = open_files(checkpoints)
                files.write(f"doctor-{probe}", probe.encode())
        looks = _ask(_look(), names, str(folder), checkpoints, f"doctor-{probe}")
        clocks = _clocks(names, looks)
        for id, name in names.items():
            look = looks.get(id)
            if isinstance(look, dict):
                found += _of_node(name, look, clocks.get(id), gpus[id])
                if folder.is_dir():
                    found.append(_seen(name, out, folder, probe, id, look["read"]))
                if files is not None:
                    found.append(_seen_checkpoint(name, checkpoints or "", look["file"], probe))
            else:
                found.append(
                    (
                        PROBLEM,
                        f"{name} does not run a task ({look or f'no answer in {NODE_S:.0f} s'})",
                        "see its log in /tmp/ray/session_latest/logs, and start it again",
                    )
                )
    finally:
        if files is not None:
            with suppress(InputError):
                files.remove(f"doctor-{probe}")
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            with suppress(OSError):
                path.rmdir()
    return found


def _look() -> Callable[..., dict[str, Any]]:
    """What a node does for us; made here so that it travels whole to nodes without adq-search."""
    packages, seen_s = PACKAGES, SEEN_S

    def look(folder: str, checkpoints: str | None, name: str) -> dict[str, Any]:
        import importlib.metadata
        import platform
        import time
        from pathlib import Path

        import ray

        versions = {"python": platform.python_version()}
        for package in packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "none"
        own, read, until = Path(folder), None, time.monotonic() + seen_s
        while read is None:
            try:
                read = (own / "driver").read_text()
                (own / ray.get_runtime_context().get_node_id()).write_text(read)
            except OSError as error:
                if time.monotonic() > until:  # a network file system may be seconds behind
                    read = f"{error.strerror or error}"
                else:
                    time.sleep(0.2)
        file: Any = None
        if checkpoints is not None:
            try:
                from adq.search.files import open_files

                file = open_files(checkpoints).read(name)
            except (ImportError, ValueError) as error:
                file = str(error)
        return {"versions": versions, "read": read, "file": file}

    return look


def _ask(task: Callable[..., Any], names: dict[str, str], *values: Any) -> dict[str, Any]:
    """What the task returns on each node, the error's text where it failed, nothing where it did
    not end in time."""
    remote = ray.remote(num_cpus=0, max_retries=0)(task)
    running = {
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(id, soft=False)).remote(
            *values
        ): id
        for id in names
    }
    done, late = ray.wait([*running], num_returns=len(running), timeout=NODE_S)
    for each in late:
        ray.cancel(each, force=True)
    answers: dict[str, Any] = {}
    for each in done:
        try:
            answers[running[each]] = ray.get(each)
        except RayError as error:
            answers[running[each]] = _line(error)
    return answers


def _clocks(names: dict[str, str], looks: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """By node, its clock minus ours and the most that this may be wrong by, in seconds: half of
    the time that the answer took."""

    def now() -> float:
        import time

        return time.time()

    clocks = {}
    for id, look in looks.items():
        if not isinstance(look, dict):
            continue
        best: tuple[float, float] | None = None
        for _ in range(3):  # the first may have to start a process
            before, started = time.time(), time.monotonic()
            answer = _ask(now, {id: names[id]}).get(id)
            half = (time.monotonic() - started) / 2
            if isinstance(answer, float) and (best is None or half < best[1]):
                best = answer - (before + half), half
        if best is not None:
            clocks[id] = best
    return clocks


def _of_node(
    name: str, look: dict[str, Any], clock: tuple[float, float] | None, gpus: float
) -> list[Finding]:
    mine = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            mine[package] = importlib.metadata.version(package)
    found: list[Finding] = []
    theirs = look["versions"]
    other = [f"{p} {theirs[p]}, not {v}" for p, v in mine.items() if theirs[p] != v]
    if other:
        lacking = [p for p in PACKAGES if theirs[p] == "none"]
        found.append(
            (
                PROBLEM if lacking else WARNING,
                f"{name} has {'; '.join(other)}",
                "install the same versions on all nodes: results may differ, and what travels "
                "between processes may not be understood",
            )
        )
    else:
        found.append((OK, f"{name}: {gpus:g} GPUs, the same versions as here", ""))
    if clock is not None and abs(clock[0]) - clock[1] > CLOCK_S:
        way = "ahead" if clock[0] > 0 else "behind"
        found.append(
            (
                WARNING,
                f"the clock of {name} is {abs(clock[0]):.1f} s {way}",
                "start a time service there (chrony, systemd-timesyncd)",
            )
        )
    return found


def _seen(name: str, out: str, folder: Path, probe: str, id: str, read: str) -> Finding:
    remedy = (
        "mount the same folder on all nodes and name it with --out or --checkpoints, or give "
        "--checkpoints a URL such as s3://BUCKET/PATH"
    )
    if read != probe:
        return WARNING, f"{name} does not see {out} ({read})", remedy
    until = time.monotonic() + SEEN_S
    while True:
        with suppress(OSError):
            if (folder / id).read_text() == probe:
                return OK, f"{name} reads and writes {out}", ""
        if time.monotonic() > until:
            return WARNING, f"{name} sees {out}, and what it writes there is not seen here", remedy
        time.sleep(0.2)


def _seen_checkpoint(name: str, where: str, file: Any, probe: str) -> Finding:
    if file == probe.encode():
        return OK, f"{name} reads checkpoints in {where}", ""
    why = file if isinstance(file, str) else "what is written here is not there"
    return (
        PROBLEM,
        f"{name} does not see checkpoints in {where} ({why})",
        "a training could not go on there: name a folder that all nodes mount, or a URL, and give "
        "all nodes the keys for it",
    )


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)[:200]
