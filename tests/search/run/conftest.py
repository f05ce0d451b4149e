"""What the tests of `adq.search.run` share: studies made once for each module."""

from collections.abc import Iterator

import pytest
from tiny_studies import INTERRUPTED, Study, study_in

from adq.quant.files import write_json
from adq.search import run, sensitivity
from adq.search.folder import FINAL, StudyFolder
from adq.search.front import Front


def only_json(folder: StudyFolder, front: Front) -> None:
    """Charts and pages are test_report's, and take longer than a study."""
    write_json(folder.file("front.json"), front.to_json())


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_report", only_json)
        patch.setattr(run, "SEEDS", 5)
        patch.setattr(sensitivity, "SAMPLES", 16)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_in(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Study:
    found = study_in(tmp_path_factory.mktemp("undisturbed"), **INTERRUPTED)
    assert len(found.folder.records(FINAL)) >= 3
    return found
