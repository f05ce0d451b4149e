"""A Ray that cannot be joined or started is said in one line."""

import functools
import socket
from pathlib import Path
from typing import Any

import pytest

from adq.quant.errors import InputError
from adq.search.config import StudyConfig
from adq.search.executors.ray import RayExecutor


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("here", "expected auto or HOST:PORT of a Ray cluster, got 'here'"),
        ("ray://127.0.0.1:10001", "expected auto or HOST:PORT"),
        ("127.0.0.1:{free}", "no Ray cluster answers there .*Connection refused"),
        ("auto", "no Ray cluster runs on this machine"),
    ],
)
def test_a_cluster_that_is_not_there_is_said_in_one_line(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(set))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config = StudyConfig(
            task="python",
            budget_bits=4.0,
            address=address.format(free=free.getsockname()[1]),
        )
        with pytest.raises(InputError, match=message), RayExecutor(config):
            pass


def test_a_ray_that_does_not_start_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*given: Any, **options: Any) -> None:  # as ray/_private/node.py does
        raise Exception("The current node timed out during startup.\n\nIt is slow.")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", late)
    config = StudyConfig(task="python", budget_bits=4.0)
    with pytest.raises(
        InputError, match=r"^Ray cannot be started on this machine: .*startup\. It is slow\.$"
    ):
        RayExecutor(config).__enter__()
