"""The average of the weights, against one that keeps the weights of every step."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adq.quant.apply import dequantize_, quantize
from adq.quant.batches import seeded
from adq.quant.qat import TrainingConfig, train_
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

BITS = BitVector({"0": 3, "4": 4}, {"0": 4, "4": 4})
STEPS = 6


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator)
    return list(zip(x.split(4), (x[:, 0] > 0).long().split(4), strict=True))


def network() -> nn.Module:
    with seeded(0):
        return nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
        ).eval()


def quantized() -> nn.Module:
    return quantize(network(), BITS, batches(), Scheme(split_dead=False))


def arrays(model: nn.Module) -> dict[str, Any]:
    return {key: value.double().numpy().copy() for key, value in model.state_dict().items()}


def trained(model: nn.Module, average: float | None, **more: Any) -> list[dict[str, Any]]:
    """Everything in the model before each step, and after the training."""
    seen = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(arrays(model))
        return F.cross_entropy(outputs, targets)

    options = {"lr": 0.05, "weights_per_level": 0, "weights_average": average, **more}
    train_(model, batches(), loss, TrainingConfig(2, **options), 3)
    return [*seen, arrays(model)]


@pytest.mark.parametrize("make", [network, quantized])
@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9999])
def test_the_model_ends_with_the_mean_of_its_weights_weighted_by_their_age(
    make: Any, decay: float
) -> None:
    model = make()
    parameters = {key for key, _ in model.named_parameters()}
    plain = trained(model, None)
    averaged = trained(make(), decay)[-1]
    # w_t of the weights after step t: each later step's d takes its share away
    rates = [min(decay, (1 + t) / (10 + t)) for t in range(STEPS)]
    weights = [
        (1 if t == 0 else 1 - rates[t]) * np.prod([rates[u] for u in range(t + 1, STEPS)])
        for t in range(STEPS)
    ]
    assert sum(weights) == pytest.approx(1)
    after, during = plain[1:], plain[:-1]  # BatchNorm's statistics are there before the loss
    moved = 0
    for key, found in averaged.items():
        expected = after[-1][key]
        statistics = key.endswith(("running_mean", "running_var"))
        if key in parameters or statistics:
            values = [state[key] for state in (during if statistics else after)]
            expected = sum(w * value for w, value in zip(weights, values, strict=True))
            moved += decay > 0 and not np.array_equal(found, after[-1][key])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7, err_msg=key)
    assert moved > 5 or decay == 0


def test_codebooks_are_those_of_the_training_and_serve_the_averaged_weights() -> None:
    plain, model = trained(quantized(), None), quantized()
    found = trained(model, 0.15)
    for key in plain[-1]:
        if key.endswith(("levels", "counts", "sums")):
            assert np.array_equal(found[-1][key], plain[-1][key]), key
    x = batches()[0][0]
    levels = model[0].parametrizations.weight[0].levels
    scale = model[0].parametrizations.weight[0].log_scale.exp()[:, None]
    normal = model[0].parametrizations.weight.original / scale
    nearest = levels[(normal[..., None] - levels).abs().argmin(-1)] * scale
    expected = model(x)
    dequantize_(model, keep_quantized_weights=True)
    assert torch.allclose(model[0].weight, nearest, atol=1e-6)
    assert expected.isfinite().all()


def test_averaging_changes_no_step() -> None:
    plain, averaged = trained(quantized(), None), trained(quantized(), 0.9)
    for before, found in zip(plain[:-1], averaged[:-1], strict=True):
        assert all(np.array_equal(found[key], before[key]) for key in before)


def test_no_steps_leave_the_weights_alone() -> None:
    model = network()
    before = arrays(model)
    train_(model, batches(), F.cross_entropy, TrainingConfig(0, weights_average=0.9), 0)
    assert all(np.array_equal(arrays(model)[key], before[key]) for key in before)
