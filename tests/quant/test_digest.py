"""What changes a content hash, and what must not."""

import hashlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import torch

from adq.quant.digest import content_hash

TENSOR = torch.arange(6, dtype=torch.float32).reshape(2, 3)
VALUE = {"weights": {"a": TENSOR}, "bits": (2, 4), "name": "x", "ranges": [(("a", 2), (0.1, 3))]}


def test_the_hash_of_a_tensor_is_that_of_its_type_shape_and_bytes() -> None:
    raw = b"torch.float32 (2, 3)\n" + TENSOR.numpy().tobytes()
    assert content_hash(TENSOR) == hashlib.sha256(raw).hexdigest()[:16]


def test_equal_content_has_one_hash() -> None:
    same = {
        "weights": {"a": torch.stack([TENSOR[0], TENSOR[1]])},
        "bits": [2, 4],
        "name": "x",
        "ranges": ((("a", 2), (0.1, 3)),),
    }
    assert content_hash(same) == content_hash(VALUE)
    assert content_hash(TENSOR.T.contiguous().T) == content_hash(TENSOR)  # other strides
    assert content_hash(torch.cat([TENSOR, TENSOR])[2:]) == content_hash(TENSOR)  # a view
    assert content_hash(TENSOR.clone().requires_grad_()) == content_hash(TENSOR)
    assert content_hash(torch.nn.Parameter(TENSOR)) == content_hash(TENSOR)


def almost(value: float) -> torch.Tensor:
    changed = TENSOR.clone()
    changed[1, 2] = value
    return changed


DIFFERENT: list[Any] = [
    TENSOR,
    TENSOR.T,
    TENSOR.flatten(),
    TENSOR.double(),
    TENSOR.int(),
    almost(torch.nextafter(torch.tensor(5.0), torch.tensor(6.0)).item()),
    almost(float("nan")),
    torch.zeros(0),
    torch.zeros(0, 3),
    torch.tensor(1.0),
    torch.tensor([1.0]),
    torch.tensor(1),
    torch.tensor(True),
    torch.tensor([1.0], dtype=torch.bfloat16),
    torch.tensor([1.0 + 0j]),
    1,
    1.0,
    True,
    None,
    "1",
    "",
    b"1",
    [],
    {},
    [[]],
    [1],
    [[1]],
    [1, 2],
    [[1, 2]],
    [[1], 2],
    [1, [2]],
    [12],
    ["1", "2"],
    ["1\n2"],
    ["12", ""],
    [2, 1],
    {"a": 1, "b": 2},
    {"b": 2, "a": 1},
    {"a": {"b": 1}},
    [TENSOR, TENSOR],
    [TENSOR[0], TENSOR[1]],
    [torch.cat([TENSOR, TENSOR])],
]


def test_different_content_has_different_hashes() -> None:
    hashes = [content_hash(value) for value in DIFFERENT]
    # but for an empty dictionary, which is hashed as an empty list
    assert hashes[DIFFERENT.index({})] == hashes[DIFFERENT.index([])]
    assert len(set(hashes)) == len(hashes) - 1


def test_it_is_the_same_in_another_process() -> None:
    program = (
        "import torch; from adq.quant.digest import content_hash; "
        "print(content_hash({'w': torch.arange(6.0).reshape(2, 3), 'b': ('x', 2, None, 0.1)}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert out.strip() == content_hash({"w": TENSOR, "b": ("x", 2, None, 0.1)})


def test_sixteen_hexadecimal_digits() -> None:
    assert len(content_hash(VALUE)) == 16
    assert int(content_hash(VALUE), 16) >= 0


def test_large_arrays_whose_repr_is_cut_short_are_told_apart() -> None:
    one = np.zeros(5000)
    other = one.copy()
    other[2500] = 1
    assert repr(one) == repr(other)
    assert content_hash(one) != content_hash(other)
    assert content_hash(one) == content_hash(np.zeros(10000)[::2])
