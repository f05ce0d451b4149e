"""What the URL of a storage says: its file, and the passwords that no message may show."""

import re
from contextlib import suppress
from pathlib import Path

import sqlalchemy.exc
from sqlalchemy import make_url

from adq.quant.errors import InputError

JOURNAL = "journal:"
_PASSWORDS = ("password", "passwd", "sslpassword")
"""Of a URL's query: those of libpq and of MySQL's drivers."""


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
        return Path(journal_path(url)).absolute()
    try:
        parsed = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return None
    path = parsed.database or ":memory:"
    local = parsed.get_backend_name() == "sqlite" and not path.startswith(("file:", ":memory:"))
    return Path(path).absolute() if local else None


def journal_path(url: str) -> str:
    """The FILE of journal:FILE; InputError where there is none."""
    path = url.removeprefix(JOURNAL)
    if not path:
        raise InputError(f"storage: expected a file as journal:FILE, got {url!r}")
    return path


def has_password(url: str) -> bool:
    """Whether the URL holds a password."""
    try:
        parsed = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return False
    return parsed.password is not None or any(name in parsed.query for name in _PASSWORDS)
