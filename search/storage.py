"""The one place that opens an Optuna storage: an SQL database, or a journal file.

URLs are those that SQLAlchemy knows (sqlite:///FILE, postgresql://USER@HOST/DATABASE, ...), and
journal:FILE for Optuna's journal, which asks of a shared folder no more than file locks.
"""

import copy
import errno
import json
import re
import sqlite3
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy.exc
from optuna.distributions import distribution_to_json
from optuna.exceptions import (
    DuplicatedStudyError,
    ExperimentalWarning,
    OptunaError,
    StorageInternalError,
    UpdateFinishedTrialError,
)
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL, insert, make_url
from sqlalchemy.orm import Session

from adq.quant.errors import InputError
from adq.search.journal import JOB, Journal
from adq.search.patience import Patience, reason

T = TypeVar("T")

_PASSWORDS = ("password", "passwd", "sslpassword")
"""Of a URL's query: those of libpq and of MySQL's drivers."""

JOURNAL = "journal:"
OPEN_PATIENCE_S, PATIENCE_S = 30.0, 300.0
SQLITE_WAIT_S = 20.0

# What no waiting mends, in the words of PostgreSQL, MySQL and SQLite, whose drivers call all of it
# an operational error.
_LASTING = re.compile(
    r"authentication failed|access denied|no password|does not exist|unknown database|no pg_hba"
    r"|permission denied|no such table|no such column|read-?only|unable to open|already exists"
    r"|not a database|malformed|name or service not known|no address associated|certificate",
    re.IGNORECASE,
)
_LASTING_ERRNO = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
}
# Two processes made the tables at the same moment; only while opening.
_OPENED_TWICE = re.compile(r"already exists|duplicate key|unique constraint|duplicate entry", re.I)


class FinishedOtherwiseError(InputError):
    """A trial had been finished already, with another state or other values."""


def shown(url: str) -> str:
    """The URL without its passwords, for messages."""
    if url.startswith(JOURNAL):
        return url
    with suppress(sqlalchemy.exc.ArgumentError, ValueError):
        url = make_url(url).render_as_string()
    return re.sub(rf"([?&](?:{'|'.join(_PASSWORDS)})=)[^&]*", r"\1***", url)


def file_of(url: str) -> Path | None:
    """The file that a storage of this URL is, None where it is none; InputError for a journal
    that names none."""
    if url.startswith(JOURNAL):
        return Path(_journal(url)).absolute()
    try:
        parsed = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return None
    path = parsed.database or ":memory:"
    local = parsed.get_backend_name() == "sqlite" and not path.startswith(("file:", ":memory:"))
    return Path(path).absolute() if local else None


def _journal(url: str) -> str:
    path = url.removeprefix(JOURNAL)
    if not path:
        raise InputError(f"storage: expected a file as journal:FILE, got {url!r}")
    return path


def has_password(url: str) -> bool:
    try:
        parsed = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return False
    return parsed.password is not None or any(name in parsed.query for name in _PASSWORDS)


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what a database says of a missing, damaged or locked store into one line.

    That a trial was finished before is no fault of the storage: UpdateFinishedTrialError passes.
    """
    try:
        yield
    except UpdateFinishedTrialError:
        raise
    except ImportError as error:
        what = " ".join(str(error.__cause__ or error).split())
        hint = 'pip install "adq-search[postgresql]"' if "postgres" in url else "install its driver"
        raise InputError(
            f"storage {shown(url)} cannot be used: {what}; {hint}, or give another --storage"
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, OptunaError, UnicodeDecodeError, OSError) as error:
        raise InputError(
            f"storage {shown(url)} cannot be used: {reason(error)}; restore it, or give another "
            "--storage"
        ) from error


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
        Patience(f"storage {shown(url)}", _passing_at_first, say, patience_s)(create)
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
            what, _passing_at_first, say, min(patience_s, OPEN_PATIENCE_S), clock, sleep
        )
        self._patience = Patience(what, _passing, say, patience_s, clock, sleep)

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
        if isinstance(database, _Database):  # it knows the number, which Optuna's cache would read
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
        path = _journal(url)
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
    parsed = make_url(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    # Optuna formats the URL with its schema version
    text = parsed.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    try:
        return get_storage(_Database(text, _engine_settings(parsed)))
    except RuntimeError as error:  # written by another version of Optuna
        raise InputError(f"storage {shown(url)} cannot be used: {reason(error)}") from None


def _engine_settings(url: URL) -> dict[str, Any]:
    """What SQLAlchemy's engine is told so that a dead server is noticed within a minute."""
    backend = url.get_backend_name()
    connect: dict[str, Any] = {}
    if backend == "sqlite":
        connect = {"timeout": SQLITE_WAIT_S}
    elif backend == "postgresql":
        connect = {
            "application_name": "adq-search",
            "connect_timeout": 10,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 60_000,  # ms
        }
    elif backend in ("mysql", "mariadb"):
        connect = {"connect_timeout": 10}
    connect = {key: value for key, value in connect.items() if key not in url.query}
    if backend == "sqlite":
        return {"connect_args": connect}
    return {"connect_args": connect, "pool_pre_ping": True, "pool_size": 2, "max_overflow": 8}


