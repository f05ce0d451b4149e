"""What the tests of executors share."""

from pathlib import Path

import pytest
import watched_task
from trainings import bench_of

from adq.search.jobs import Bench


@pytest.fixture
def watched(tmp_path: Path) -> Bench:
    return bench_of(tmp_path, watched_task.make_task(tmp_path))
