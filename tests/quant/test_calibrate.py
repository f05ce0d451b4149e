import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adq.quant.activation import fit_range
from adq.quant.calibrate import (
    SAMPLE_VALUES,
    input_ranges,
    input_samples,
    reestimate_batchnorm_,
)
from adq.quant.errors import InputError

Batch = tuple[Tensor, None]


def data(sizes: tuple[int, ...], *shape: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, *shape, generator=generator), None) for n in sizes]


def test_few_values_are_all_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = data((6, 3), 4)
    samples = input_samples(model, ["0", "2"], batches)
    expected = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        hidden = torch.cat([model[1](model[0](x)) for x, _ in batches])
    for name, values in (("0", expected), ("2", hidden)):
        # the minimum and the maximum of each of the two calls are there once more
        assert samples[name].numel() == values.numel() + 4
        assert set(samples[name].tolist()) == set(values.flatten().tolist())


def test_many_values_are_thinned_out_but_the_range_is_whole() -> None:
    x = torch.randn(40, 1, 50, 50, generator=torch.Generator().manual_seed(0))
    x[17, 0, 31, 12], x[3, 0, 8, 49] = 123.0, -77.0
    batches = [(x[i : i + 5], None) for i in range(0, 40, 5)]
    values = input_samples(nn.Conv2d(1, 1, 1), [""], batches)[""]
    assert values.min() == -77
    assert values.max() == 123
    assert SAMPLE_VALUES / 3 < values.numel() <= SAMPLE_VALUES + 3 * 8
    assert set(values.tolist()) <= set(x.flatten().tolist())
    usual = values[values.abs() < 10]
    # unit normal values: four standard errors
    assert abs(usual.mean().item()) < 4 / math.sqrt(len(usual))
    assert abs(usual.std().item() - 1) < 4 / math.sqrt(2 * len(usual))


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_thinning_out_meets_every_column_of_a_feature_map(side: int) -> None:
    # zero in the first column and row, as padding makes it, and one elsewhere
    x = torch.ones(32, 16, side, side)
    x[..., 0], x[..., 0, :] = 0, 0
    samples = input_samples(nn.Conv2d(16, 1, 1), [""], [(x, None)] * 8)[""]
    share = ((side - 1) / side) ** 2
    assert samples.mean().item() == pytest.approx(share, abs=0.02)


def test_at_most_limit_batches_are_run_in_eval_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [(torch.full((2, 4), float(i)), None) for i in range(5)]
    samples = input_samples(model, ["0", "2"], batches, limit=3)
    assert samples["0"].unique().tolist() == [0, 1, 2]
    assert samples["2"].max() < 2.001  # dropout would double what it keeps
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_layer_called_twice_gives_the_inputs_of_both_calls() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Threshold(1e9, 7.0), layer)
    samples = input_samples(model, ["0"], data((3,), 4))["0"]
    assert samples.max() == 7
    assert samples.numel() == 2 * (12 + 2)


@pytest.mark.parametrize("batches", [[], data((2,), 4)])
def test_a_layer_that_got_no_input_is_named(batches: list[Batch]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("unused", nn.Linear(4, 4))
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"no calibration input reached .*unused.*: are the"):
        input_samples(model, ["0", "unused"], batches)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_ranges_are_the_best_grids_of_the_samples_at_each_width() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = data((30, 7), 4)
    found = input_ranges(model, {"2": (2, 8), "0": (3,)}, batches)
    samples = input_samples(model, ["0", "2"], batches)
    assert found == {
        ("2", 2): fit_range(samples["2"], 2),
        ("2", 8): fit_range(samples["2"], 8),
        ("0", 3): fit_range(samples["0"], 3),
    }
    assert found["2", 2][1] == 0  # rectified
    assert input_ranges(model, {}, []) == {}
    with pytest.raises(InputError, match="no calibration input reached 0"):
        input_ranges(model, {"0": (4,)}, [])


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(3, momentum=0.3)
        self.drop = nn.Dropout()
        self.norm1d = nn.BatchNorm1d(3, momentum=None)
        self.untracked = nn.BatchNorm1d(3, track_running_stats=False)
        with torch.no_grad():
            for norm in (self.norm, self.norm1d):
                norm.running_mean.fill_(9)
                norm.running_var.fill_(9)
                norm.num_batches_tracked.fill_(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.untracked(self.norm1d(self.drop(x.mean(dim=(2, 3)))))


def test_batchnorm_statistics_are_the_plain_average_over_the_batches() -> None:
    model = Norms()
    batches = data((8, 8, 3), 2, 5, 5)  # the short batch counts as one of three, as documented
    reestimate_batchnorm_(model, batches)
    means, variances, deep = [], [], []
    for x, _ in batches:
        values = model.conv(x).detach().double().transpose(0, 1).flatten(1).numpy()
        means.append(values.mean(axis=1))
        variances.append(values.var(axis=1, ddof=1))
        biased = values.var(axis=1, ddof=0)
        scaled = (values - means[-1][:, None]) / np.sqrt(biased + model.norm.eps)[:, None]
        deep.append(scaled.reshape(3, len(x), 25).mean(axis=2))
    # single precision
    np.testing.assert_allclose(model.norm.running_mean, np.mean(means, axis=0), atol=1e-6)
    np.testing.assert_allclose(model.norm.running_var, np.mean(variances, axis=0), rtol=1e-5)
    # the second BatchNorm sees the first one normalise by batch, and no dropout
    expected = np.mean([v.mean(axis=1) for v in deep], axis=0)
    np.testing.assert_allclose(model.norm1d.running_mean, expected, atol=1e-6)
    expected = np.mean([v.var(axis=1, ddof=1) for v in deep], axis=0)
    np.testing.assert_allclose(model.norm1d.running_var, expected, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_momenta_and_modes_are_put_back(training: bool) -> None:
    model = Norms().train(training)
    model.norm1d.eval()
    modes = [m.training for m in model.modules()]
    reestimate_batchnorm_(model, data((4,), 2, 5, 5))
    assert (model.norm.momentum, model.norm1d.momentum) == (0.3, None)
    assert [m.training for m in model.modules()] == modes


def test_momenta_and_modes_are_put_back_when_a_batch_does_not_fit() -> None:
    model = Norms().train()
    with pytest.raises(RuntimeError):
        reestimate_batchnorm_(model, data((4,), 7, 5, 5))
    assert (model.norm.momentum, model.norm1d.momentum) == (0.3, None)
    assert model.norm.training


def test_at_most_limit_batches_are_averaged() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    drawn = []

    def batches() -> Iterator[Batch]:
        for i in range(9):
            drawn.append(i)
            yield torch.tensor([[i - 1.0], [i + 1.0]]), None

    reestimate_batchnorm_(model, batches(), limit=4)
    assert model[0].running_mean.item() == 1.5
    assert model[0].running_var.item() == 2
    assert drawn == [0, 1, 2, 3]


def test_without_batches_nothing_is_lost() -> None:
    model = Norms()
    with pytest.raises(InputError, match="batches for BatchNorm are empty"):
        reestimate_batchnorm_(model, [])
    assert model.norm.running_mean.tolist() == [9, 9, 9]
    assert model.norm.momentum == 0.3


def test_a_model_without_batchnorm_needs_no_batch() -> None:
    reestimate_batchnorm_(nn.Linear(2, 2), [])
