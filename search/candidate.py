"""One candidate: a bit vector, fine-tuned and evaluated, and the record of it."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adq.proxies.costs import Costs
from adq.quant.apply import dequantize_, quantize_
from adq.quant.batches import seeded
from adq.quant.calibrate import Ranges, reestimate_batchnorm_
from adq.quant.errors import InputError, NonFiniteLossError
from adq.quant.evaluate import Evaluation, evaluate
from adq.quant.export.packed import save_packed
from adq.quant.files import write_tensors
from adq.quant.layers import LayerInfo
from adq.quant.progressive import train_progressively_
from adq.quant.qat import Epoch, train_
from adq.quant.spec import BitVector
from adq.search.problem import Problem

SCHEMA = "adq-record/3"


@dataclass(frozen=True)
class Rung:
    """One training of a candidate; `validation` is None where it failed."""

    epochs: int
    validation: Evaluation | None
    seconds: float


@dataclass(frozen=True)
class Record:
    """What is known of one candidate.

    `rungs` are its trainings, each from the start, the shortest first. `epochs`, `train_losses`,
    `flips` (the fraction of weights that change level in a step) and `dead_levels` (how many a
    codebook step meets, in all layers) are the last one's, the latter three with one entry an
    epoch; `seconds` is the sum.

    `validation` is what the full fine-tuning led to, so that results of shorter ones are never
    taken for it. It is None when training failed, and `error` says why, and when the candidate was
    not trained that far. `test` is filled for final candidates only, and nothing chooses by it.
    `weights` names a packed file in the study folder. `parent` is the trial whose weights the
    training began from, FP32's where None. `parts` is into how many parts each batch was cut for
    want of memory.
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
    rungs: tuple[Rung, ...] = ()
    parent: str | None = None
    parts: int = 1

    @property
    def state(self) -> str:
        """In words: how the candidate ended, or how far it is."""
        if self.error is not None:
            return f"failed: {self.error}"
        return "done" if self.validation is not None else f"stopped after {self.epochs} epochs"

    def to_json(self) -> dict[str, Any]:
        data = asdict(replace(self, bits=BitVector({})))
        return {"schema": SCHEMA, **data, "bits": self.bits.to_json()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Record":
        """The inverse of `to_json`; InputError for a record of another version."""
        if data.get("schema", SCHEMA) != SCHEMA:
            raise InputError(
                f"it is of another version ({data['schema']!r}, expected {SCHEMA!r}): start a new "
                "study"
            )
        fields = {name: data[name] for name in Record.__dataclass_fields__}
        for split in ("validation", "test"):
            fields[split] = _evaluation(fields[split])
        fields["rungs"] = tuple(
            Rung(rung["epochs"], _evaluation(rung["validation"]), rung["seconds"])
            for rung in fields["rungs"]
        )
        fields["bits"] = BitVector.from_json(fields["bits"])
        fields["costs"] = Costs(**fields["costs"])
        for name in ("train_losses", "flips", "dead_levels"):
            fields[name] = tuple(fields[name])
        return Record(**fields)


def _evaluation(data: dict[str, Any] | None) -> Evaluation | None:
    return None if data is None else Evaluation(**data)


def train_candidate(
    problem: Problem,
    fp32: nn.Module,
    bits: BitVector,
    *,
    id: str,
    epochs: int,
    ranges: Ranges | None = None,
    start: Mapping[str, Tensor] | None = None,
    final: bool = False,
    save_to: Path | None = None,
    keep_in: Path | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    checkpoint: Path | None = None,
    parts: int = 1,
    parallel: bool = False,
) -> Record:
    """Quantize a copy of the FP32 model, fine-tune it, re-estimate BatchNorm, evaluate.

    All candidates see the same data in the same order, so that they differ by their bits alone.
    `ranges` are those of the FP32 model's inputs (`Problem.input_ranges`), measured here if not
    given. `start` is a state dict that the copy begins with instead, such as the weights under the
    quantizers that another candidate left in its file `keep_in`. The teacher is the FP32 model all
    the same, and so are the input ranges: measured on the model that is started from, they change
    the validation loss after one epoch by −0.0010 ± 0.0011 (digits, 24 candidates). The packed
    model goes to the file `save_to`.

    A training whose file `checkpoint` is there goes on from it. `parts` is into how many parts a
    batch is cut for want of memory, with summed gradients. With `parallel` all ranks of torch's
    process group train the candidate together, see `train_`.
    A loss that becomes nan or infinite gives a record with an error instead of results.
    """
    started = time.monotonic()
    task, seed = problem.task, problem.config.seed
    with seeded(seed):  # whatever a data pipeline draws, in evaluation too
        ranges = problem.input_ranges(fp32) if ranges is None else ranges
        model, config = copy.deepcopy(fp32), problem.config
        if start is not None:
            model.load_state_dict(start)
        log: list[Epoch] = []
        validation = test = error = weights = None
        try:
            training = replace(config.training(epochs, problem.device.type), parts=parts)
            data = (task.train, task.loss, training, seed, on_epoch)
            if config.start_bits is None:
                quantize_(model, bits, ranges, config.scheme)
                log = train_(model, *data, teacher=fp32, checkpoint=checkpoint, parallel=parallel)
            else:
                log = train_progressively_(
                    model,
                    bits,
                    *data,
                    calibration=problem.calibration,
                    scheme=config.scheme,
                    start=config.start_bits,
                    teacher=fp32,
                    checkpoint=checkpoint,
                    parallel=parallel,
                )
            if config.batchnorm == "reestimate":
                reestimate_batchnorm_(model, problem.calibration)
            splits = (task.validation, task.test) if final else (task.validation,)
            validation, *rest = [
                evaluate(model, split, task.loss, task.metric, parallel=parallel)
                for split in splits
            ]
            test = rest[0] if final else None
        except NonFiniteLossError as failure:
            validation, error = None, str(failure)
        else:
            if save_to is not None:
                save_packed(model, save_to, problem.model_metadata(id))
                weights = f"{save_to.parent.name}/{save_to.name}"
            if keep_in is not None:
                write_tensors(keep_in, dequantize_(model).state_dict(), {})
    seconds = time.monotonic() - started
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
        seconds=seconds,
        weights=weights,
        error=error,
        rungs=(Rung(epochs, validation, seconds),),
        parts=parts,
    )


def failed_record(
    problem: Problem,
    bits: BitVector,
    id: str,
    epochs: int,
    error: str,
    seconds: float = 0.0,
    parts: int = 1,
) -> Record:
    """The record of a training that came to nothing."""
    return Record(
        id=id,
        bits=bits,
        seed=problem.config.seed,
        epochs=epochs,
        costs=problem.costs.costs(bits),
        train_losses=(),
        flips=(),
        dead_levels=(),
        validation=None,
        test=None,
        seconds=seconds,
        error=error,
        rungs=(Rung(epochs, None, seconds),),
        parts=parts,
    )


def _share(flips: Mapping[str, float], layers: Sequence[LayerInfo]) -> float:
    """The fraction of all weights that flips, from each layer's."""
    flipped = sum(flips[layer.name] * layer.weight_numel for layer in layers)
    return flipped / sum(layer.weight_numel for layer in layers)
