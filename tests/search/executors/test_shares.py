"""What a training asks of a cluster's nodes, and how many of them fit."""

from typing import Any

import pytest

from adq.quant.errors import InputError
from adq.search.config import StudyConfig
from adq.search.executors.shares import room, shares


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (1, 1, 1.0)),
        ({"device": "cpu"}, (1, 1, 0.0)),
        ({"cpus_per_trial": 4, "gpus_per_trial": 0.5}, (1, 4, 0.5)),
        ({"gpus_per_trial": 2}, (2, 1, 1.0)),
        ({"gpus_per_trial": 2, "ranks": 1}, (1, 1, 2.0)),
        ({"gpus_per_trial": 1, "ranks": 2, "cpus_per_trial": 6}, (2, 3, 0.5)),
        ({"ranks": 4, "device": "cpu"}, (4, 1, 0.0)),
        ({"ranks": 3, "cpus_per_trial": 2, "device": "cpu"}, (3, 1, 0.0)),
    ],
)
def test_shares_of_a_training(options: dict[str, Any], expected: tuple[int, int, float]) -> None:
    config = StudyConfig(task="python", budget_bits=4.0, **options)
    assert shares(config, [{"CPU": 8, "GPU": 2}, {"CPU": 2}]) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_trial": 9}, "no room for a training with 9 CPUs: its largest node has 8 CPUs"),
        ({"gpus_per_trial": 2}, "no room .* 1 CPUs and 1 GPUs for each of its 2 processes"),
        ({"ranks": 11}, "for each of its 11 processes"),
        ({"device": "cuda"}, "^device cuda: no node of the Ray cluster has a GPU$"),
        ({"gpus_per_trial": 3, "ranks": 2}, "expected whole GPUs, or a share of one"),
    ],
)
def test_what_no_node_has_is_said_at_once(options: dict[str, Any], message: str) -> None:
    config = StudyConfig(task="python", budget_bits=4.0, **options)
    with pytest.raises(InputError, match=message):
        shares(config, [{"CPU": 8.0}, {"CPU": 2.0}])


def test_room_counts_what_fits_into_each_node_alone() -> None:
    nodes = [{"CPU": 3.0, "GPU": 2.0}, {"CPU": 3.0}, {"memory": 1e9}]
    assert room(nodes, 2, 0.0) == 2
    assert room(nodes, 1, 0.0) == 6
    assert room(nodes, 1, 1.0) == 2
    assert room(nodes, 1, 0.1) == 3  # by its CPUs; 2 GPUs would do for 20
    assert room([{"CPU": 100.0, "GPU": 0.3}], 1, 0.1) == 3
