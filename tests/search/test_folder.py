"""The study folder: whole or not there, listed; what is damaged is said in one line."""

from pathlib import Path
from typing import Any

import pytest

from adq.proxies.costs import Costs
from adq.quant.errors import InputError
from adq.quant.evaluate import Evaluation
from adq.quant.spec import BitVector
from adq.search.candidate import Record
from adq.search.config import StudyConfig
from adq.search.folder import (
    FINAL,
    MODELS,
    TRIALS,
    StudyFolder,
    create_study,
    list_studies,
    open_study,
)


def config(out: Path, **options: Any) -> StudyConfig:
    return StudyConfig(out=str(out), budget_bits=3.0, **options)


def nothing(folder: StudyFolder) -> None:
    pass


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def record(id: str = "0000") -> Record:
    return Record(
        id=id,
        bits=BitVector({"a": 3, "b": 4}, {"a": 8}),
        seed=5,
        epochs=2,
        costs=Costs(3.25, 3.5, 20.0, 1234, 5678),
        train_losses=(0.5, 0.25),
        flips=(0.1, 0.0),
        dead_levels=(1.0, 0.0),
        validation=Evaluation(0.1, 0.9, 0.02, 50),
        test=None,
        seconds=1.5,
    )


def test_a_new_study_has_its_configuration_its_folders_and_what_was_prepared(
    tmp_path: Path,
) -> None:
    seen = []

    def prepare(folder: StudyFolder) -> None:
        seen.append(names(folder.path))
        folder.file("mine").write_text("x")

    folder = create_study(config(tmp_path / "runs", study="s", trials=7), prepare)
    assert folder.path == tmp_path / "runs" / "s"
    assert folder.name == "s"
    assert seen == [sorted(["study.toml", TRIALS, FINAL, MODELS])]
    assert names(folder.path) == sorted(["study.toml", TRIALS, FINAL, MODELS, "mine"])
    assert folder.config == config(tmp_path / "runs", study="s", trials=7)
    assert folder.path.stat().st_mode & 0o777 == 0o755
    assert names(tmp_path / "runs") == ["s"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_study_that_cannot_be_prepared_leaves_nothing(
    tmp_path: Path, error: BaseException
) -> None:
    def fail(folder: StudyFolder) -> None:
        folder.file("half").write_text("x")
        raise error

    with pytest.raises(type(error)):
        create_study(config(tmp_path, study="s"), fail)
    assert names(tmp_path) == []


def test_a_name_that_is_taken_is_refused_and_the_study_there_is_kept(tmp_path: Path) -> None:
    first = create_study(config(tmp_path, study="s", seed=1), nothing)
    with pytest.raises(
        InputError, match=r"study 's' exists already in .*adq-search resume s.*--st"
    ):
        create_study(config(tmp_path, study="s", seed=2), nothing)
    assert first.config.seed == 1
    assert names(tmp_path) == ["s"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="study 'file' exists already"):
        create_study(config(tmp_path, study="file"), nothing)


def test_a_name_that_the_system_refuses_is_not_called_taken(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot create a study in .*File name too long") as error:
        create_study(config(tmp_path, study="x" * 300), nothing)
    assert "exists" not in str(error.value)
    assert names(tmp_path) == []


def test_studies_without_a_name_are_numbered_by_task(tmp_path: Path) -> None:
    def new(task: str) -> str:
        return create_study(config(tmp_path, task=task), nothing).name

    assert [new("digits"), new("digits")] == ["digits-1", "digits-2"]
    assert new("imagefolder:/some/where") == "imagefolder-1"
    assert new("my.module:make task") == "my.module-1"
    assert new("../x y:f") == "x-y-1"
    assert new(":") == "study-1"
    (tmp_path / "digits-9").mkdir()
    (tmp_path / "digits-x").mkdir()
    assert new("digits") == "digits-10"
    assert StudyFolder(tmp_path / "digits-10").config.study == "digits-10"


def test_a_number_that_is_taken_meanwhile_is_skipped(tmp_path: Path) -> None:
    """Another process takes digits-1 between the choice of the name and the rename."""
    calls = []

    def prepare(folder: StudyFolder) -> None:
        calls.append(folder.config.study)
        if len(calls) == 1:
            create_study(config(tmp_path, seed=8), nothing)

    assert create_study(config(tmp_path, seed=9), prepare).name == "digits-2"
    assert calls == ["digits-1", "digits-2"]
    assert StudyFolder(tmp_path / "digits-1").config.seed == 8
    assert StudyFolder(tmp_path / "digits-2").config.seed == 9


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot create a study in .*; choose .* --out") as e:
            create_study(config(out), nothing)
        assert "\n" not in str(e.value)


def test_records_are_kept_by_kind_and_id(tmp_path: Path) -> None:
    folder = create_study(config(tmp_path, study="s"), nothing)
    for id in ("0002", "0000", "0010"):
        folder.write_record(TRIALS, record(id))
    folder.write_record(FINAL, record("t0002"))
    assert folder.read_record(TRIALS, "0000") == record("0000")
    assert folder.read_record(TRIALS, "0001") is None
    assert folder.read_record(FINAL, "0000") is None
    assert [r.id for r in folder.records(TRIALS)] == ["0000", "0002", "0010"]
    assert folder.records(FINAL) == [record("t0002")]
    assert names(folder.path / TRIALS) == ["0000.json", "0002.json", "0010.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"id": "0000"}', '"text"', "null", b"\xff\xfe"]
)
def test_a_damaged_record_is_named_in_one_line(tmp_path: Path, text: str | bytes) -> None:
    folder = create_study(config(tmp_path, study="s"), nothing)
    path = folder.record_path(TRIALS, "0000")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (lambda: folder.read_record(TRIALS, "0000"), lambda: folder.records(TRIALS)):
        with pytest.raises(InputError, match=r"0000\.json is .*damaged") as error:
            read()
        assert "\n" not in str(error.value)


def test_the_status_says_how_far_it_is(tmp_path: Path) -> None:
    folder = create_study(config(tmp_path, study="s", trials=5), nothing)
    assert folder.status() == "preparing"
    folder.file("sensitivity.json").write_text("{}")
    assert folder.status() == "searching, 0 of 5 trials"
    folder.write_record(TRIALS, record("0000"))
    folder.write_record(TRIALS, record("0001"))
    assert folder.status() == "searching, 2 of 5 trials"
    folder.write_record(FINAL, record("t0000"))
    assert folder.status() == "final training"
    folder.file("results.json").write_text('{"trials": 5, "time_budget": null}')
    assert folder.status() == "finished"
    folder.file("results.json").write_text('{"trials": 4}')  # of before the study was extended
    assert folder.status() == "final training"
    folder.file("results.json").write_text('{"trials": 5, "time_budget": 60.0}')
    assert folder.status() == "final training"


def test_studies_are_opened_by_name_or_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = create_study(config(tmp_path / "runs", study="s"), nothing)
    assert open_study(tmp_path / "runs", "s").path == made.path
    assert open_study(tmp_path / "elsewhere", str(made.path)).path == made.path
    monkeypatch.chdir(made.path)
    opened = open_study("runs", ".")
    assert opened.name == "s"
    assert opened.cache == tmp_path / "runs" / ".cache"


def test_a_study_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no study 'x' in .*runs; there are: none$"):
        open_study(tmp_path / "runs", "x")
    for name in ("b", "a"):
        create_study(config(tmp_path / "runs", study=name), nothing)
    with pytest.raises(InputError, match=r"no study 'x' in .*runs; there are: a, b$"):
        open_study(tmp_path / "runs", "x")


def test_a_study_without_its_configuration_is_damaged(tmp_path: Path) -> None:
    folder = create_study(config(tmp_path, study="s"), nothing)
    folder.file("study.toml").unlink()
    with pytest.raises(InputError, match=r"study 's' in .* is damaged: its study.toml is missing"):
        open_study(tmp_path, "s")


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    folder = create_study(config(tmp_path, study="s"), nothing)
    folder.file("study.toml").write_text("trials = [")
    with pytest.raises(InputError, match=r"s/study\.toml is not valid TOML"):
        open_study(tmp_path, "s")


def test_the_list_holds_studies_alone(tmp_path: Path) -> None:
    assert list_studies(tmp_path / "nowhere") == []
    for name in ("b", "a"):
        create_study(config(tmp_path, study=name), nothing)
    (tmp_path / "no-study").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "file").write_text("")
    # what a process leaves that is killed while it prepares a study
    (tmp_path / ".new-abc").mkdir()
    (tmp_path / ".new-abc" / "study.toml").write_text("")
    assert [folder.name for folder in list_studies(tmp_path)] == ["a", "b"]


def test_the_number_of_trials_can_be_raised_and_not_lowered(tmp_path: Path) -> None:
    folder = create_study(config(tmp_path, study="s", trials=5, bits=(2, 4)), nothing)
    assert folder.extended(None) == folder.extended(5) == folder.config
    assert folder.extended(8) == config(tmp_path, study="s", trials=8, bits=(2, 4))
    assert folder.config.trials == 5  # it only says what would be
    with pytest.raises(InputError, match="trials: study 's' has 5; expected at least as many"):
        folder.extended(4)


def test_the_time_budget_can_be_raised_and_not_lowered(tmp_path: Path) -> None:
    folder = create_study(config(tmp_path, study="s"), nothing)
    assert folder.extended(None, "1.5h").time_budget == 5400
    limited = create_study(config(tmp_path, study="t", time_budget="2m"), nothing)
    assert limited.extended(None, None) == limited.extended(None, 120) == limited.config
    assert limited.extended(30, "3m") == config(tmp_path, study="t", trials=30, time_budget=180)
    with pytest.raises(InputError, match=r"time-budget: study 't' has 120 s; .* got 1m"):
        limited.extended(None, "1m")


@pytest.mark.parametrize("name", ["plain", "with space", "per%20cent", "a#b", "what?x=1", "é:@"])
def test_the_store_lies_in_the_folder_whatever_its_name(tmp_path: Path, name: str) -> None:
    from sqlalchemy import make_url

    folder = create_study(config(tmp_path, study=name), nothing)
    url = make_url(folder.storage_url)
    assert url.get_backend_name() == "sqlite"
    assert url.database == str(folder.path / "study.db")
    assert not url.query


def test_another_storage_is_taken_as_it_was_given(tmp_path: Path) -> None:
    folder = create_study(config(tmp_path, study="s", storage="postgresql://h/d"), nothing)
    assert folder.storage_url == "postgresql://h/d"
