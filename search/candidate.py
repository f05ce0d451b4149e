"""One candidate: a bit vector, fine-tuned and evaluated, and the record of it."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from adq.proxies.costs import Costs
from adq.quant.apply import quantize_
from adq.quant.batches import seeded
from adq.quant.calibrate import Ranges, reestimate_batchnorm_
from adq.quant.errors import NonFiniteLossError
from adq.quant.evaluate import Evaluation, evaluate
from adq.quant.export.packed import save_packed
from adq.quant.layers import LayerInfo
from adq.quant.progressive import train_progressively_
from adq.quant.qat import Epoch, train_
from adq.quant.spec import BitVector
from adq.search.problem import Problem

SCHEMA = "adq-record/1"


@dataclass(frozen=True)
class Record:
    """What is known of one trained candidate.

    `train_losses`, `flips` (the fraction of weights that change level in a step) and `dead_levels`
    (how many a codebook step meets, in all layers) have one entry an epoch. `validation` is None
    when training failed, and `error` says why. `test` is filled for final candidates only, and
    nothing chooses by it. `weights` names a packed file in the study folder.
    """

    id: str
    bits: BitVector
    seed: int
    epochs: int
    costs: Costs
    train_losses: tuple[float, ...]
    flips: tuple[float, ...]
    dead_levels: tuple[float, ...]
    validation: Evaluation | None
    test: Evaluation | None
    seconds: float
    weights: str | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        data = asdict(replace(self, bits=BitVector({})))
        return {"schema": SCHEMA, **data, "bits": self.bits.to_json()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Record":
        fields = {name: data[name] for name in Record.__dataclass_fields__}
        for split in ("validation", "test"):
            if fields[split] is not None:
                fields[split] = Evaluation(**fields[split])
        fields["bits"] = BitVector.from_json(fields["bits"])
        fields["costs"] = Costs(**fields["costs"])
        for name in ("train_losses", "flips", "dead_levels"):
            fields[name] = tuple(fields[name])
        return Record(**fields)


def train_candidate(
    problem: Problem,
    fp32: nn.Module,
    bits: BitVector,
    *,
    id: str,
    epochs: int,
    ranges: Ranges | None = None,
    final: bool = False,
    save_to: Path | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Record:
    """Quantize a copy of the FP32 model, fine-tune it, re-estimate BatchNorm, evaluate.

    All candidates see the same data in the same order, so that they differ by their bits alone.
    `ranges` are those of the FP32 model's inputs (`Problem.input_ranges`), measured here if not
    given.
    A loss that becomes nan or infinite gives a record with an error instead of results.
    """
    started = time.monotonic()
    task, seed = problem.task, problem.config.seed
    with seeded(seed):  # whatever a data pipeline draws, in evaluation too
        ranges = problem.input_ranges(fp32) if ranges is None else ranges
        model, config = copy.deepcopy(fp32), problem.config
        log: list[Epoch] = []
        validation = test = error = weights = None
        try:
            training = config.training(epochs, problem.device.type)
            data = (task.train, task.loss, training, seed, on_epoch)
            if config.start_bits is None:
                quantize_(model, bits, ranges, config.scheme)
                log = train_(model, *data, teacher=fp32)
            else:
                log = train_progressively_(
                    model,
                    bits,
                    *data,
                    calibration=problem.calibration,
                    scheme=config.scheme,
                    start=config.start_bits,
                    teacher=fp32,
                )
            if config.batchnorm == "reestimate":
                reestimate_batchnorm_(model, problem.calibration)
            validation = evaluate(model, task.validation, task.loss, task.metric)
            if final:
                test = evaluate(model, task.test, task.loss, task.metric)
        except NonFiniteLossError as failure:
            validation, error = None, str(failure)
        else:
            if save_to is not None:
                save_packed(model, save_to, problem.model_metadata(id))
                weights = f"{save_to.parent.name}/{save_to.name}"
    return Record(
        id=id,
        bits=bits,
        seed=seed,
        epochs=epochs,
        costs=problem.costs.costs(bits),
        train_losses=tuple(epoch.loss for epoch in log),
        flips=tuple(_share(epoch.flips, problem.layers) for epoch in log),
        dead_levels=tuple(sum(epoch.dead.values()) for epoch in log),
        validation=validation,
        test=test,
        seconds=time.monotonic() - started,
        weights=weights,
        error=error,
    )


def _share(flips: Mapping[str, float], layers: Sequence[LayerInfo]) -> float:
    """The fraction of all weights that flips, from each layer's."""
    flipped = sum(flips[layer.name] * layer.weight_numel for layer in layers)
    return flipped / sum(layer.weight_numel for layer in layers)
