"""What a search needs of its surroundings: each thing looked at, and what to do where it is amiss.

Every check runs in a process of its own that is ended when its time is over, so that a driver or a
network file system that hangs, and an address where nobody answers, hold up nothing else.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from adq.search.doctor_machine import check_gpus, check_processors, check_versions
from adq.search.doctor_places import check_checkpoints, check_folder, check_storage
from adq.search.finding import PROBLEM, Finding, Values, error_text

CHECK_S, CLUSTER_S = 60.0, 120.0


def examine(
    out: str,
    storage: str | None = None,
    checkpoints: str | None = None,
    address: str | None = None,
    seconds: float | None = None,
) -> list[Finding]:
    """All findings on this machine, the named places and the cluster, in the order of CHECKS.

    `seconds` is the most that a check may take; CHECK_S, and CLUSTER_S of the cluster, if not
    given. Never raises for what it finds.
    """
    values = {
        "out": str(Path(out).absolute()),
        "storage": storage,
        "checkpoints": checkpoints,
        "address": address,
    }
    here = [name for name in CHECKS if name != "cluster"]
    with ThreadPoolExecutor(len(here)) as pool:
        found = [*pool.map(lambda name: _apart(name, values, seconds or CHECK_S), here)]
    found.append(_apart("cluster", values, seconds or CLUSTER_S))
    return [finding for each in found for finding in each]


def _apart(name: str, values: Values, seconds: float) -> list[Finding]:
    """The findings of one check, made in another process."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "adq.search.doctor", name, json.dumps(values)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        printed, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that waits for a dead server stays
            process.communicate(timeout=1)
        return [Finding(name, PROBLEM, f"no answer within {seconds:.0f} s", _HANGS[name])]
    try:
        return [Finding(**found) for found in json.loads(printed.splitlines()[-1])]
    except (IndexError, TypeError, ValueError):
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        last = lines[-1] if lines else f"it ended with exit code {process.returncode}"
        return [
            Finding(
                name,
                PROBLEM,
                f"the check could not be made: {last[:200]}",
                "install adq-search and its packages again if this is about an import",
            )
        ]


def _cluster(values: Values) -> list[Finding]:
    if values["address"] is None:
        return []
    from adq.search.executors.cluster import examine_cluster

    return [
        Finding("Ray", *found)
        for found in examine_cluster(values["address"], values["out"], values["checkpoints"])
    ]


CHECKS: dict[str, Callable[[Values], list[Finding]]] = {
    "versions": check_versions,
    "processors": check_processors,
    "GPUs": check_gpus,
    "out folder": check_folder,
    "storage": check_storage,
    "checkpoints": check_checkpoints,
    "cluster": _cluster,
}
_HANGS = {
    "versions": "see what the machine is busy with",
    "processors": "see what the machine is busy with",
    "GPUs": "'nvidia-smi' may hang too: restart the driver or the machine",
    "out folder": "its file server may be gone: see with 'df', or choose another --out",
    "storage": "the server, or the network to it, may be gone; see that the port is let through",
    "checkpoints": "the server, or the network to it, may be gone",
    "cluster": "its head may be gone or overloaded: see 'ray status' there",
}


def main(name: str, values: str) -> None:
    """One check, its findings as the last line of stdout."""
    try:
        found = CHECKS[name](json.loads(values))
    except Exception as error:  # noqa: BLE001 (a check that fails is a finding)
        found = [
            Finding(
                name,
                PROBLEM,
                f"the check could not be made: {error_text(error)}",
                "install adq-search and its packages again if this is about an import",
            )
        ]
    print(f"\n{json.dumps([asdict(each) for each in found])}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
