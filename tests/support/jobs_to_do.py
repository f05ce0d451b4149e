"""A source of jobs that is no study: a list, and what came of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from adq.search.candidate import Record
from adq.search.jobs import Job


@dataclass
class JobsToDo:
    """`first` that many jobs are due at once, and one more with each that is told."""

    jobs: Sequence[Job]
    first: int = 10**6
    records: dict[str, Record] = field(default_factory=dict)
    asked: int = 0

    def ask(self) -> Job | None:
        if self.asked == min(len(self.jobs), self.first + len(self.records)):
            return None
        self.asked += 1
        return self.jobs[self.asked - 1]

    def tell(self, job: Job, record: Record) -> Record:
        assert job in self.jobs
        assert job.name not in self.records
        self.records[job.name] = record
        return record

    @property
    def done(self) -> bool:
        return len(self.records) == len(self.jobs)
