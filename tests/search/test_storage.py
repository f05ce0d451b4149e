"""One contract for SQLite, a journal and PostgreSQL, and what happens while a storage is gone."""

import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy.exc
import sqlalchemy.orm
from optuna.distributions import CategoricalDistribution
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from postgres import PostgresServer, postgres_server

from adq.quant.errors import InputError
from adq.search.storage import (
    FinishedOtherwiseError,
    StudyStorage,
    close_storage,
    create_study_in,
    open_storage,
)
from adq.search.storage_errors import storage_errors
from adq.search.storage_url import has_password, shown

optuna.logging.set_verbosity(optuna.logging.WARNING)

DIRECTIONS = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
KINDS = ["sqlite", "journal", "postgresql"]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        running: PostgresServer = request.getfixturevalue("server")
        with psycopg.connect(running.url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return running.url
    if request.param == "journal":
        return f"journal:{tmp_path}/study.log"
    return f"sqlite:///{tmp_path}/study.db"


def create(url: str, name: str = "s") -> None:
    create_study_in(url, name, ["accuracy", "bits"], DIRECTIONS)


@pytest.fixture
def study(url: str) -> Iterator[StudyStorage]:
    create(url)
    storage = StudyStorage(url, "s")
    yield storage
    storage.close()


def template(bits: int = 4, **attrs: Any) -> FrozenTrial:
    return create_trial(
        state=TrialState.RUNNING,
        params={"weight:conv": bits},
        distributions={"weight:conv": CategoricalDistribution([2, 3, 4, 8])},
        user_attrs=attrs,
        constraints={"size_bytes": -3.0},
    )


def optunas_view(url: str, name: str = "s") -> optuna.Study:
    """A copy of the study as Optuna itself reads it, without any code of ours."""
    storage: JournalStorage | RDBStorage
    if url.startswith("journal:"):
        storage = JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
    else:
        storage = RDBStorage(url)
    copy = InMemoryStorage()
    optuna.copy_study(from_study_name=name, from_storage=storage, to_storage=copy)
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()
    return optuna.load_study(study_name=name, storage=copy)


def test_what_is_written_is_what_optuna_reads(url: str, study: StudyStorage) -> None:
    assert study.create(template(4, told=0))[0] == 0
    number, storage_id = study.create(template(8, told=0, parent=None))
    assert number == 1
    study.set_attr(storage_id, "beat", [1, "a"])
    study.set_attr(storage_id, "beat", [2, "b"])
    study.finish(storage_id, TrialState.COMPLETE, [0.1 + 0.2, float("inf")])
    study.set_study_attr("exhausted", False)
    study.set_study_attr("exhausted", True)
    seen = optunas_view(url)
    first, second = seen.trials
    assert (first.state, second.state) == (TrialState.RUNNING, TrialState.COMPLETE)
    assert second.params == {"weight:conv": 8}
    assert second.values == [0.1 + 0.2, float("inf")]
    assert second.constraints == {"size_bytes": -3.0}
    job = second.user_attrs.pop("job")
    assert second.user_attrs == {"told": 0, "parent": None, "beat": [2, "b"]}
    assert job != first.user_attrs["job"]
    assert seen.user_attrs == {"exhausted": True}
    assert seen.metric_names == ["accuracy", "bits"]
    assert seen.directions == DIRECTIONS


def test_a_second_driver_sees_what_the_first_does(url: str, study: StudyStorage) -> None:
    other = StudyStorage(url, "s")
    try:
        _, storage_id = study.create(template())
        assert [trial.state for trial in other.trials()] == [TrialState.RUNNING]
        study.set_attr(storage_id, "beat", 3)
        assert other.trials()[0].user_attrs["beat"] == 3
        assert other.create(template(8))[0] == 1
        other.finish(storage_id, TrialState.FAIL)
        assert [t.state for t in study.trials()] == [TrialState.FAIL, TrialState.RUNNING]
        assert study.study_attr("exhausted") is None
        other.set_study_attr("exhausted", True)
        assert study.study_attr("exhausted") is True
    finally:
        other.close()


def test_finished_trials_are_read_once(url: str, study: StudyStorage) -> None:
    _, storage_id = study.create(template())
    study.finish(storage_id, TrialState.COMPLETE, [0.5, 4.0])
    study.create(template(8))
    first = study.trials()
    assert study.trials()[0] is first[0]


def test_drivers_at_the_same_time_number_their_trials_without_a_gap(
    url: str, study: StudyStorage
) -> None:
    def drive(driver: int) -> list[int]:
        own = StudyStorage(url, "s")
        try:
            return [own.create(template(4, driver=driver))[0] for _ in range(8)]
        finally:
            own.close()

    with ThreadPoolExecutor(4) as pool:
        numbers = [*pool.map(drive, range(4))]
    assert sorted(chain(*numbers)) == [*range(32)]
    by_driver = [
        [t.number for t in optunas_view(url).trials if t.user_attrs["driver"] == driver]
        for driver in range(4)
    ]
    assert by_driver == numbers


def test_the_same_end_twice_is_no_change_and_another_is_refused(study: StudyStorage) -> None:
    _, storage_id = study.create(template())
    study.finish(storage_id, TrialState.COMPLETE, [1 / 3, 4])
    study.finish(storage_id, TrialState.COMPLETE, [1 / 3, 4])
    for state, values in [
        (TrialState.COMPLETE, [0.25, 4.0]),
        (TrialState.FAIL, None),
    ]:
        with pytest.raises(FinishedOtherwiseError, match="trial 0 of study 's' was finished"):
            study.finish(storage_id, state, values)
    assert study.trial(storage_id).values == [1 / 3, 4.0]
    with pytest.raises(FinishedOtherwiseError):
        study.set_attr(storage_id, "beat", 1)


def test_a_study_is_deleted_with_its_trials(url: str, study: StudyStorage) -> None:
    create(url, "other")
    study.create(template())
    study.delete_study()
    study.delete_study()
    with pytest.raises(InputError, match="has no study 's' any more"):
        study.trials()
    with pytest.raises(InputError, match="has no study 's': restore it"):
        StudyStorage(url, "s")
    storage = open_storage(url)
    assert [found.study_name for found in storage.get_all_studies()] == ["other"]
    close_storage(storage)


def test_a_second_study_of_one_name_is_refused_unless_the_first_is_a_leftover(url: str) -> None:
    create(url)
    create(url)  # nothing was in it
    study = StudyStorage(url, "s")
    study.set_study_attr("folder", "/out/s")
    with pytest.raises(InputError, match=r"has a study 's' already: .*--study"):
        create(url)
    assert study.study_attr("folder") == "/out/s"
    study.delete_study()
    create(url)
    study.close()
    study = StudyStorage(url, "s")
    study.create(template())
    with pytest.raises(InputError, match=r"has a study 's' already: .*--study"):
        create(url)
    assert len(study.trials()) == 1
    study.close()


def test_processes_that_begin_one_study_at_the_same_moment_share_it(url: str) -> None:
    create(url, "first")  # tables are there
    ready = threading.Barrier(2)

    def begin(name: str) -> None:
        ready.wait()
        create(url, name)

    with ThreadPoolExecutor(2) as pool:
        for number in range(3):
            list(pool.map(begin, [f"s{number}"] * 2))
    for number in range(3):
        assert optunas_view(url, f"s{number}").directions == DIRECTIONS


def test_a_leftover_with_other_directions_makes_way_to_whoever_is_first(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_study_in(url, "s", ["accuracy"], DIRECTIONS[:1])
    delete = optuna.delete_study

    def beaten(**where: Any) -> None:
        delete(**where)
        create(url)  # another process

    monkeypatch.setattr(optuna, "delete_study", beaten)
    create(url)
    assert optunas_view(url).directions == DIRECTIONS


def test_a_call_whose_answer_is_lost_is_done_once(
    url: str, study: StudyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = iter([True])

    def lose(applied: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = applied(*args)
            if next(lost, False):
                raise error
            return result

        return call

    if url.startswith("journal:"):
        monkeypatch.setattr("os.fsync", lose(os.fsync, OSError(5, "Input/output error")))
    else:
        orig = psycopg.OperationalError("server closed the connection unexpectedly")
        error = sqlalchemy.exc.OperationalError("COMMIT", None, orig)
        commit = lose(sqlalchemy.orm.Session.commit, error)
        monkeypatch.setattr(sqlalchemy.orm.Session, "commit", commit)
    monkeypatch.setattr("optuna.storages._rdb.storage.time.sleep", lambda seconds: None)
    number, storage_id = study.create(template(4))
    assert number == 0
    lost = iter([True])
    study.set_attr(storage_id, "beat", 1)
    lost = iter([True])
    study.set_study_attr("exhausted", True)
    lost = iter([True])
    study.finish(storage_id, TrialState.COMPLETE, [0.5, 4.0])
    assert next(lost, None) is None
    assert study.create(template(8))[0] == 1
    assert [t.user_attrs.get("beat") for t in optunas_view(url).trials] == [1, None]
    assert study.study_attr("exhausted") is True


def test_two_processes_may_open_a_new_storage_at_once(url: str) -> None:
    names = [f"study-{i}" for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert [*pool.map(lambda name: create(url, name), names)] == [None] * 6
    storage = open_storage(url)
    assert sorted(found.study_name for found in storage.get_all_studies()) == names
    close_storage(storage)


def test_a_server_that_is_gone_for_a_while_loses_and_doubles_nothing(
    server: PostgresServer,
) -> None:
    create(server.url, "outage")
    said: list[str] = []
    study = StudyStorage(server.url, "outage", said.append)
    numbers = []

    def blink() -> None:
        server.stop()
        time.sleep(0.5)
        server.start()

    # the second outage begins while calls are on their way
    start, later = threading.Timer(3, server.start), threading.Timer(0.05, blink)
    try:
        for i in range(30):
            number, storage_id = study.create(template(4))
            if i == 10:
                server.stop()
                start.start()
            study.set_attr(storage_id, "beat", i)
            if i == 10:
                later.start()
            study.finish(storage_id, TrialState.COMPLETE, [number / 7, float(i)])
            numbers.append(number)
    finally:
        study.close()
        start.join()
        later.join()
    trials = optunas_view(server.url, "outage").trials
    assert numbers == [t.number for t in trials] == [*range(30)]
    assert [t.values for t in trials] == [[i / 7, float(i)] for i in range(30)]
    assert [t.user_attrs["beat"] for t in trials] == [*range(30)]
    assert len(said) >= 2
    assert "postgresql://tester:***@" in said[0]
    assert "does not answer (" in said[0]
    assert "is back after" in said[1]


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_patience_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, time_, said = f"sqlite:///{tmp_path}/study.db", Time(), list[str]()
    create(url)
    study = StudyStorage(url, "s", said.append, 60, clock=lambda: time_.now, sleep=time_.sleep)

    def locked(*args: Any) -> None:
        cause = sqlite3.OperationalError("database is locked")
        raise sqlalchemy.exc.OperationalError("COMMIT", None, cause) from cause

    monkeypatch.setattr(sqlalchemy.orm.Session, "commit", locked)
    with pytest.raises(
        InputError, match=r"^storage sqlite:.* cannot be used: database is locked"
    ) as error:
        study.set_study_attr("exhausted", True)
    assert "\n" not in str(error.value)
    assert time_.slept[:4] == [0.1, 0.2, 0.4, 0.8]
    assert max(time_.slept) == 10
    assert sum(time_.slept) == pytest.approx(60)
    assert said == [
        f"storage {url} does not answer (database is locked): trying again for up to 60 s"
    ]
    study.close()


def refused(url: str, match: str, name: str = "s") -> None:
    """The storage cannot be opened, which is said at once, in one line without the password."""
    started, said = time.monotonic(), list[str]()
    with pytest.raises(InputError, match=match) as error:
        StudyStorage(url, name, said.append)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    assert said == []
    assert time.monotonic() - started < 5


def test_lasting_errors_of_a_server_are_said_at_once(server: PostgresServer) -> None:
    create(server.url, "lasting")
    refused(server.url, "has no study 'nosuch'", "nosuch")
    wrong = server.url.replace("secret", "secretly")
    refused(wrong, "password authentication failed.*give another --storage")
    refused(server.url.replace("/postgres", "/nosuch"), 'database "nosuch" does not exist')
    refused(server.url.replace("127.0.0.1", "nosuchhost.invalid"), "cannot be used")
    refused(server.url.replace("postgresql:", "postgresql+nosuch:"), "cannot be used")
    with pytest.raises(InputError, match="password authentication failed"):
        create(wrong)


def test_a_server_of_another_version_of_optuna_is_said_at_once(server: PostgresServer) -> None:
    create(server.url, "version")
    with psycopg.connect(server.url) as connection:
        before = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    try:
        refused(server.url, "no longer compatible", "version")
    finally:
        with psycopg.connect(server.url) as connection:
            connection.execute("UPDATE alembic_version SET version_num = %s", before)


def test_a_server_that_is_not_there_is_waited_for_and_said(tmp_path: Path) -> None:
    time_, said = Time(), list[str]()
    url = "postgresql://me:secret@127.0.0.1:1/x"
    with pytest.raises(InputError, match=r"cannot be used: .*refused"):
        StudyStorage(url, "s", said.append, clock=lambda: time_.now, sleep=time_.sleep)
    assert sum(time_.slept) == pytest.approx(30)
    assert len(said) == 1
    assert "postgresql://me:***@127.0.0.1:1/x does not answer" in said[0]


@pytest.mark.parametrize("kind", ["sqlite:///", "journal:"])
def test_a_missing_file_is_said_at_once_and_none_is_made(tmp_path: Path, kind: str) -> None:
    refused(f"{kind}{tmp_path}/study", "there is no file .*study; restore it")
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(InputError, match=r"there is no folder .*nosuch; make it, or give another"):
        create(f"{kind}{tmp_path}/nosuch/study")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("made_or_opened", [create, open_storage])
def test_a_journal_without_a_file_is_one_line(made_or_opened: Callable[[str], object]) -> None:
    with pytest.raises(InputError, match=r"^storage: expected a file as journal:FILE, got 'jou"):
        made_or_opened("journal:")


def test_a_missing_driver_is_one_line_that_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InputError, match=r'pip install "adq-search\[postgresql\]"'):
        create("postgresql://me@127.0.0.1:1/x")


def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path) -> None:
    for content in (b"weights", b"some\ntext\n", b"\x00\xff" * 9000):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(InputError, match="no journal of Optuna"):
            create(f"journal:{path}")
        assert path.read_bytes() == content


def test_a_damaged_journal_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    create(f"journal:{path}")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"study_name"', b'"study_\xffame"'))
    refused(f"journal:{path}", "is damaged")
    path.write_bytes(whole.replace(b'"study_name"', b'"study_game"'))
    refused(f"journal:{path}", "no journal of Optuna")


def test_a_record_cut_short_by_death_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    create(f"journal:{path}")
    study = StudyStorage(f"journal:{path}", "s")
    study.create(template(2))
    size = path.stat().st_size
    study.create(template(3))
    whole = path.read_bytes()
    for cut in (size + 1, size + 5, size + 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        revived = StudyStorage(f"journal:{path}", "s")
        assert [t.params for t in revived.trials()] == [{"weight:conv": 2}]
        assert revived.create(template(8))[0] == 1
        bits = [t.params["weight:conv"] for t in optunas_view(f"journal:{path}").trials]
        assert bits == [2, 8]


def test_a_full_disk_is_waited_for_and_cuts_no_record_in_two(tmp_path: Path) -> None:
    path, said = tmp_path / "study.log", list[str]()
    create(f"journal:{path}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = []

    def free(seconds: float) -> None:
        sizes.append(path.stat().st_size)
        if len(sizes) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    study = StudyStorage(f"journal:{path}", "s", said.append, sleep=free)
    before = path.stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before + 30, limits[1]))
        assert study.create(template(8))[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sizes == [before] * 3
    assert "File too large" in said[0]
    assert len(optunas_view(f"journal:{path}").trials) == 1


def test_a_process_killed_with_the_lock_of_a_journal_delays_nobody(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    create(f"journal:{path}")
    study = StudyStorage(f"journal:{path}", "s")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from adq.search.journal import _locked\n"
            "with _locked(sys.argv[1]): print('held', flush=True); time.sleep(60)",
            f"{path}.lock",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(study.create, template())
            time.sleep(0.3)
            assert not made.done()
            holder.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            assert made.result(10)[0] == 0
            assert time.monotonic() - killed < 2
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_messages_show_no_password() -> None:
    assert shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert shown("journal:/a/b") == "journal:/a/b"
    with (
        pytest.raises(InputError, match=r"me:\*\*\*@host"),
        storage_errors("postgresql://me:secret@host/db"),
    ):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("key", ["password", "passwd", "sslpassword"])
def test_a_password_behind_the_question_mark_is_one_too(key: str) -> None:
    url = f"postgresql://me@host/db?connect_timeout=3&{key}=secret%26x&sslmode=require"
    assert has_password(url)
    assert "secret" not in shown(url)
    assert f"{key}=***" in shown(url)
    assert "connect_timeout=3" in shown(url)
    assert "sslmode=require" in shown(url)
    assert has_password("postgresql://me:secret@host/db")
    for without in ("postgresql://me@host/db?options=-c a", "journal:/a?b", "sqlite:////a/b c.db"):
        assert not has_password(without)
