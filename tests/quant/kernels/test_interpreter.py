"""Runs the tests of the Triton kernels with Triton's interpreter, each file in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kernels", ["n2uq", "weights", "codebooks", "inputs", "packed"])
def test_the_kernels_are_right_under_the_interpreter(kernels: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    file = Path(__file__).with_name(f"test_{kernels}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
