"""Which executor a study gets, and what is fixed with it."""

from typing import Any

import pytest
import torch

from adq.quant.errors import InputError
from adq.search.config import StudyConfig
from adq.search.executors.local import LocalExecutor
from adq.search.executors.ray import RayExecutor
from adq.search.executors.select import make_executor, settled


class Many:
    """An executor that says how many workers it has."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    run = LocalExecutor.run


@pytest.mark.parametrize(
    ("options", "gpus", "kind"),
    [
        ({}, 0, LocalExecutor),
        ({}, 1, LocalExecutor),
        ({}, 2, RayExecutor),
        ({"executor": "local"}, 2, LocalExecutor),
        ({"executor": "ray"}, 0, RayExecutor),
        ({"workers": 1}, 0, LocalExecutor),
        ({"workers": 2}, 0, RayExecutor),
        ({"ranks": 2}, 0, RayExecutor),
        ({"gpus_per_trial": 2}, 1, RayExecutor),
        ({"address": "auto"}, 0, RayExecutor),
    ],
)
def test_ray_is_taken_where_it_is_asked_for_or_there_is_more_than_one_device(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], gpus: int, kind: type[Any]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    made = make_executor(StudyConfig(**options))
    assert isinstance(made, RayExecutor) == (kind is RayExecutor)
    if kind is LocalExecutor:
        with made as executor:
            assert isinstance(executor, LocalExecutor)


@pytest.mark.parametrize(
    ("options", "workers", "window", "ranks"),
    [
        ({}, 1, 1, 1),
        ({}, 4, 8, 1),
        ({}, 64, 128, 1),
        ({}, 100, 300, 1),
        ({"window": 5}, 4, 5, 1),
        ({"gpus_per_trial": 0.5}, 4, 8, 1),
        ({"gpus_per_trial": 4}, 2, 4, 4),
        ({"gpus_per_trial": 4, "ranks": 2}, 2, 4, 2),
    ],
)
def test_window_and_ranks_are_fixed_when_a_study_begins(
    options: dict[str, Any], workers: int, window: int, ranks: int
) -> None:
    config = settled(StudyConfig(**options), Many(workers))
    assert (config.window, config.ranks) == (window, ranks)
    assert settled(config, Many(3)) == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 2}, "workers 2: "),
        ({"ranks": 3}, "ranks 3: "),
        ({"gpus_per_trial": 4}, "gpus-per-trial 4"),
        ({"address": "auto"}, "address auto: "),
    ],
)
def test_what_the_local_executor_has_no_use_for_is_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=f"{said}.*use --executor ray"):
        settled(StudyConfig(executor="local", **options), LocalExecutor())
    settled(StudyConfig(executor="local", workers=1, ranks=1), LocalExecutor())