class _Database(RDBStorage):
    """Optuna's storage, which makes a trial of one `job` once, with few statements.

    Optuna repeats the creation of a trial whenever the database failed: also where the answer to
    the commit was lost, and not the commit. And it looks up each parameter of each new trial among
    those of all before, most of the driver's time for a network of 20 layers; here it does so once
    for each set of distributions, and then parameters and attributes are written together.
    """

    def __init__(self, url: str, engine_kwargs: dict[str, Any]) -> None:
        self._unsure: set[str] = set()  # jobs whose trial may have been made
        self._checked: tuple[int, dict[str, Any]] | None = None  # study and distributions
        try:
            super().__init__(url, engine_kwargs)
        except BaseException:
            if hasattr(self, "scoped_session"):
                self.remove_session()
            if hasattr(self, "engine"):
                self.engine.dispose()
            raise

    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        made = super()._create_new_trial(study_id, template_trial)
        self._unsure.discard(made.user_attrs.get(JOB, ""))
        return made

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Session
    ) -> Any:
        job = None if template_trial is None else template_trial.user_attrs.get(JOB)
        if job is not None and job in self._unsure:
            from optuna.storages._rdb import models  # sets up SQLAlchemy's mapping

            found = (
                session.query(models.TrialModel)
                .join(models.TrialUserAttributeModel)
                .filter(
                    models.TrialModel.study_id == study_id,
                    models.TrialUserAttributeModel.key == JOB,
                    models.TrialUserAttributeModel.value_json == json.dumps(job),
                )
                .one_or_none()
            )
            if found is not None:
                return found
        if job is not None:
            self._unsure.add(job)
        if template_trial is None or self._checked != (study_id, template_trial.distributions):
            made = super()._get_prepared_new_trial(study_id, template_trial, session)
            if template_trial is not None:
                self._checked = study_id, {**template_trial.distributions}
            return made
        bare = copy.copy(template_trial)
        bare.params, bare.distributions, bare.user_attrs, bare.system_attrs = {}, {}, {}, {}
        made = super()._get_prepared_new_trial(study_id, bare, session)
        _write_together(session, int(made.trial_id), template_trial)
        return made


def _write_together(session: Session, trial_id: int, template: FrozenTrial) -> None:
    """Parameters and attributes of a new trial, a statement for each of the tables."""
    from optuna.storages._rdb import models

    kinds = {name: template.distributions[name] for name in template.params}
    rows: dict[Any, list[dict[str, Any]]] = {
        models.TrialParamModel: [
            {
                "param_name": name,
                "param_value": kinds[name].to_internal_repr(value),
                "distribution_json": distribution_to_json(kinds[name]),
            }
            for name, value in template.params.items()
        ],
        models.TrialUserAttributeModel: _attributes(template.user_attrs),
        models.TrialSystemAttributeModel: _attributes(template.system_attrs),
    }
    for model, values in rows.items():
        if values:
            session.execute(insert(model), [{"trial_id": trial_id, **row} for row in values])


def _attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value_json": json.dumps(value)} for key, value in values.items()]


def _passing(error: Exception) -> bool:
    """Whether a storage that says this may be back in a while."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, OSError):
        return cause.errno not in _LASTING_ERRNO
    if isinstance(cause, sqlalchemy.exc.TimeoutError | sqlalchemy.exc.PendingRollbackError):
        return True
    if not isinstance(cause, sqlalchemy.exc.DBAPIError):
        return False
    text = reason(cause)
    if isinstance(cause.orig, sqlite3.Error):
        return re.search(r"locked|busy|disk i/o error|full", text) is not None
    return cause.connection_invalidated or (
        isinstance(cause, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError)
        and _LASTING.search(text) is None
    )


def _passing_at_first(error: Exception) -> bool:
    """The same while a storage is being opened, when another process may do so too."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(error, FileNotFoundError):
        return False
    return _passing(error) or (
        isinstance(cause, sqlalchemy.exc.DBAPIError)
        and _OPENED_TWICE.search(reason(cause)) is not None
    )
