"""A PostgreSQL server of a test's own, from Debian's packages, which it can stop and start."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

WAIT_S = 20.0
SETTINGS = {  # a test's data outlast the end of the server, and need not outlast a power cut
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "autovacuum": "off",
    "listen_addresses": "127.0.0.1",
    "max_connections": "30",
}


class PostgresServer:
    """A server in a folder, on a free port of this machine; `url` is for Optuna's storage."""

    def __init__(self, folder: Path, programs: Path, owner: str | None) -> None:
        self.folder, self._programs, self._owner = folder, programs, owner
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"postgresql://tester:secret@127.0.0.1:{self.port}/postgres"

    def create(self) -> None:
        password = self.folder / "password"
        password.write_text("secret\n")
        if self._owner is not None:
            shutil.chown(self.folder, self._owner)
            shutil.chown(password, self._owner)
        subprocess.run(
            [
                self._programs / "initdb",
                f"--pgdata={self.folder / 'data'}",
                "--username=tester",
                f"--pwfile={password}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--no-locale",
                "--no-sync",
                "--no-instructions",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self._owner,
            cwd=self.folder,
        )

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = SETTINGS | {"port": str(self.port), "unix_socket_directories": str(self.folder)}
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    self._programs / "postgres",
                    "-D",
                    self.folder / "data",
                    *(part for key, value in settings.items() for part in ("-c", f"{key}={value}")),
                ],
                stdout=log,
                stderr=log,
                user=self._owner,
                cwd=self.folder,
            )
        until = time.monotonic() + WAIT_S
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > until:
                    said = (self.folder / "log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"PostgreSQL does not start: {error}\n{said}") from None
                time.sleep(0.05)

    def stop(self) -> None:
        """End the server at once, as a crash does; its data stay, and its clients are cut off."""
        if self._process is not None:
            self._process.send_signal(3)  # SIGQUIT: an immediate shutdown, of its children too
            self._process.wait(WAIT_S)
            self._process = None


def _programs() -> Path:
    """The folder of the newest server's programs; skips the test where there is none."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3])
    )
    if not found:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    return found[-1].parent


def _owner() -> str | None:
    """The user that the server runs as; PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            pwd.getpwnam(name)
        except KeyError:
            continue
        return name
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A running server, gone with its data when the block ends."""
    programs, owner = _programs(), _owner()
    with tempfile.TemporaryDirectory(prefix="adq-pg-", ignore_cleanup_errors=True) as name:
        server = PostgresServer(Path(name), programs, owner)
        server.create()
        try:
            server.start()
            yield server
        finally:
            server.stop()
