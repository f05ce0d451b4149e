"""Ask, evaluate, tell, resume: the one place that touches the Optuna storage."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import sqlalchemy.exc
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import make_url

from adq.quant.errors import InputError
from adq.quant.spec import BitVector
from adq.search.candidate import Record
from adq.search.folder import TRIALS, StudyFolder
from adq.search.problem import Problem
from adq.search.sampler import BudgetSampler

FINISHED = (TrialState.COMPLETE, TrialState.FAIL)
EXHAUSTED = "exhausted"


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what a database says of a missing, damaged or locked store into one line."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, OptunaError, ImportError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise InputError(
            f"storage {url} cannot be used: {text[:200]}; restore it, or give another --storage"
        ) from error


def create_storage_study(folder: StudyFolder, problem: Problem, name: str) -> None:
    """Create the Optuna study of a new folder; InputError if the storage has one of that name."""
    url = folder.storage_url
    with storage_errors(url):
        storage = RDBStorage(url)
        try:
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=[StudyDirection.MAXIMIZE]
                + [StudyDirection.MINIMIZE] * len(problem.objectives),
            )
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(study_name=name, storage=storage)
            if study.trials:
                raise InputError(
                    f"storage {url} has a study {name!r} already: choose another name with --study"
                ) from None
            # a process died between creating it and creating its folder: nothing is in it
            optuna.delete_study(study_name=name, storage=storage)
            storage.engine.dispose()
            create_storage_study(folder, problem, name)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names([problem.task.metric_name, *problem.objectives])
        storage.engine.dispose()
        _require_file(url)


def _load_study(folder: StudyFolder, sampler: BudgetSampler) -> optuna.Study:
    url, name = folder.storage_url, folder.config.study
    _require_file(url)
    try:
        storage = RDBStorage(url)
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    except RuntimeError as error:  # written by another version of Optuna
        raise InputError(f"storage {url} cannot be used: {' '.join(str(error).split())}") from None
    except KeyError:
        raise InputError(
            f"storage {url} has no study {name!r}: restore it, or give another --storage"
        ) from None


def _require_file(url: str) -> None:
    """Raise InputError where SQLite would make an empty database, or keep one in memory only."""
    parsed = make_url(url)
    path = parsed.database or ":memory:"
    if (
        parsed.get_backend_name() == "sqlite"
        and not path.startswith("file:")
        and not Path(path).is_file()
    ):
        raise InputError(
            f"storage {url} cannot be used: there is no file {path}; restore it, or give another "
            "--storage"
        )


def run_trials(
    folder: StudyFolder,
    problem: Problem,
    sampler: BudgetSampler,
    evaluate: Callable[[str, BitVector], Record],
    on_record: Callable[[Record], None],
) -> bool:
    """Bring the study to its number of trials; records go to the folder, results to the storage.

    A record is written before its trial is told, and a trial that a killed process left running
    is taken up again under its own number: told from its record if there is one, evaluated
    otherwise. So nothing finished is lost or repeated, whenever the process dies. Trials that
    failed count as finished.

    True when all trials ran, False when the space has no new point left.
    """
    with storage_errors(folder.storage_url):
        study = _load_study(folder, sampler)
        limits = problem.costs.limits(problem.limits)
        distributions = problem.space.distributions()
        while True:
            trials = study.get_trials(deepcopy=False)
            finished = [t for t in trials if t.state in FINISHED]
            running = [t for t in trials if t.state == TrialState.RUNNING]
            for done in finished:
                path = folder.record_path(TRIALS, f"{done.number:04d}")
                if done.state == TrialState.COMPLETE and not path.exists():
                    raise InputError(f"{path} is missing: restore it, or start a new study")
            if running:
                trial = optuna.trial.Trial(study, running[0]._trial_id)
            elif EXHAUSTED in study.user_attrs:
                return False
            elif len(finished) < problem.config.trials:
                trial = study.ask()
            else:
                return True
            for name, distribution in distributions.items():
                trial.suggest_categorical(name, distribution.choices)
            if any(t.params == trial.params for t in finished):
                study.set_user_attr(EXHAUSTED, True)  # else each resumption would ask once more
                study.tell(trial, state=TrialState.FAIL)
                return False
            bits = problem.space.bit_vector(problem.space.decode(trial.params))
            id = f"{trial.number:04d}"
            record = folder.read_record(TRIALS, id)
            if record is None or record.bits != bits:
                record = evaluate(id, bits)
                folder.write_record(TRIALS, record)
            totals, told = problem.costs.totals(bits), trial.constraints
            for name, limit in limits.items():  # whole numbers: on the budget is within it
                if name not in told:
                    trial.set_constraint(name, totals[name] - limit)
            if record.validation is None:
                study.tell(trial, state=TrialState.FAIL)
            else:
                costs = [float(getattr(record.costs, name)) for name in problem.objectives]
                study.tell(trial, [record.validation.metric, *costs])
            on_record(record)
