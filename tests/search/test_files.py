"""One contract for a folder and for URLs, and what happens when writing is cut short."""

import pickle
import uuid
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow.fs
import pytest

from adq.quant.errors import InputError
from adq.search.files import Files, FolderFiles, UrlFiles, open_files
from adq.search.patience import Patience

KINDS = ["folder", "file", "memory"]


@pytest.fixture(params=KINDS)
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "folder": str(tmp_path / "a b" / "files"),
        "file": f"file://{tmp_path}/url/files",
        "memory": f"memory://{uuid.uuid4().hex}/files",
    }[request.param]


def everything(where: str) -> dict[str, bytes]:
    """All files of the place by name, as fsspec finds them."""
    system, root = fsspec.url_to_fs(where)
    if not system.exists(root):
        return {}
    found = system.find(root)
    return {path[len(root) :].strip("/"): system.cat_file(path) for path in found}


def test_files_come_back_and_go(where: str) -> None:
    files = open_files(where)
    assert files.read("checkpoints/0001-0.ckpt") is None
    files.remove("checkpoints/0001-0.ckpt")
    for content in (b"", b"first" * 100_000, bytes(range(256))):
        files.write("checkpoints/0001-0.ckpt", content)
        assert files.read("checkpoints/0001-0.ckpt") == content
    files.write("start/0001.safetensors", b"x")
    files.write("top", b"y")
    assert everything(where) == {
        "checkpoints/0001-0.ckpt": bytes(range(256)),
        "start/0001.safetensors": b"x",
        "top": b"y",
    }
    files.remove("checkpoints/0001-0.ckpt")
    files.remove("checkpoints/0001-0.ckpt")
    assert files.read("checkpoints/0001-0.ckpt") is None
    assert set(everything(where)) == {"start/0001.safetensors", "top"}


def test_files_travel_to_another_process(where: str) -> None:
    files = open_files(where)
    files.write("a/b", b"content")  # with whatever it holds open
    other: Files = pickle.loads(pickle.dumps(files))
    assert other.read("a/b") == b"content"


@pytest.mark.parametrize(
    "name", ["", "..", "../a", "a/../../b", "/etc/passwd", "a//b", "a/./b", "a\\b", "a\0b", "a/"]
)
def test_names_stay_in_their_place(where: str, name: str) -> None:
    files = open_files(where)
    calls: list[Any] = [files.read, files.remove, lambda name: files.write(name, b"")]
    for call in calls:
        with pytest.raises(InputError, match="expected a relative file name without"):
            call(name)
    assert everything(where) == {}


