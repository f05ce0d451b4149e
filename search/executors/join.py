"""Joining a Ray cluster or starting one on this machine, and one line that says why not."""

import importlib.metadata
import json
import logging
import os
import platform
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from adq.quant.errors import InputError
from adq.search.config import StudyConfig
from adq.search.executors.shares import ranks_of

REACH_S = 5.0
JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray keeps what a submitted job was given, in the job's environment."""

log = logging.getLogger(__name__)


def connect(config: StudyConfig, name: str) -> None:
    """Join the cluster at the configuration's address, else start one on this machine, in the
    namespace `adq-NAME`.

    Raises InputError for a cluster that does not answer, wants a token, or has other versions.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # else it prints on stdout of every worker that dies, which no option of Ray's turns off
    ray._private.worker.print_to_stdstream = _log_messages  # type: ignore[assignment]
    address = None if config.address == "local" else config.address
    env = _worker_env(config)
    options: dict[str, Any] = {
        "namespace": f"adq-{name}",
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    if address not in (None, "auto"):
        reach(address)
    try:
        with _silence():
            if address is None:  # workers get what this process has, and those kept ready serve
                with environment(env):
                    ray.init("local", include_dashboard=False, **options)
            else:
                ray.init(address, runtime_env={"env_vars": env}, **options)
    except AuthenticationError as error:
        raise InputError(
            f"address: the Ray cluster wants a token ({message_of(error)[:120]})"
        ) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 (Ray raises plain Exceptions, too)
        with suppress(Exception):
            ray.shutdown()
        raise InputError(reason_of(address, error)) from None


def living_nodes() -> list[Mapping[str, float]]:
    """The resources of each node of the cluster that lives."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _log_messages(data: Mapping[str, Any], **_: Any) -> None:
    log.info("Ray: %s", " ".join(map(str, data.get("lines", ()))))


@contextmanager
def _silence() -> Iterator[None]:
    """Without what Ray's native code writes to stderr while it tries to connect."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """With these variables in this process's environment."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _worker_env(config: StudyConfig) -> dict[str, str]:
    """What workers find in their environment before they import torch."""
    ranks = ranks_of(config)
    wanted = {
        "OMP_NUM_THREADS": str(max(1, (config.cpus_per_trial or 1) // ranks)),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin cost a factor of ten on shared cores
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # no GPUs are seen by those who asked for none
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    }
    job = json.loads(os.environ.get(JOB_ENV, "{}")).get("runtime_env") or {}
    given = job.get("env_vars") or {}  # Ray refuses to have one given twice
    return {name: value for name, value in wanted.items() if name not in given}


def reach(address: str | None) -> None:
    """InputError where nothing listens: Ray itself tries for two minutes, then ends the process."""
    host, _, port = (address or "").rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise InputError(f"address: expected auto or HOST:PORT of a Ray cluster, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"address {address}: no Ray cluster answers there ({error}); start one with 'ray start "
            "--head', or leave out --address for this machine alone"
        ) from None


def reason_of(address: str | None, error: BaseException) -> str:
    """Why Ray could not be joined, or with None not be started here, and what to do about it."""
    text = message_of(error)
    if address is None:
        return f"Ray cannot be started on this machine: {text[:300]}"
    if "Version mismatch" in text or "version mismatch" in text:
        mine = f"Ray {importlib.metadata.version('ray')}, Python {platform.python_version()}"
        return (
            f"address {address}: the cluster's versions are others than here ({mine}): {text[:300]}"
        )
    if "find any running Ray instance" in text:
        return (
            f"address {address}: no Ray cluster runs on this machine; start one with 'ray start "
            "--head', or give its HOST:PORT"
        )
    if "Failed to connect to Ray cluster" in text:
        return (
            f"address {address}: something answers there but does not let this process in; check "
            "RAY_AUTH_MODE and RAY_AUTH_TOKEN, and that the port is the cluster's own (6379)"
        )
    return (
        f"address {address}: cannot join the Ray cluster: {text[:300]}; this machine must be one "
        "of its nodes, or use 'adq-search submit'"
    )


def message_of(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())
