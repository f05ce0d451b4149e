import json
import os
from pathlib import Path

import pytest

from adq.quant.errors import InputError
from adq.quant.files import atomic_path, read_json, write_json, write_text


def test_the_file_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == tmp_path  # a rename across file systems would not be atomic
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_reader_of_the_old_file_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old, and longer")
    with open(path) as reader:
        write_text(path, "new")
        assert reader.read() == "old, and longer"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [KeyError("stop"), KeyboardInterrupt()])
def test_the_old_file_stays_when_the_block_raises(tmp_path: Path, error: BaseException) -> None:
    def write_half(path: Path) -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)):
        write_half(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_block_that_writes_nothing_is_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(InputError, match=r"cannot write .*a\.txt: No such file"), atomic_path(path):
        pass
    assert path.read_text() == "old"


def test_a_full_disk_is_an_input_error_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*a\.txt: No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("parent", ["a-file", "missing"])
def test_a_folder_that_is_none_is_an_input_error(tmp_path: Path, parent: str) -> None:
    (tmp_path / "a-file").write_text("")
    path = tmp_path / parent / "a.txt"
    with pytest.raises(InputError, match=r"cannot write .*a\.txt: (Not a directory|No such file)"):
        write_text(path, "new")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, make) -> None:
    path = tmp_path / "pipe"
    make(path)
    with (
        pytest.raises(InputError, match=r"cannot write .*pipe: it is no regular file"),
        atomic_path(path) as temporary,
    ):
        temporary.write_text("x")
    assert not path.is_file()
    assert os.listdir(tmp_path) == ["pipe"]


def test_text_and_json_come_back(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "σ × 2\n")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "σ × 2\n"
    data = {"a": [1, 2.5, None], "ü": "x"}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    assert json.loads((tmp_path / "a.json").read_text()) == data


def test_nan_is_not_json_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    assert read_json(path) == 1


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff\xfe"])
def test_a_missing_or_damaged_json_file_is_an_input_error(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json is missing or damaged") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
