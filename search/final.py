"""Final training, from FP32, of the models that a study reports."""

from collections.abc import Mapping
from dataclasses import replace

from adq.quant.errors import InputError
from adq.quant.export.loading import read_metadata
from adq.quant.spec import BitVector
from adq.search.candidate import Record
from adq.search.crew import Crew
from adq.search.folder import FINAL, Clock, StudyFolder
from adq.search.jobs import Job


class FinalTraining:
    """The final models as a `Source` of jobs, shared among processes like a `StudyLoop`.

    `models` are names and their bits; two of equal bits are trained once. A model whose packed
    file is missing or damaged is trained again, and so is one that failed in another process.
    """

    def __init__(
        self,
        folder: StudyFolder,
        models: Mapping[str, BitVector],
        epochs: int,
        clock: Clock,
        crew: Crew,
    ) -> None:
        self.folder, self.models, self.epochs = folder, dict(models), epochs
        self.clock, self.crew = clock, crew
        self.done = False
        self._records: dict[str, Record] = {}

    def ask(self) -> Job | None:
        with self.crew.exclusive():
            left = [id for id in self._distinct() if self.record(id) is None]
            self.done = not left
            for id in left:
                job = Job(id, self.models[id], self.epochs, final=True)
                if self.crew.is_free(job.name):
                    self.crew.take(job.name)
                    return job
        return None

    def tell(self, job: Job, record: Record) -> Record:
        with self.crew.exclusive():
            self.folder.write_record(FINAL, record)
            self.clock.save()
            self.crew.drop(job.name)
            self._records[job.id] = record
        return record

    def record(self, id: str) -> Record | None:
        """What came of a model; None where it is still to be trained."""
        twin = next(name for name, bits in self.models.items() if bits == self.models[id])
        if twin not in self._records:
            record = self.folder.read_record(FINAL, twin)
            if record is None or record.error is not None or record.bits != self.models[twin]:
                return None
            if not self._whole(record):
                return None
            self._records[twin] = record
        return replace(self._records[twin], id=id)

    def _distinct(self) -> list[str]:
        names = list(self.models)
        return [id for i, id in enumerate(names) if self.models[id] not in
                [self.models[before] for before in names[:i]]]  # fmt: skip

    def _whole(self, record: Record) -> bool:
        if record.weights is None:
            return True
        try:
            read_metadata(self.folder.path / record.weights)
        except InputError:
            return False
        return True
