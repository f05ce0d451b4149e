"""What the tests of `adq.search.study` share: quick storages, and a study to be copied."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from made_up_studies import Bench, copy_of, make_study
from optuna.storages._rdb.storage import _VersionManager

from adq.search.folder import StudyFolder

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module", autouse=True)
def quick_storage() -> Iterator[None]:
    """Optuna looks through its migrations once, and SQLite waits for no disk: a process that dies
    leaves what it wrote all the same."""

    def relax(connection: sqlite3.Connection, _: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    head: list[str] = []
    original = _VersionManager.get_head_version

    def get_head_version(self: _VersionManager) -> str:
        if not head:
            head.append(original(self))
        return head[0]

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", relax)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_VersionManager, "get_head_version", get_head_version)
        yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", relax)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFolder, Bench]:
    """A study of four trials, none of them asked for yet, to be copied."""
    return make_study(tmp_path_factory.mktemp("template"))


@pytest.fixture
def fresh(template: tuple[StudyFolder, Bench], tmp_path: Path) -> Callable[[str], StudyFolder]:
    return lambda name: copy_of(template[0], tmp_path / name)
