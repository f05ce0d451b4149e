"""The large files of a study by name: checkpoints, weights that others start from, packed models.

They lie in a folder, or behind a URL: s3://BUCKET/PATH, gs://BUCKET/PATH and the others that
pyarrow knows without a further package, else any that fsspec has one for. Keys and regions come
from where the providers' own tools look for them; an S3 server of one's own is
s3://BUCKET/PATH?scheme=http&endpoint_override=HOST:PORT.
"""

import posixpath
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adq.quant.errors import InputError
from adq.quant.files import atomic_path
from adq.search.patience import Patience, reason

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

PATIENCE_S = 120.0
ARROW_SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
DELAYED = "allow_delayed_open"
OBJECT_STORES = ("s3", "gcs", "abfs")  # pyarrow's names; they have no folders to be made
_LASTING = re.compile(
    r"access.?denied|forbidden|no.?such.?bucket|invalid.?access.?key|signature|unauthori[sz]ed"
    r"|credentials|not.?found|permission denied|read-only",
    re.IGNORECASE,
)


class Files(Protocol):
    """Files by relative name, such as checkpoints/0003-0.ckpt. Travels to other processes."""

    def read(self, name: str) -> bytes | None:
        """The content, None where there is no such file; InputError where it can't be told."""

    def write(self, name: str, content: bytes) -> None:
        """Whole or not at all; folders are made as needed; InputError where it can't be done."""

    def remove(self, name: str) -> None:
        """Nothing happens where there is none."""


class FolderFiles:
    """Files in a folder, written beside their place and renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> bytes | None:
        path = self._path(name)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error

    def write(self, name: str, content: bytes) -> None:
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    def remove(self, name: str) -> None:
        path = self._path(name)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise InputError(f"cannot remove {path}: {error.strerror or error}") from error

    def _path(self, name: str) -> Path:
        return self.folder / _checked(name)


class UrlFiles:
    """Files behind a URL, by pyarrow's file systems; passing errors are waited out.

    A file is written under another name and moved, so that one cut short is never taken for whole.
    """

    def __init__(
        self, url: str, say: Callable[[str], None] | None = None, patience_s: float = PATIENCE_S
    ) -> None:
        self.url, self.say, self.patience_s = url, say, patience_s
        self._opened: tuple[FileSystem, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "say": None, "_opened": None}

    def read(self, name: str) -> bytes | None:
        def read() -> bytes | None:
            system, root = self._system()
            try:
                with system.open_input_stream(posixpath.join(root, name)) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return self._do("read", name, read)

    def write(self, name: str, content: bytes) -> None:
        def write() -> None:
            system, root = self._system()
            path = posixpath.join(root, name)
            folder, base = posixpath.split(path)
            temporary = posixpath.join(folder, f".{base}.{uuid.uuid4().hex}.tmp")
            if system.type_name not in OBJECT_STORES:
                system.create_dir(folder, recursive=True)
            try:
                with system.open_output_stream(temporary) as stream:
                    stream.write(content)
                system.move(temporary, path)
            except BaseException:
                with suppress(Exception):
                    system.delete_file(temporary)
                raise

        self._do("write", name, write)

    def remove(self, name: str) -> None:
        def remove() -> None:
            from pyarrow.fs import FileType

            system, root = self._system()
            path = posixpath.join(root, name)
            with suppress(FileNotFoundError):
                if system.get_file_info(path).type != FileType.NotFound:
                    system.delete_file(path)

        self._do("remove", name, remove)

    def _do(self, what: str, name: str, call: Callable[[], Any]) -> Any:
        _checked(name)
        place = f"{_shown(self.url)}/{name}"
        try:
            return Patience(_shown(self.url), _passing, self.say or _quiet, self.patience_s)(call)
        except InputError:
            raise
        except Exception as error:  # what fsspec's packages raise is theirs to choose
            raise InputError(f"cannot {what} {place}: {reason(error)}") from error

    def _system(self) -> "tuple[FileSystem, str]":
        """pyarrow's file system, and the path in it; S3 is asked for the bucket's region here."""
        if self._opened is None:
            self._opened = _maker(self.url)()
        return self._opened


def open_files(where: str, say: Callable[[str], None] | None = None) -> Files:
    """The files of a folder, or of a URL; InputError where there is no way to such a URL.

    `say` hears, in this process alone, when a URL does not answer and is waited for.
    """
    if "://" not in where:
        return FolderFiles(Path(where).absolute())
    _maker(where)
    return UrlFiles(where, say)


def _maker(url: str) -> "Callable[[], tuple[FileSystem, str]]":
    """How to open the URL; nothing is asked over the network yet."""
    scheme = url.partition("://")[0].lower()
    try:
        from pyarrow import fs

        if scheme in ARROW_SCHEMES:
            if scheme == "s3" and DELAYED not in url:  # small files in one request, not in three
                url += ("&" if "?" in url else "?") + DELAYED + "=true"
            return partial(fs.FileSystem.from_uri, url)
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise InputError(
            f"{_shown(url)} cannot be used: {reason(error)} (pip install it on every machine)"
        ) from None
    except ValueError:
        raise InputError(
            f"expected a folder or a URL such as s3://BUCKET/PATH, got {_shown(url)!r}"
        ) from None

    def open_() -> tuple[fs.FileSystem, str]:
        system, path = fsspec.url_to_fs(url)
        return fs.PyFileSystem(fs.FSSpecHandler(system)), path

    return open_


def _checked(name: str) -> str:
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"expected a relative file name without '..', got {name!r}")
    return name


def _shown(url: str) -> str:
    """The URL without keys, and without a slash or options at its end, for messages."""
    return re.sub(r"://[^/@]*@", "://***@", url).partition("?")[0].rstrip("/")


def _passing(error: Exception) -> bool:
    if isinstance(error, InputError | ValueError | TypeError | ImportError | NotImplementedError):
        return False
    lasting = FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError
    return not isinstance(error, lasting) and _LASTING.search(reason(error)) is None


def _quiet(text: str) -> None:
    pass
