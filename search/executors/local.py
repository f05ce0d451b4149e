"""Trainings in this process, one after the other."""

import time
from collections.abc import Callable

from adq.search.candidate import Record
from adq.search.jobs import Bench, Source, hand_in, run_job

POLL_S = 0.2


class LocalExecutor:
    """Needs nothing that the process does not have."""

    workers = 1

    def run(self, source: Source, bench: Bench, heard: Callable[[Record], None]) -> None:
        """Run all jobs of a source until it is done; `heard` gets each record.

        Where nothing is due now but another process is at work, its results are waited for.
        """
        while True:
            job = source.ask()
            if job is not None:
                heard(hand_in(source, bench, job, run_job(bench, job)))
            elif source.done:
                return
            else:
                time.sleep(POLL_S)