def test_a_place_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for where in (str(tmp_path / "file"), f"file://{tmp_path}/file"):
        with pytest.raises(InputError, match=r"^cannot write .*/file/a/b: ") as error:
            open_files(where).write("a/b", b"")
        assert "\n" not in str(error.value)
    (tmp_path / "folder" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match=r"^cannot read .*folder/a: Is a directory"):
        open_files(str(tmp_path / "folder")).read("a")
    with pytest.raises(InputError, match=r"^cannot remove .*folder/a: "):
        open_files(str(tmp_path / "folder")).remove("a")


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("nosuch://a/b", r"expected a folder or a URL such as s3://BUCKET/PATH, got 'nosuch:"),
        ("sftp://me:secret@h/b", r"^sftp://\*\*\*@h/b cannot be used: .*paramiko.*pip install"),
    ],
)
def test_a_url_without_a_way_there_is_one_line(url: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        open_files(url)


class Failing(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
    """A store that refuses the next calls to open, and cuts the next writes in two."""

    protocol = "failing"
    refusals: ClassVar[list[Exception]] = []
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if self.refusals:
            raise self.refusals.pop()
        return super()._open(path, mode, **options)

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        if self.refusals:
            raise self.refusals.pop()
        super().mv(path1, path2, **options)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> UrlFiles:
    fsspec.register_implementation("failing", Failing, clobber=True)
    Failing.refusals.clear()
    Failing.store.clear()
    monkeypatch.setattr(
        "adq.search.files.Patience",
        lambda *given: Patience(*given, sleep=lambda seconds: None),
    )
    return UrlFiles("failing://files", patience_s=1)


def test_passing_errors_are_waited_out(failing: UrlFiles) -> None:
    said: list[str] = []
    failing.say = said.append
    Failing.refusals[:] = [OSError("SLOW_DOWN"), ConnectionResetError("reset by peer")]
    failing.write("a/b", b"whole")
    assert Failing.refusals == []
    assert failing.read("a/b") == b"whole"
    Failing.refusals[:] = [TimeoutError("timed out")]
    assert failing.read("a/b") == b"whole"
    assert "failing://files does not answer (reset by peer): trying again" in said[0]
    assert "is back" in said[1]
    assert len(said) == 4


def test_waiting_is_said_to_who_opened_the_files_and_in_no_other_process(
    failing: UrlFiles,
) -> None:
    said: list[str] = []
    files = open_files(failing.url, said.append)
    Failing.refusals[:] = [OSError("SLOW_DOWN")]
    files.write("a/b", b"whole")
    assert [line.partition("files ")[2][:8] for line in said] == ["does not", "is back "]

    other: Files = pickle.loads(pickle.dumps(open_files(failing.url, lambda text: None)))
    Failing.refusals[:] = [OSError("SLOW_DOWN")]
    assert other.read("a/b") == b"whole"
    assert len(said) == 2


def test_a_file_that_is_not_moved_to_its_place_leaves_nothing(failing: UrlFiles) -> None:
    failing.write("a/b", b"before")
    failing.patience_s = 0
    mv_fails: list[Exception] = [OSError("quota exceeded")]
    opened = Failing._open

    def open_then_refuse(self: Failing, path: str, mode: str = "rb", **options: Any) -> Any:
        stream = opened(self, path, mode, **options)
        Failing.refusals[:] = mv_fails
        return stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Failing, "_open", open_then_refuse)
        with pytest.raises(InputError, match="cannot write failing://files/a/b: quota exceeded"):
            failing.write("a/b", b"after")
    Failing.refusals.clear()
    assert everything("failing://files") == {"a/b": b"before"}


def test_lasting_errors_are_said_at_once(failing: UrlFiles) -> None:
    said: list[str] = []
    failing.say = said.append
    for error in (PermissionError("no"), OSError("AWS Error ACCESS_DENIED during PutObject")):
        Failing.refusals[:] = [error]
        with pytest.raises(InputError, match="cannot write failing://files/a/b: "):
            failing.write("a/b", b"")
    assert said == []


def test_s3_needs_no_further_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against moto's S3 server, where that is installed."""
    server = pytest.importorskip("moto.server", reason="moto's S3 server is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        options = f"scheme=http&region=us-east-1&endpoint_override={host}:{port}"
        made, _ = pyarrow.fs.FileSystem.from_uri(f"s3://bucket?allow_bucket_creation=1&{options}")
        made.create_dir("bucket")
        files = open_files(f"s3://bucket/studies?{options}")
        assert files.read("checkpoints/0.ckpt") is None
        files.remove("checkpoints/0.ckpt")
        for content in (b"short", b"0123456789" * 1_000_000):
            files.write("checkpoints/0.ckpt", content)
            assert files.read("checkpoints/0.ckpt") == content
        listed = made.get_file_info(pyarrow.fs.FileSelector("bucket", recursive=True))
        paths = [f.path for f in listed if f.type == pyarrow.fs.FileType.File]
        assert paths == ["bucket/studies/checkpoints/0.ckpt"]
        files.remove("checkpoints/0.ckpt")
        assert files.read("checkpoints/0.ckpt") is None
        with pytest.raises(InputError, match=r"cannot write s3://nosuch/x/a: .*bucket"):
            open_files(f"s3://nosuch/x?{options}").write("a", b"")
    finally:
        running.stop()


def test_a_folder_is_the_default() -> None:
    files = open_files("out/files")
    assert isinstance(files, FolderFiles)
    assert files.folder == Path.cwd() / "out" / "files"
