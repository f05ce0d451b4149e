"""What a storage says when it fails: in one line, and whether it may be back in a while."""

import errno
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy.exc
from optuna.exceptions import OptunaError, StorageInternalError, UpdateFinishedTrialError

from adq.quant.errors import InputError
from adq.search.patience import reason
from adq.search.storage_url import shown

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


def passing(error: Exception) -> bool:
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


def passing_at_first(error: Exception) -> bool:
    """The same while a storage is being opened, when another process may do so too."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(error, FileNotFoundError):
        return False
    return passing(error) or (
        isinstance(cause, sqlalchemy.exc.DBAPIError)
        and _OPENED_TWICE.search(reason(cause)) is not None
    )
