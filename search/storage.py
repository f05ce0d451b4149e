"""The one place that opens an Optuna storage: an SQL database, or a journal file.

URLs are those that SQLAlchemy knows (sqlite:///FILE, postgresql://USER@HOST/DATABASE, ...), and
journal:FILE for Optuna's journal, which asks of a shared folder no more than file locks.
"""

import copy
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy.exc
from optuna.exceptions import (
    DuplicatedStudyError,
    ExperimentalWarning,
    OptunaError,
    UpdateFinishedTrialError,
)
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url

from adq.quant.errors import InputError
from adq.search.database import Database, open_database
from adq.search.journal import JOB, Journal
from adq.search.patience import Patience, reason
from adq.search.storage_errors import passing, passing_at_first, storage_errors
from adq.search.storage_url import JOURNAL, file_of, journal_path, shown

T = TypeVar("T")

OPEN_PATIENCE_S, PATIENCE_S = 30.0, 300.0


class FinishedOtherwiseError(InputError):
    """A trial had been finished already, with another state or other values."""


def open_storage(url: str) -> BaseStorage:
    """The storage behind the URL, its finished trials read once only; tables are made if needed.

    Raises InputError for a file that is not there, a storage of another version of Optuna, and one
    that cannot be reached.
    """
    _require_file(url)
    return _opened(url)


def close_storage(storage: BaseStorage) -> None:
    """Give the connections back; the storage may be used on."""
    database = getattr(storage, "_backend", None)  # of Optuna's cache
    if isinstance(database, RDBStorage):
        database.remove_session()
        database.engine.dispose()


def create_study_in(
    url: str,
    name: str,
    metric_names: Sequence[str],
    directions: Sequence[StudyDirection],
    say: Callable[[str], None] = lambda text: None,
    patience_s: float = OPEN_PATIENCE_S,
) -> None:
    """Create an Optuna study; InputError if the storage has one of that name.

    One with neither trials nor user attributes is no such study: a process died between creating
    it and creating its folder, or is between them now. It is taken over, or makes way where it has
    other directions.
    """
    path = file_of(url)
    if path is not None and not path.parent.is_dir():
        raise InputError(
            f"storage {shown(url)} cannot be used: there is no folder {path.parent}; make it, or "
            "give another --storage"
        )

    def create() -> None:
        storage = _opened(url)
        try:
            while (study := _created(storage, url, name, directions)) is None:
                pass
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                study.set_metric_names([*metric_names])
        finally:
            close_storage(storage)

    with storage_errors(url):
        Patience(f"storage {shown(url)}", passing_at_first, say, patience_s)(create)
    _require_file(url)


def _created(
    storage: BaseStorage, url: str, name: str, directions: Sequence[StudyDirection]
) -> optuna.Study | None:
    """None where another process was at the same name in between: try again."""
    with suppress(DuplicatedStudyError):
        return optuna.create_study(storage=storage, study_name=name, directions=[*directions])
    with suppress(KeyError):  # gone again
        study = optuna.load_study(study_name=name, storage=storage)
        if study.trials or study.user_attrs:
            raise InputError(
                f"storage {shown(url)} has a study {name!r} already: choose another name with "
                "--study"
            )
        if study.directions == [*directions]:
            return study
        optuna.delete_study(study_name=name, storage=storage)
    return None


def study_id_of(storage: BaseStorage, url: str, name: str) -> int:
    """The id of a study; InputError if the storage has none of that name."""
    try:
        return storage.get_study_id_from_name(name)
    except KeyError:
        raise InputError(
            f"storage {shown(url)} has no study {name!r}: restore it, or give another --storage"
        ) from None


