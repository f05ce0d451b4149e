import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_jobs as jobs
import torch
from ranks import Ranks, started
from torch import nn

from adq.quant.errors import CheckpointError, InputError, NonFiniteLossError
from adq.quant.parallel import ALONE, Group, group_of

SMALL = {"epochs": 2, "lr": 1e-2, "weights_per_level": 0}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with started(3) as processes:
        yield processes


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Logs and weights alike, each tensor to so much of its largest value."""
    log, weights = found
    expected_log, expected_weights = expected
    for one, other in zip(log, expected_log, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=tolerance)
        assert one.flips == pytest.approx(other.flips, rel=1e-6)
        assert one.dead == other.dead
    assert weights.keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        within = tolerance * max(1e-3, np.abs(value).max())
        np.testing.assert_allclose(weights[key], value, rtol=0, atol=within, err_msg=key)


def alike(results: list[Any]) -> None:
    """All ranks have the same, to the bit."""
    first_log, first = results[0]
    for log, weights in results[1:]:
        assert log == first_log
        assert weights.keys() == first.keys()
        for key, value in first.items():
            assert np.array_equal(weights[key], value), key


# What stays between the two is rounding, 2^-53 and 2^-24 of a value, grown over ten steps. It grows
# most in scales before BatchNorm, whose gradient is little else and which Adam divides by its size.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "options", "more"),
    [
        (torch.float32, {}, {}),
        (torch.float64, {}, {}),
        (torch.float64, {"optimizer": "sgd", "codebook_freeze": 0.5}, {"taught": True}),
        (torch.float64, {"dampening": 0.1, "freeze_above": 0.005}, {}),
        (torch.float64, {"weights_average": 0.9}, {}),
        (torch.float64, {}, {"loader": True}),
        (torch.float64, {"parts": 2}, {"norms": False}),
        (torch.float64, {"parts": 3, "dampening": 0.1}, {"norms": False, "loader": True}),
    ],
)
def test_ranks_reach_what_one_process_reaches(
    ranks: Ranks, size: int, dtype: torch.dtype, options: dict[str, Any], more: dict[str, Any]
) -> None:
    expected = jobs.trained({**options, "parts": 1}, parallel=False, dtype=dtype, **more)
    job = partial(jobs.trained, dtype=dtype, **more)
    found = ranks.run(size, job, options)
    alike(found)
    # distillation is computed in single precision
    close(found[0], expected, TOLERANCE[torch.float32 if "taught" in more else dtype])


def test_what_is_compared_moves_flips_and_freezes() -> None:
    before = jobs.state(jobs.quantized())
    log, after = jobs.trained({}, parallel=False)
    assert sum(epoch.flips["3"] for epoch in log) > 0
    for key in before:
        if not key.endswith("zero_point"):
            assert not np.array_equal(before[key], after[key]), key
    _, frozen = jobs.trained({"freeze_above": 0.005}, parallel=False)
    assert not all(np.array_equal(frozen[key], after[key]) for key in after)


def test_one_rank_is_a_group_too(ranks: Ranks) -> None:
    expected = jobs.trained({}, parallel=False, loader=True)
    [found] = ranks.run(1, partial(jobs.trained, loader=True), {})
    close(found, expected, TOLERANCE[torch.float32])


def test_a_compiled_model_runs_uncompiled(ranks: Ranks) -> None:
    results = ranks.run(2, jobs.trained, {}), ranks.run(2, partial(jobs.trained, compiled=True), {})
    alike([*results[0], *results[1]])


def test_mixed_precision_trains_alike(ranks: Ranks) -> None:
    expected = jobs.trained({"amp": "bf16", "lr": 1e-3}, parallel=False)
    found = ranks.run(2, jobs.trained, {"amp": "bf16", "lr": 1e-3})
    alike(found)
    # bfloat16 rounds a product to 2^-9, and sums of other samples to other values
    assert found[0][0][0].loss == pytest.approx(expected[0][0].loss, rel=0.02)


def test_stages_are_trained_alike(ranks: Ranks) -> None:
    found = ranks.run(2, jobs.progressively)
    alike(found)
    close(found[0], jobs.progressively(parallel=False), TOLERANCE[torch.float32])


def test_ranks_agree_on_a_step_that_overflows(ranks: Ranks) -> None:
    expected = jobs.overflowing(parallel=False)
    moved = [not np.array_equal(a, b) for a, b in itertools.pairwise(expected)]
    assert moved == [True, False, True, True]
    for found in ranks.run(3, jobs.overflowing):
        assert [not np.array_equal(a, b) for a, b in itertools.pairwise(found)] == moved
        np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-2)  # half precision


def test_ranks_that_err_stay_equal(ranks: Ranks) -> None:
    alike(ranks.run(3, jobs.drifting))


def test_a_parameter_that_one_rank_alone_uses_is_trained_and_an_unused_one_is_not(
    ranks: Ranks,
) -> None:
    expected = jobs.partly_used(parallel=False)
    before = jobs.Unused()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = jobs.Unused()
    assert np.array_equal(expected["never.weight"], before.never.weight.detach())
    for found in ranks.run(3, jobs.partly_used):
        assert np.array_equal(found["never.weight"], expected["never.weight"])  # no decay either
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)


# --- BatchNorm ---


@pytest.mark.parametrize("name", list(jobs.NORMS))
@pytest.mark.parametrize("sizes", [[3, 4], [5, 1, 2], [0, 3, 2], [1, 1, 0]])
def test_batchnorm_over_ranks_is_torchs_of_the_whole_batch(
    ranks: Ranks, name: str, sizes: list[int]
) -> None:
    results = ranks.run(len(sizes), jobs.normalized, name, sizes)
    alone = jobs.normalized(name, sizes, parallel=False)
    # torch's own statistics are in single or double precision
    for i, tolerance in enumerate((1e-10, 2e-5)):
        for key, value in alone[i].items():
            shares = [found[i][key] for found in results]
            mine = np.concatenate(shares) if key[0] in "xy" else shares[0]
            np.testing.assert_allclose(mine, value, rtol=tolerance, atol=tolerance, err_msg=key)
            if key.startswith("state"):
                assert all(np.array_equal(share, shares[0]) for share in shares)


def test_batchnorm_of_a_single_value_is_refused_as_torch_does(ranks: Ranks) -> None:
    for error in ranks.run(2, jobs.normalized, "1d", [1, 0]):
        assert isinstance(error, ValueError)
        assert "more than one value per channel" in str(error)


# --- data ---


def test_each_rank_loads_its_share_of_each_batch_and_no_more(ranks: Ranks) -> None:
    order, draws, counts = jobs.loaded("shuffle", parallel=False)
    assert sorted(order) == list(range(30))
    assert counts == [[8], [8], [8], [6]]
    found = ranks.run(3, jobs.loaded, "shuffle")
    for loaded, _, shared in found:
        assert shared == [[3, 3, 2]] * 3 + [[2, 2, 2]]
        assert len(loaded) == sum(c[found.index((loaded, _, shared))] for c in shared)
    whole: list[int] = []
    places = [iter(loaded) for loaded, _, _ in found]
    for shares in found[0][2]:
        for place, n in zip(places, shares, strict=True):
            whole += itertools.islice(place, n)
    assert whole == order
    # the first rank draws as one process does, the others by themselves
    assert found[0][1][0] == draws[0]
    drawn = [tuple(d[:3]) for _, d, _ in found]
    assert len({value for three in drawn for value in three}) == 9


def test_a_sampler_that_draws_as_it_goes_draws_the_same_on_all_ranks(ranks: Ranks) -> None:
    found = ranks.run(2, jobs.loaded, "lazy")
    assert [counts for _, _, counts in found] == [[[3, 2]] * 4] * 2
    one, other = (np.array(loaded) for loaded, _, _ in found)
    batches = [[*a, *b] for a, b in zip(one.reshape(4, 3), other.reshape(4, 2), strict=True)]
    [(alone, _, _)] = ranks.run(1, jobs.loaded, "lazy")
    assert np.concatenate(batches).tolist() == alone
    assert len({tuple(batch) for batch in batches}) == 4


def test_workers_of_different_ranks_draw_differently(ranks: Ranks) -> None:
    one, other = ranks.run(2, jobs.noise_of_workers)
    assert len(set(one) | set(other)) == 16


def test_dropout_differs_between_ranks_and_repeats(ranks: Ranks) -> None:
    one, other = ranks.run(2, jobs.masks)
    seen = [mask.tobytes() for mask in (*one, *other)]
    assert len(set(seen)) == len(seen) == 12
    again, _ = ranks.run(2, jobs.masks)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))


# --- checkpoints ---


@pytest.mark.parametrize(("at", "every"), [(3, 1), (7, 0), (8, 2)])
def test_ranks_that_are_killed_go_on_to_the_very_same_end(
    ranks: Ranks, tmp_path: Path, at: int, every: int
) -> None:
    results = ranks.run(2, jobs.resumed, tmp_path, at, every)
    for whole, resumed in results:
        alike([whole, resumed])
    alike([whole for whole, _ in results])


def test_a_checkpoint_may_be_gone_on_with_on_other_ranks(ranks: Ranks, tmp_path: Path) -> None:
    expected = jobs.trained_from(tmp_path / "whole", SMALL, parallel=False)
    path = tmp_path / "c"
    ranks.run(3, jobs.stopped, path, SMALL)
    content = path.read_bytes()
    for size in (1, 2):
        path.write_bytes(content)
        found = ranks.run(size, jobs.trained_from, path, SMALL)
        alike(found)
        close(found[0], expected, TOLERANCE[torch.float32])
    path.write_bytes(content)
    close(jobs.trained_from(path, SMALL, parallel=False), expected, TOLERANCE[torch.float32])


def test_only_the_first_rank_needs_the_file(ranks: Ranks, tmp_path: Path) -> None:
    first = ranks.run(2, jobs.first_has_the_file, tmp_path, SMALL)
    assert [names for _, names in first] == [["c"], []]
    again = ranks.run(2, jobs.first_has_the_file, tmp_path, SMALL)
    alike([result for result, _ in (*first, *again)])


def test_all_ranks_hear_of_a_damaged_file_and_of_a_folder_that_is_none(
    ranks: Ranks, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"hello")
    for error in ranks.run(2, jobs.trained_from, path, SMALL):
        assert type(error) is CheckpointError
        assert "c is damaged" in str(error)
    for error in ranks.run(2, jobs.trained_from, tmp_path / "none" / "c", SMALL):
        assert type(error) is InputError
        assert "cannot write" in str(error)


# --- what goes wrong on one rank ---


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("nan", NonFiniteLossError, "the training loss became nan in epoch 1, step 2"),
        ("fewer", InputError, "the ranks have different numbers of batches"),
        ("metric", InputError, "one value per sample"),
        ("evaluated fewer", InputError, "the ranks have different numbers of batches"),
    ],
)
def test_all_ranks_stop_together(ranks: Ranks, kind: str, error: type, message: str) -> None:
    for found in ranks.run(2, jobs.failing, kind):
        assert type(found) is error
        assert message in str(found)


def test_a_process_without_a_group_is_refused() -> None:
    with pytest.raises(InputError, match="expected the ranks of a process group"):
        jobs.trained({})
    assert group_of(False, torch.device("cpu")) is ALONE


# --- evaluation ---


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("count", [3, 13, 30])
def test_ranks_evaluate_to_the_same_bits(ranks: Ranks, count: int, loader: bool) -> None:
    expected = jobs.evaluated(count, loader, parallel=False)
    assert expected.samples == count
    for size in (2, 3):
        assert ranks.run(size, jobs.evaluated, count, loader) == [expected] * size


# --- a process by itself ---


def test_a_process_by_itself_sums_copies_and_gathers_nothing() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.ones(1, 2)
    total = Group().sum_gradients_(list(layer.parameters()), torch.tensor(3.0))
    assert (total.item(), layer.weight.grad.tolist(), layer.bias.grad) == (3, [[1, 1]], None)
    assert ALONE.counts(5) == [5]
    assert ALONE.first(lambda: 4) == 4
    assert ALONE.gather(lambda: 4) == [4]
