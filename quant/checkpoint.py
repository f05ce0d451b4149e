"""The state of a training in a file that is whole or not there."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adq.quant.errors import CheckpointError, InputError
from adq.quant.files import atomic_path
from adq.quant.parallel import ALONE, Group


def write_state(path: Path, state: dict[str, Any], group: Group = ALONE) -> None:
    """Tensors, numbers and containers of them; rank 0 writes, all wait for it.

    Raises InputError, on all ranks, where the file cannot be written.
    """

    def write() -> None:
        with atomic_path(path) as temporary:
            buffer = io.BytesIO()  # what the disk refuses torch.save calls a RuntimeError
            torch.save(state, buffer)
            temporary.write_bytes(buffer.getbuffer())

    group.first(write)


def read_state(path: Path, device: torch.device, group: Group = ALONE) -> Any:
    """What `write_state` wrote, its tensors on `device`; None where there is no file.

    Rank 0 reads and the others get its bytes, so that the folder need not be shared.

    Raises CheckpointError for a damaged file, InputError for one that cannot be read.
    """
    content = group.first(lambda: _content(path))
    if content is None:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch looks at no checksums
            if (broken := archive.testzip()) is not None:
                raise ValueError(f"{broken} does not match its checksum")
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # noqa: BLE001 (torch.load fails in many ways on a damaged file)
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {path} is damaged ({text})") from None


def epochs_before(state: Any) -> list[dict[str, Any]]:
    """The epochs of the trainings before the one whose state it is, as dictionaries."""
    found = state.get("earlier") if isinstance(state, Mapping) else None
    return found if isinstance(found, list) else []


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read checkpoint {path}: {error.strerror or error}") from None
