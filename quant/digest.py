"""A hash of nested values with tensors in them: the key under which results are kept."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor


def content_hash(value: Any) -> str:
    """Sixteen hexadecimal digits that follow from the content: of tensors and arrays (type, shape,
    bytes), of lists, tuples and dictionaries (in their order) of such values, and of whatever else
    has a repr that tells it apart."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous()
            digest.update(f"{array.dtype} {tuple(array.shape)}\n".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray):
            digest.update(f"{value.dtype} {value.shape}\n".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, tuple | list):
            digest.update(f"{len(value)} of\n".encode())
            for part in value:
                add(part)
        elif isinstance(value, dict):
            add(list(value.items()))
        else:
            digest.update(f"{value!r}\n".encode())

    add(value)
    return digest.hexdigest()[:16]
