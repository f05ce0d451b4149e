"""A real Ray cluster on this machine: a head and more nodes, each `ray start` in its own process.

Every cluster has its own ports, token and folder, so that several may run side by side. Each
process of a node carries that node's mark in its environment: a node, or all, is ended by the ids
of the processes that carry it, whoever their parents are by then.

Drivers belong into processes of their own, with `cluster.env`: Ray reads token and mode once, when
it is first imported.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "ADQ_TEST_NODE"
START_S = 300.0
"""Two slow cores that others use as well need far more than the ten seconds of a quiet machine."""

QUIET = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_export_api_write": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    # a node that is killed is known to be dead within about two seconds, not fifteen
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "4",
}


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def wait_until(true: Callable[[], Any], what: str, seconds: float = START_S) -> Any:
    """What `true` returns once it is not false; AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        found = true()
        if found:
            return found
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.1)


@dataclass
class Node:
    """One `ray start --block` with everything that it started."""

    mark: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def pids(self) -> list[int]:
        """The living processes of this node, zombies not counted.

        Those of its session, since a process that renames itself overwrites what can be seen of its
        environment, and those with its mark: jobs have sessions of their own.
        """
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with suppress(OSError, IndexError):
                    state, _, _, session, *_ = (
                        (folder / "stat").read_text().rpartition(")")[2].split()
                    )
                    mine = int(session) == self.process.pid
                    mine = mine or wanted in (folder / "environ").read_bytes().split(b"\0")
                    if mine and state != "Z":
                        found.append(int(folder.name))
        return found

    def kill(self) -> None:
        """End it at once, as when the power fails."""

        def gone() -> bool:
            pids = self.pids()  # again and again: a process may start another while it dies
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            return not pids

        wait_until(gone, "the end of a Ray node", 60)
        self.process.wait()


@dataclass
class RayCluster:
    """Make one with `ray_cluster`."""

    address: str
    """The cluster's own address, HOST:PORT, for `ray.init` and `ray start --address`."""
    dashboard_url: str
    """The job server, http://HOST:PORT."""
    token: str
    folder: Path
    cpus: int
    env: dict[str, str]
    """All of the environment that a driver or a command line needs."""
    nodes: list[Node] = field(default_factory=list)
    """The head first."""

    def get(self, path: str) -> Any:
        """What the dashboard answers, as JSON. Raises OSError while it is not there."""
        request = urllib.request.Request(
            self.dashboard_url + path, headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def alive(self) -> int:
        """Nodes that the cluster counts as living; 0 while it does not answer."""
        try:
            found = self.get("/api/v0/nodes")["data"]["result"]["result"]
        except (OSError, ValueError, TypeError, KeyError):
            return 0
        return sum(node["state"] == "ALIVE" for node in found)

    def add_node(self, wait: bool = True) -> Node:
        """One more node; with `wait` it is ready for work."""
        agent, *_ = ports = free_ports(3)
        node = self._start(
            f"--address={self.address}",
            f"--dashboard-agent-listen-port={agent}",
            f"--runtime-env-agent-port={ports[1]}",
            f"--metrics-export-port={ports[2]}",
        )
        if wait:
            self.wait()
        return node

    def wait(self, nodes: int | None = None) -> None:
        """Wait until so many nodes live: those that were started and not killed, if not given."""
        there = [node for node in self.nodes if node.process.poll() is None]
        wanted = len(there) if nodes is None else nodes

        def ready() -> bool:
            for node in there:
                assert node.process.poll() is None, f"a node ended: {node.log.read_text()[-2000:]}"
            return self.alive() == wanted

        wait_until(ready, f"{wanted} living nodes")

    def kill_node(self, index: int, wait: bool = False) -> None:
        """End a whole node at once (0 is the head); with `wait`, until the cluster knows it."""
        self.nodes[index].kill()
        if wait:
            self.wait()

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.kill()

    def _start(self, *arguments: str) -> Node:
        mark = secrets.token_hex(8)
        # a folder of its own: nodes that start together in one folder get in each other's way
        log = self.folder / f"node-{len(self.nodes)}-{mark}.log"
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", *arguments,
            "--node-ip-address=127.0.0.1", f"--num-cpus={self.cpus}", "--num-gpus=0",
            f"--object-store-memory={100 * 2**20}", f"--temp-dir={self.folder / mark[:4]}",
            "--disable-usage-stats", "--log-style=record",
        ]  # fmt: skip
        of_drivers = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
        env = {name: value for name, value in self.env.items() if name not in of_drivers}
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                env=env | {MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the tests is no signal to the cluster
            )
        node = Node(mark, process, log)
        self.nodes.append(node)
        return node


@contextmanager
def ray_cluster(
    nodes: int = 2, cpus: int = 1, env: dict[str, str] | None = None
) -> Iterator[RayCluster]:
    """A head and `nodes` more with `cpus` CPUs each, ready for work; ended with the block.

    `env` is added to the environment of nodes and drivers. Logs of Ray's processes are below
    `cluster.folder` until the block ends.
    """
    folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))  # short: sockets' paths have limits
    cluster = None
    try:
        for attempt in range(3):  # another process may take a free port first
            cluster = _head(folder, cpus, env or {})
            if _answers(cluster):
                break
            log = cluster.nodes[0].log.read_text()
            cluster.close()
            assert attempt < 2, f"no Ray head after three attempts:\n{log[-3000:]}"
        for _ in range(nodes):
            cluster.add_node(wait=False)
        cluster.wait()
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def _head(folder: Path, cpus: int, env: dict[str, str]) -> RayCluster:
    gcs, dashboard, client, agent, runtime, metrics, more = free_ports(7)
    token = secrets.token_hex(32)
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    cluster = RayCluster(
        address=f"127.0.0.1:{gcs}",
        dashboard_url=f"http://127.0.0.1:{dashboard}",
        token=token,
        folder=folder,
        cpus=cpus,
        env=own
        | QUIET
        | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "DASHBOARD_METRIC_PORT": str(more),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_ADDRESS": f"127.0.0.1:{gcs}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }
        | env,
    )
    cluster._start(
        "--head",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        "--include-dashboard=true",
        f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={agent}",
        f"--runtime-env-agent-port={runtime}",
        f"--metrics-export-port={metrics}",
    )
    return cluster


def _answers(cluster: RayCluster) -> bool:
    """Whether the head lives and its job server takes requests; False once it has ended."""
    ended = object()

    def ready() -> object:
        if cluster.nodes[0].process.poll() is not None:
            return ended
        try:
            return cluster.alive() == 1 and cluster.get("/api/jobs/") is not None
        except (OSError, ValueError):
            return None

    return wait_until(ready, "the head of the cluster") is not ended
