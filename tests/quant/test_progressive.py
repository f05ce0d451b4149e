import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.quant import progressive
from adq.quant.apply import bits_of, dequantize_, quantize
from adq.quant.errors import CheckpointError, InputError
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


class KilledError(Exception):
    pass


def killing(at: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss, which fails at the given step, counted from 1."""
    count = itertools.count(1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(count) == at:
            raise KilledError
        return F.cross_entropy(outputs, targets)

    return loss


def run(loss: Any, path: Path | None, scheme: Scheme = Scheme(), **more: Any) -> Any:  # noqa: B008
    model, heard = network(), []
    config = TrainingConfig(7, lr=1e-2, weights_per_level=0, **more)
    log = train_progressively_(
        model,
        BITS,
        batches(),
        loss,
        config,
        5,
        lambda epoch, value: heard.append((epoch, value)),
        calibration=batches(),
        scheme=scheme,
        teacher=network(),
        checkpoint=path,
    )
    return log, model.state_dict(), heard


def alike(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for key, value in one[1].items():
        assert torch.equal(other[1][key], value), key


# stages of 2, 2 and 3 epochs, of 3 steps each: in the first epoch of a stage and in a later one
@pytest.mark.parametrize(
    ("scheme", "kills"),
    [
        (Scheme(), (1, 4, 7, 10, 13, 21)),
        (Scheme("lsq", "lsq"), (10,)),
        (Scheme("n2uq", "pact"), (10,)),
        (Scheme("apot", "minmax"), (10,)),
        (Scheme("minmax"), (10,)),
    ],
)
def test_a_run_killed_in_any_stage_goes_on_to_the_very_same_end(
    tmp_path: Path, scheme: Scheme, kills: tuple[int, ...]
) -> None:
    expected = run(F.cross_entropy, None, scheme)
    for at in kills:
        path = tmp_path / str(at)
        with pytest.raises(KilledError):
            run(killing(at), path, scheme)
        assert path.exists() == (at > 3)
        found = run(F.cross_entropy, path, scheme)
        alike(found, expected)
        # the epochs that were done are not told of again
        assert found[2] == expected[2][(at - 1) // 3 :]
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


def test_a_run_killed_again_and_again_in_the_middle_of_epochs_ends_alike(tmp_path: Path) -> None:
    expected = run(F.cross_entropy, None, checkpoint_every=1)
    for _ in range(10):
        with pytest.raises(KilledError):
            run(killing(3), tmp_path / "c", checkpoint_every=1)
    found = run(killing(3), tmp_path / "c", checkpoint_every=1)
    alike(found, expected)


def never(*_: Any) -> Tensor:
    raise AssertionError("a finished run needs no loss")


def test_a_finished_run_is_read_from_its_file(tmp_path: Path) -> None:
    expected = run(F.cross_entropy, tmp_path / "c")
    found = run(never, tmp_path / "c")
    alike(found, expected)
    assert found[2] == []


def test_a_file_of_another_run_and_a_damaged_one_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with pytest.raises(KilledError):
        run(killing(10), path)
    for more in ({"momentum": 0.5}, {"checkpoint_every": 1}):
        with pytest.raises(InputError, match="is of another run") as caught:
            run(never, path, **more)
        assert type(caught.value) is InputError
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="c is damaged"):
        run(never, path)