class StudyStorage:
    """One study in its storage, by calls that outlast a storage that is gone for a while.

    A call is repeated for `patience_s` seconds, and what it does is done once however often it is
    repeated. Lasting errors, and the end of the patience, are InputErrors of one line.
    """

    def __init__(
        self,
        url: str,
        name: str,
        say: Callable[[str], None] = lambda text: None,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url, self.name = url, name
        what = f"storage {shown(url)}"
        opening = Patience(
            what, passing_at_first, say, min(patience_s, OPEN_PATIENCE_S), clock, sleep
        )
        self._patience = Patience(what, passing, say, patience_s, clock, sleep)

        def open_() -> tuple[BaseStorage, int]:
            storage = open_storage(url)
            try:
                return storage, study_id_of(storage, url, name)
            except BaseException:
                close_storage(storage)
                raise

        with storage_errors(url):
            self._storage, self._study_id = opening(open_)

    def trials(self) -> list[FrozenTrial]:
        """All trials by number, not to be changed; finished ones are read once."""
        return self._call(lambda: self._storage.get_all_trials(self._study_id, deepcopy=False))

    def trial(self, storage_id: int) -> FrozenTrial:
        return self._call(lambda: self._storage.get_trial(storage_id))

    def create(self, template: FrozenTrial) -> tuple[int, int]:
        """The number and the storage id of a new trial, made in one transaction.

        It gets the user attribute `job`, a random name, unless the template has one.
        """
        named = copy.copy(template)
        named.user_attrs = {JOB: uuid.uuid4().hex, **template.user_attrs}
        database = getattr(self._storage, "_backend", None)
        if isinstance(database, Database):  # it knows the number, which Optuna's cache would read
            made = self._call(lambda: database._create_new_trial(self._study_id, named))
            return made.number, made._trial_id
        storage_id = self._call(lambda: self._storage.create_new_trial(self._study_id, named))
        number = self._call(lambda: self._storage.get_trial_number_from_id(storage_id))
        return number, storage_id

    def set_attr(self, storage_id: int, key: str, value: Any) -> None:
        """Set a user attribute of a trial; of a finished one, FinishedOtherwiseError unless it
        has that value."""
        try:
            self._call(lambda: self._storage.set_trial_user_attr(storage_id, key, value))
        except UpdateFinishedTrialError:
            found = self.trial(storage_id)
            if key not in found.user_attrs or found.user_attrs[key] != value:
                raise self._otherwise(found) from None

    def finish(
        self, storage_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> None:
        """End a trial with a state and its values; once more with the same ones is no change.

        Raises FinishedOtherwiseError where it has ended with others.
        """
        values = None if values is None else [*map(float, values)]
        try:
            if self._call(lambda: self._storage.set_trial_state_values(storage_id, state, values)):
                return
        except UpdateFinishedTrialError:
            pass
        found = self.trial(storage_id)
        if found.state != state or (values is not None and found.values != values):
            raise self._otherwise(found)

    def study_attr(self, key: str) -> Any:
        """A user attribute of the study, None where there is none."""
        return self._call(lambda: self._storage.get_study_user_attrs(self._study_id)).get(key)

    def set_study_attr(self, key: str, value: Any) -> None:
        self._call(lambda: self._storage.set_study_user_attr(self._study_id, key, value))

    def delete_study(self) -> None:
        """Remove the study and its trials; nothing happens where they are gone."""

        def delete() -> None:
            try:
                self._storage.get_study_name_from_id(self._study_id)
                self._storage.delete_study(self._study_id)
            except KeyError:
                return

        self._call(delete)

    def close(self) -> None:
        close_storage(self._storage)

    def _call(self, operation: Callable[[], T]) -> T:
        def once() -> T:
            try:
                return operation()
            except (sqlalchemy.exc.SQLAlchemyError, OptunaError):
                # the next attempt starts with a clean session
                if isinstance(database := getattr(self._storage, "_backend", None), RDBStorage):
                    database.remove_session()
                raise

        try:
            with storage_errors(self.url):
                return self._patience(once)
        except KeyError:
            raise InputError(
                f"storage {shown(self.url)} has no study {self.name!r} any more, or not that "
                "trial: restore it, or give another --storage"
            ) from None

    def _otherwise(self, found: FrozenTrial) -> FinishedOtherwiseError:
        return FinishedOtherwiseError(
            f"storage {shown(self.url)}: trial {found.number} of study {self.name!r} was finished "
            f"already as {found.state.name.lower()} with values {found.values}: is another "
            "process at work on this study from a copy of its folder?"
        )


def _require_file(url: str) -> None:
    """Raise InputError where SQLite would make an empty database, or keep one in memory only, and
    where Optuna would make an empty journal."""
    if url.startswith(JOURNAL):
        path = journal_path(url)
    else:
        with storage_errors(url):
            parsed = make_url(url)
        path = parsed.database or ":memory:"
        if parsed.get_backend_name() != "sqlite" or path.startswith("file:"):
            return
    if not Path(path).is_file():
        raise InputError(
            f"storage {url} cannot be used: there is no file {path}; restore it, or give another "
            "--storage"
        )


def _opened(url: str) -> BaseStorage:
    if url.startswith(JOURNAL):
        path = str(Path(url.removeprefix(JOURNAL)).absolute())
        try:
            return Journal(path)
        except (AttributeError, AssertionError, KeyError, TypeError) as error:
            raise InputError(
                f"storage {url} cannot be used: it is no journal of Optuna ({reason(error)}); "
                "restore it, or give another --storage"
            ) from None
    return open_database(url)
