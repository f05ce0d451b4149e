"""Jobs in this process: all of them, in order, waiting where another process is at work."""

from pathlib import Path
from typing import Any

import pytest
from jobs_to_do import JobsToDo
from trainings import bench_of, jobs_of

from adq.search.executors import local
from adq.search.executors.local import LocalExecutor
from adq.search.jobs import Job


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "POLL_S", 0.0)


def test_all_jobs_run_in_order_and_leave_no_checkpoint(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    source, heard = JobsToDo(jobs_of(bench, 3, epochs=1)), []

    LocalExecutor().run(source, bench, heard.append)

    assert [record.id for record in heard] == ["0000", "0001", "0002"]
    assert all(record.validation is not None for record in heard)
    assert heard == list(source.records.values())
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_it_waits_while_nothing_is_due_but_another_process_is_at_work(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)

    class Elsewhere(JobsToDo):
        asks = 0

        def ask(self) -> Job | None:
            self.asks += 1
            return super().ask() if self.asks > 5 else None

    source, heard = Elsewhere(jobs_of(bench, 1, epochs=0)), []

    LocalExecutor().run(source, bench, heard.append)

    assert [record.id for record in heard] == ["0000"]
    assert source.asks == 7  # and once more, to learn that all is done


def test_what_the_source_raises_ends_the_run(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)

    class Broken(JobsToDo):
        def tell(self, job: Job, record: Any) -> Any:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        LocalExecutor().run(Broken(jobs_of(bench, 1, epochs=0)), bench, lambda _: None)
