import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.quant import progressive
from adq.quant.apply import bits_of, dequantize_, quantize
from adq.quant.progressive import stages, train_progressively_
from adq.quant.qat import TrainingConfig, train_
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

BITS = BitVector({"0": 8, "2": 2, "4": 3}, {"2": 2, "4": 4})


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)]
        return nn.Sequential(*layers).eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return list(zip(x.split(20), y.split(20), strict=True))


def test_stages_lead_down_to_each_layers_bits() -> None:
    assert stages(BITS, (4, 3)) == [
        BitVector({"0": 8, "2": 4, "4": 4}, {"2": 4, "4": 4}),
        BitVector({"0": 8, "2": 3, "4": 3}, {"2": 3, "4": 4}),
        BITS,
    ]
    assert stages(BITS, (3, 4)) == stages(BITS, (4, 3))
    assert stages(BITS, ()) == [BITS]
    assert stages(BitVector({"a": 4}), (4, 3)) == [BitVector({"a": 4})]
    assert stages(BitVector({"a": 3}), (4, 3)) == [BitVector({"a": 4}), BitVector({"a": 3})]


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (7, [(4, 2), (3, 2), (2, 3)]),
        (3, [(4, 1), (3, 1), (2, 1)]),
        (2, [(3, 1), (2, 1)]),
        (1, [(2, 1)]),
        (0, [(2, 0)]),
    ],
)
def test_epochs_are_shared_out(monkeypatch, epochs: int, expected: list[tuple[int, int]]) -> None:
    seen = []

    def spy(model: nn.Module, data, loss, config: TrainingConfig, *args, **options):
        seen.append((bits_of(model).weight["2"], config.epochs))
        return train_(model, data, loss, config, *args, **options)

    monkeypatch.setattr(progressive, "train_", spy)
    heard: list[tuple[int, float]] = []
    model = network()
    log = train_progressively_(
        model,
        BITS,
        batches(),
        F.cross_entropy,
        TrainingConfig(epochs),
        0,
        lambda epoch, loss: heard.append((epoch, loss)),
        calibration=batches(),
    )
    assert seen == expected
    assert bits_of(model) == BITS
    assert heard == [(i, epoch.loss) for i, epoch in enumerate(log)]
    assert len(log) == epochs


def test_each_stage_starts_from_the_weights_that_the_one_before_left() -> None:
    data, config, scheme = batches(), TrainingConfig(2, lr=1e-2), Scheme()
    found = network()
    options = {"calibration": data, "start": (4,), "teacher": network()}
    train_progressively_(found, BITS, data, F.cross_entropy, config, 5, **options)
    by_hand = network()
    for seed, stage in ((5, stages(BITS, (4,))[0]), (6, BITS)):
        by_hand = quantize(by_hand, stage, data, scheme)
        train_(by_hand, data, F.cross_entropy, TrainingConfig(1, lr=1e-2), seed, teacher=network())
        if stage != BITS:
            dequantize_(by_hand)
    for key, value in by_hand.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
