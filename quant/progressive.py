"""Quantization-aware training that comes down to its bits step by step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from adq.quant.apply import dequantize_, quantize_
from adq.quant.batches import Batches, device_of
from adq.quant.calibrate import input_ranges
from adq.quant.checkpoint import epochs_before, read_state
from adq.quant.parallel import group_of
from adq.quant.qat import Epoch, Loss, TrainingConfig, train_
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector


def stages(bits: BitVector, start: Sequence[int]) -> list[BitVector]:
    """The bit vectors on the way to `bits`: max(b, start_1), max(b, start_2), ..., and b itself.

    4, 3 leads a layer of 2 bits over 4 and 3, one of 3 bits over 4, and leaves one of 8 bits
    alone. Stages equal to the one before are left out.
    """
    found: list[BitVector] = []
    for low in (*sorted(start, reverse=True), 0):
        stage = BitVector(
            {name: max(b, low) for name, b in bits.weight.items()},
            {name: max(b, low) for name, b in bits.act.items()},
        )
        if not found or stage != found[-1]:
            found.append(stage)
    return found


def train_progressively_(
    model: nn.Module,
    bits: BitVector,
    batches: Batches,
    loss: Loss,
    config: TrainingConfig,
    seed: int,
    on_epoch: Callable[[int, float], None] | None = None,
    *,
    calibration: Batches,
    scheme: Scheme = Scheme(),  # noqa: B008 (it is frozen)
    start: Sequence[int] = (4, 3),
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    parallel: bool = False,
) -> list[Epoch]:
    """Quantize an FP32 `model` in place and train it at each of the `stages` in turn.

    `config.epochs` are shared out evenly, what is left over to the last stage; each stage has its
    own warm-up and decay, codebooks that start from the weights that the one before left, and
    input ranges measured anew on `calibration`. Fewer epochs than stages leave the first ones out.

    With a `checkpoint`, one file keeps the state of the stage that is trained and the epochs of
    those before, and a run that finds it goes on from there as `train_` does. `parallel` and what
    is raised are as in `train_`.
    """
    way = stages(bits, start)
    way = way[max(0, len(way) - max(1, config.epochs)) :]
    each, rest = divmod(config.epochs, len(way))
    log: list[Epoch] = []
    if checkpoint is not None:
        device = device_of(model)
        state = read_state(checkpoint, device, group_of(parallel, device))
        log = [Epoch(**epoch) for epoch in epochs_before(state)]
    first = next((i for i in range(len(way)) if i * each == len(log)), None)
    if first is None:  # train_ says what is wrong with it
        first, log = 0, []
    for i, stage in enumerate(way[first:], first):
        if i > first:
            dequantize_(model)
        wanted = {name: (b,) for name, b in stage.act.items()}
        quantize_(model, stage, input_ranges(model, wanted, calibration, scheme.act), scheme)
        share = replace(config, epochs=each + (rest if i == len(way) - 1 else 0))
        before = len(log)
        log += train_(
            model,
            batches,
            loss,
            share,
            seed + i,
            None if on_epoch is None else lambda e, value, n=before: on_epoch(n + e, value),  # type: ignore[misc]
            teacher=teacher,
            checkpoint=checkpoint,
            parallel=parallel,
            earlier=log,
        )
    return log
