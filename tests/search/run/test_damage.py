"""A study's files that are lost, damaged, edited or of another version: made again or named."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_task
import torch
from safetensors.torch import load_file
from tiny_studies import QUICK, Stop, Study, stop_at, study_in

from adq.quant.errors import InputError
from adq.search import jobs, run
from adq.search.folder import START, TRIALS, StudyFolder, open_study
from adq.search.problem import make_problem
from adq.search.run import load_front, resume


def test_damaged_or_missing_weights_of_a_final_model_are_made_again(tmp_path: Path) -> None:
    found = study_in(tmp_path, **QUICK)
    files = sorted(found.folder.file("models").iterdir())
    # clones: what load_file gives is a map of the file, and the file is about to be damaged
    whole = [{k: v.clone() for k, v in load_file(path).items()} for path in files]
    files[0].unlink()
    for path in files[1:]:
        path.write_bytes(path.read_bytes()[:100])
    assert resume(found.folder, tiny_task.make_task()) == found.front
    for path, tensors in zip(files, whole, strict=True):
        again = load_file(path)
        assert all(torch.equal(again[key], value) for key, value in tensors.items())
    weights = {k: v.clone() for k, v in load_file(found.folder.file("best.safetensors")).items()}
    best = found.folder.path / found.front.best.weights
    assert all(torch.equal(weights[key], value) for key, value in load_file(best).items())


def test_a_lost_trial_record_is_named(tmp_path: Path) -> None:
    found = study_in(tmp_path, **QUICK)
    found.folder.record_path(TRIALS, "0001").unlink()
    with pytest.raises(InputError, match=r"0001\.json is missing: restore it"):
        resume(found.folder, tiny_task.make_task())
    shutil.rmtree(found.folder.file(TRIALS))
    with pytest.raises(InputError, match="is missing"):
        resume(found.folder, tiny_task.make_task())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"seeds": 3}',
        '{"seeds": []}',
        '{"seeds": ["conv2"]}',
        '{"seeds": [{}]}',
        *[
            json.dumps(
                {"seeds": [{"weight:conv2": 2, "weight:conv3": 2, "weight:hidden": 2} | bad]}
            )
            for bad in (
                {"weight:conv2": 5},
                {"weight:conv2": [2]},
                {"weight:conv9": 2},
                {"weight:conv2": 8, "weight:conv3": 8},  # over the budget
            )
        ],
    ],
)
def test_damaged_seeds_are_one_line(undisturbed: Study, tmp_path: Path, content: str) -> None:
    shutil.copytree(undisturbed.folder.path, tmp_path / "s")
    folder = StudyFolder(tmp_path / "s")
    folder.file("seeds.json").write_text(content)
    problem = make_problem(folder.config, tiny_task.make_task())
    with pytest.raises(InputError, match=r"seeds\.json is .*damaged") as error:
        run._seeds(problem, folder, [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"best": "nobody"}'])
def test_a_damaged_front_is_one_line(undisturbed: Study, tmp_path: Path, content: str) -> None:
    shutil.copytree(undisturbed.folder.path, tmp_path / "s")
    (tmp_path / "s" / "front.json").write_text(content)
    with pytest.raises(InputError, match="damaged") as error:
        load_front(StudyFolder(tmp_path / "s"))
    assert "\n" not in str(error.value)


def test_lost_weights_that_another_trial_starts_from_are_named(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, jobs, "train_candidate", 2, after=False)
        with pytest.raises(Stop):
            study_in(tmp_path, **QUICK, warm_start="on")
    folder = open_study(tmp_path, "s")
    (folder.file(START) / "0000.safetensors").unlink()
    with pytest.raises(InputError, match=r"start/0000\.safetensors, .* is missing or damaged"):
        resume(folder, tiny_task.make_task())


def test_an_option_that_was_edited_is_refused(tmp_path: Path) -> None:
    found = study_in(tmp_path, **QUICK)
    path = found.folder.file("study.toml")
    text = path.read_text()
    for old, new, name in (
        ("lr = 0.0001", "lr = 0.001", "lr is 0.001 and was 0.0001"),
        ("seed = 1", "seed = 2", "seed is 2 and was 1"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=name):
            resume(found.folder, tiny_task.make_task())
    path.write_text(text.replace('device = "auto"', 'device = "cpu"'))
    assert resume(found.folder, tiny_task.make_task()) == found.front


def test_records_of_an_earlier_version_are_refused_in_one_line(tmp_path: Path) -> None:
    found = study_in(tmp_path, **QUICK)
    path = found.folder.record_path(TRIALS, "0001")
    path.write_text(path.read_text().replace("adq-record/3", "adq-record/2"))
    with pytest.raises(InputError, match=r"0001\.json cannot be used: .*version.*a new study") as e:
        resume(found.folder, tiny_task.make_task())
    assert "\n" not in str(e.value)
