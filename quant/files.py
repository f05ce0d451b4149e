"""Files that are either whole or not there."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from adq.quant.errors import InputError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error.

    Raises InputError when the folder can't be written, the disk is full, or `path` is a folder, a
    device or a pipe.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is no regular file; name another one")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # safetensors makes its files private
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], size_bytes: int = 0
) -> None:
    """A safetensors file; tensors that share memory are stored once for each name.

    A file smaller than `size_bytes` is brought to it by spaces after the header's JSON, which the
    format allows; keep the header a multiple of 8 bytes.
    """
    own = {}
    seen: set[int] = set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        own[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    with atomic_path(path) as temporary:
        try:
            save_file(own, temporary, metadata)
            _pad_header(temporary, size_bytes)
        except SafetensorError as error:  # how safetensors reports what the disk refuses
            raise InputError(f"cannot write {path}: {error}") from None


def _pad_header(path: Path, size_bytes: int) -> None:
    missing = size_bytes - path.stat().st_size
    if missing > 0:
        content = memoryview(path.read_bytes())
        length = int.from_bytes(content[:8], "little")
        widened = (length + missing).to_bytes(8, "little")
        with open(path, "wb") as file:
            file.writelines((widened, content[8 : 8 + length], b" " * missing))
            file.write(content[8 + length :])


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises InputError when the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is missing or damaged ({error})") from None
