"""Records and storages that are lost, damaged or another's: one line each."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from made_up_studies import Bench, make_study

from adq.quant.errors import InputError
from adq.search.folder import TRIALS, StudyFolder


def test_a_record_of_other_bits_is_not_taken_for_this_trials(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    with bench.loop(folder) as loop:
        loop.ask()
    foreign = bench.problem.space.bit_vector(bench.problem.space.uniform(4))
    folder.write_record(TRIALS, bench.record("0000", foreign, 2))
    bench.run(folder)
    assert bench.evaluated["0000@2"] == 1
    first = bench.problem.space.bit_vector(bench.problem.space.uniform(3))
    assert folder.records(TRIALS)[0].bits == first != foreign


def test_a_damaged_record_stops_the_run_in_one_line(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    with bench.loop(folder) as loop:
        loop.ask()
    folder.record_path(TRIALS, "0000").write_text('{"id": "0000"')
    expect_one_line(folder, bench, r"0000\.json is missing or damaged")


def expect_one_line(folder: StudyFolder, bench: Bench, match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        bench.run(folder)
    assert "\n" not in str(error.value)


def test_a_missing_store_is_one_line_and_none_is_made(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    bench.run(folder)
    folder.file("study.db").unlink()
    for _ in range(2):  # the first attempt must not leave an empty store behind for the second
        expect_one_line(folder, Bench(template[1].problem), r"storage sqlite:.*study\.db .*restore")
    assert not folder.file("study.db").exists()


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 100, None])
def test_a_damaged_store_is_one_line(
    fresh: Callable[[str], StudyFolder], template: Any, content: bytes | None
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    bench.run(folder)
    path = folder.file("study.db")
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    expect_one_line(folder, Bench(template[1].problem), r"storage sqlite:.*study\.db")


def test_a_store_with_garbled_text_is_one_line(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    bench.run(folder)
    path = folder.file("study.db")
    path.write_bytes(path.read_bytes().replace(b"weight:conv2", b"weight:\xff\xfe\xfdv2"))
    expect_one_line(folder, bench, r"storage sqlite:.*study\.db cannot be used")


def test_a_store_of_another_version_of_optuna_is_one_line(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    with sqlite3.connect(folder.file("study.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
        connection.execute("UPDATE version_info SET schema_version = 999, library_version = '99'")
    connection.close()
    expect_one_line(folder, bench, r"storage sqlite:.*study\.db cannot be used: .* optuna")


def test_a_store_that_lost_its_study_is_one_line(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    optuna.delete_study(study_name="s", storage=folder.storage_url)
    expect_one_line(folder, bench, r"storage sqlite:.*study\.db .*'s'")


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "not a url",
        "nosuchdatabase://here/there",
        "sqlite:////nowhere/at/all/study.db",
        "postgresql+nosuchdriver://localhost/x",
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line_and_no_study(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match=r"^storage .* cannot be used: .*--storage") as error:
        make_study(tmp_path, storage=url)
    assert "\n" not in str(error.value)
    assert url in str(error.value)
    assert list(tmp_path.iterdir()) == []
