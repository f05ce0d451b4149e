"""The training loop: FP32 training and quantization-aware fine-tuning alike."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adq.quant.average import WeightAverage
from adq.quant.batches import (
    Batch,
    Batches,
    batch_size,
    count_batches,
    device_of,
    evaluating,
    forward,
    loaded,
    parts_of,
    random_state,
    ready,
    seeded,
    set_random_state,
)
from adq.quant.batchnorm import BatchNormOverRanks
from adq.quant.checkpoint import epochs_before, read_state, write_state
from adq.quant.distillation import distillation_loss, distils
from adq.quant.errors import InputError, NonFiniteLossError
from adq.quant.flat import WEIGHTS_PER_LEVEL, FlatWeights, flats_of, tracking
from adq.quant.modules import ActivationQuantizer, AdaptiveWeight, WeightQuantizer
from adq.quant.optimizer import new_optimizer, schedule
from adq.quant.oscillation import Flips
from adq.quant.parallel import ALONE, Group, group_of
from adq.quant.scheme import OPTIMIZERS, Amp, Optimizer

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) -> mean loss of the batch, a scalar."""

CHECKPOINT = "adq-training/3"


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; the defaults are those of a short fine-tuning.

    epochs           passes over the training batches
    lr               peak learning rate; cosine decay to zero, per step
    weight_decay     of weights with two or more dimensions; quantizers and biases get none
    warmup           fraction of the steps over which the rate rises linearly
    optimizer        `adamw`, or `sgd` with Nesterov's momentum
    momentum         of `sgd`
    amp              `bf16` or `fp16` autocast (fp16 with a scaled loss); none if not given
    distillation     λ of the loss (1 − λ)·task + λ·T²·KL(teacher ‖ model), where there is a teacher
    temperature      T of both softmaxes (Hinton et al., arXiv 1503.02531)
    codebook_decay   γ of the codebooks' moving average; levels stay where they start if not given
    weights_per_level  a codebook with fewer weights to a level stays still, see `flat`
    codebook_freeze  last fraction of the steps in which they stay still all the same
    dampening        λ_d at the end of λ_d(t)·Σ(w − ŵ)², raised from 0 by a cosine (Nagel et al.,
                     arXiv 2203.11086, eq. 6); 0 is off
    freeze_above     frequency from which oscillating weights are frozen, see `oscillation`; the
                     paper's are 0.01 to 0.1; off if not given
    weights_average  decay of the moving average of the weights that the training ends with, see
                     `average`; off if not given
    checkpoint_every steps between checkpoints, beside those at the end of each epoch; 0 for none
    parts            into which each batch is cut to save memory: one optimizer step from the sum of
                     their gradients, weighted by samples, which is the batch's but for BatchNorm,
                     whose statistics are those of a part; never of fewer than two samples
    """

    epochs: int
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05
    optimizer: Optimizer = "adamw"
    momentum: float = 0.9
    amp: Amp | None = None
    distillation: float = 0.5
    temperature: float = 1.0
    codebook_decay: float | None = 0.99
    weights_per_level: float = WEIGHTS_PER_LEVEL
    codebook_freeze: float = 0.25
    dampening: float = 0.0
    freeze_above: float | None = None
    weights_average: float | None = None
    checkpoint_every: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise InputError(
                f"optimizer: expected {' or '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )
        if self.amp not in (None, "bf16", "fp16"):
            raise InputError(f"amp: expected bf16, fp16 or none, got {self.amp!r}")
        if self.epochs < 0 or self.checkpoint_every < 0:
            raise InputError(
                f"epochs, checkpoint_every: expected 0 or more, got {self.epochs} and "
                f"{self.checkpoint_every}"
            )
        if self.parts < 1:
            raise InputError(f"parts: expected 1 or more, got {self.parts}")
        shares = (
            "distillation",
            "weight_decay",
            "freeze_above",
            "warmup",
            "momentum",
            "codebook_freeze",
            "codebook_decay",
            "weights_average",
        )
        for name in shares:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name}: expected 0 to 1, got {value}")
        if not (0 < self.lr < math.inf and self.temperature > 0 and 0 <= self.dampening < math.inf):
            raise InputError(
                "lr and temperature: expected more than 0, dampening: 0 or more, got "
                f"{self.lr:g}, {self.temperature:g} and {self.dampening:g}"
            )


@dataclass
class Epoch:
    """What is known of one epoch.

    loss   mean training loss over its samples
    flips  layer -> mean fraction of its weights that change level in a step
    dead   layer -> mean number of dead levels that a codebook step met
    """

    loss: float = 0.0
    flips: dict[str, float] = field(default_factory=dict)
    dead: dict[str, float] = field(default_factory=dict)


def train_(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    config: TrainingConfig,
    seed: int,
    on_epoch: Callable[[int, float], None] | None = None,
    *,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    parallel: bool = False,
    earlier: Sequence[Epoch] = (),
) -> list[Epoch]:
    """Train `model` in place; returns what is known of each epoch.

    Codebooks of quantized layers follow the weights at every step. Everything random (data order,
    augmentation, dropout) comes from `seed` and the epoch's number, so that a run repeats. A
    `teacher` (the FP32 model) is used where outputs are class scores, see
    `distillation.distils`.

    With a `checkpoint`, the whole state is kept in that file, and a run that finds it there goes
    on from it, to the same weights as a run that was never interrupted. It may go on with other
    `parts` and on other ranks. `earlier` are the epochs of trainings before this one that used the
    same file; one that holds fewer of them is theirs, and is replaced.

    With `parallel`, all ranks of torch.distributed's process group train the one model, each on its
    share of every batch (see `parallel.Group.shares`); all must call this alike and end alike.
    BatchNorm takes the statistics of the whole batch, the gradient is that of the mean loss over
    its samples, and the end is what one process reaches with the whole batches, but for rounding:
    weights agree to 1e-3 of the largest of their tensor in single precision and to 1e-9 in double
    over some tens of steps, while no weight or activation lies within rounding of a threshold. The
    worst are scales and biases before BatchNorm: their gradient is little but rounding, which AdamW
    divides by its size. This is for losses that are means over samples, and not where dropout or
    augmentation draws at random: each rank has its own draws. A compiled model runs uncompiled.

    Ranks begin with rank 0's model. They then stay equal bit for bit: a sum over ranks is the same
    on all, the optimizer works on each element by itself, and codebooks and all other buffers are
    rank 0's after each step, since a GPU may add up their statistics in another order each time.

    Raises NonFiniteLossError at the first step whose loss is nan or infinite, CheckpointError for a
    damaged checkpoint, InputError for one of another run; on all ranks.
    """
    group = group_of(parallel, device_of(model))
    run = _Run(model, batches, loss, config, seed, teacher, checkpoint, group, earlier)
    # a compiled model would not ask the other ranks for their statistics
    with torch.compiler.set_stance("force_eager") if parallel else nullcontext():
        return run.train(on_epoch)


class _Run:
    """One call of `train_`: what it holds, and where it is."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss,
        config: TrainingConfig,
        seed: int,
        teacher: nn.Module | None,
        checkpoint: Path | None,
        group: Group = ALONE,
        earlier: Sequence[Epoch] = (),
    ) -> None:
        self.model, self.batches, self.loss = model, batches, loss
        self.config, self.seed = config, seed
        self.teacher = teacher if config.distillation > 0 else None
        self.checkpoint, self.earlier = checkpoint, list(earlier)
        self.device, self.group = device_of(model), group
        self.norms = BatchNormOverRanks(group) if group.distributed else None
        self.optimizer = new_optimizer(
            model, config.optimizer, config.lr, config.momentum, config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.flat = _flat(model, config)
        self.flips = None if self.flat is None else Flips(self.flat, config.freeze_above)
        decay = config.weights_average
        self.average = None if decay is None else WeightAverage(model, decay)
        self.epochs: list[Epoch] = []
        self.step = 0  # over all epochs
        self.batch = 0  # in this epoch
        self.sums: dict[str, Any] = {}  # of this epoch

    def train(self, on_epoch: Callable[[int, float], None] | None) -> list[Epoch]:
        steps = count_batches(self.batches, self.seed)
        if steps == 0:
            raise InputError("the training batches are empty: expected at least one batch")
        self.total = self.config.epochs * steps
        random = self._load()
        self.group.copy_first_([*self.model.parameters(), *self.model.buffers()])
        while len(self.epochs) < self.config.epochs:
            epoch = len(self.epochs)
            self.model.train()
            with seeded(self.seed * 10_007 + epoch):
                for batch, counts in self._rest_of_epoch(random):
                    with self.group.stream(self.seed, epoch, self.batch):
                        self._train_on(ready(batch, self.batches, self.device), counts)
                    every = self.config.checkpoint_every
                    if every and self.step % every == 0:
                        self._save()
            if self.batch == 0:
                raise InputError(
                    f"the training batches gave nothing in epoch {epoch + 1}: they must be "
                    "iterable again and again, which a generator is not"
                )
            self._close_epoch()
            random = None
            self._save()
            if on_epoch is not None:
                on_epoch(epoch, self.epochs[-1].loss)
        if self.average is not None:
            self.average.apply_()
        self.model.eval()
        return self.epochs

    def _rest_of_epoch(self, random: dict[str, Any] | None) -> Iterator[tuple[Batch, list[int]]]:
        """The batches that this epoch has not seen yet, and how many samples each rank has.

        Those seen are drawn again and dropped, and the random state is set to what it was then.
        """
        batches = self.group.shares(loaded(self.batches))
        for _ in range(self.batch):
            next(batches, None)
        if random is not None and not self.group.distributed:
            set_random_state(random)  # ranks draw nothing but data from it, and have done so again
        for batch in batches:
            self.batch += 1
            yield batch

    def _train_on(self, batch: Batch, counts: Sequence[int] | None = None) -> None:
        """One step on a batch, or on this rank's share of it, of which each rank has so many."""
        config = self.config
        counts = [batch_size(batch)] if counts is None else counts
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * schedule(self.step, self.total, config.warmup)
        adapting = self.flat if self._adapts() else None
        self.optimizer.zero_grad(set_to_none=True)
        number = self._backward(batch, counts, adapting)
        if not math.isfinite(number):
            raise NonFiniteLossError(
                f"the training loss became {number} in epoch {len(self.epochs) + 1}, step "
                f"{self.batch}: check the data and the loss, or lower the learning rate "
                f"({config.lr:g})"
            )
        if self.flat is not None and self.flips is not None:
            self._add("flips", self.flips.step())
        if adapting is not None and config.codebook_decay is not None:
            self._add("dead", adapting.update(config.codebook_decay, config.weights_per_level))
            self._add("updates", 1)
        self.group.copy_first_(list(self.model.buffers()))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.flips is not None:
            self.flips.hold_()
        if self.average is not None:
            self.average.update()
        self._add("loss", number * sum(counts))
        self._add("samples", sum(counts))
        self.step += 1

    def _backward(self, batch: Batch, counts: Sequence[int], adapting: FlatWeights | None) -> float:
        """The loss of the whole batch, Σ n_i/n·L_i over its parts on all ranks, and its gradient.

        Dampening is added once, by rank 0.
        """
        passes = min(self.config.parts, max(1, max(counts) // 2))
        parts = parts_of(batch, counts[self.group.rank], passes)
        losses = []
        with nullcontext() if self.norms is None else self.norms:
            for i, ((inputs, targets), n) in enumerate(parts, 1):
                if self.norms is not None:
                    self.norms.counts = n > 0
                # the weights are the same for all parts
                with nullcontext() if adapting is None or i < passes else tracking(adapting):
                    value = self._loss_of(inputs, targets) * (n / max(1, sum(counts)))
                if i == passes and self.group.rank == 0:
                    value = self._dampened(value)
                self.scaler.scale(value).backward()
                losses.append(value.detach())
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return self.group.sum_gradients_(parameters, torch.stack(losses).sum()).item()

    def _adapts(self) -> bool:
        if self.config.codebook_decay is None or self.flat is None or not self.flat.adaptive:
            return False
        return self.step < (1 - self.config.codebook_freeze) * self.total

    def _loss_of(self, inputs: Any, targets: Any) -> Tensor:
        config = self.config
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        autocast = (
            nullcontext()
            if config.amp is None
            else torch.autocast(self.device.type, kinds[config.amp])
        )
        with autocast:
            outputs = forward(self.model, inputs)
            value = self.loss(outputs, targets)
            if self.teacher is not None and distils(outputs, targets):
                with evaluating(self.teacher), torch.no_grad():
                    taught = forward(self.teacher, inputs)
                distance = distillation_loss(outputs, taught, config.temperature)
                value = torch.lerp(value.float(), distance, config.distillation)
        return value

    def _dampened(self, value: Tensor) -> Tensor:
        if not self.config.dampening or self.flat is None:
            return value
        rise = 0.5 * (1 - math.cos(math.pi * self.step / self.total))
        return value + self.config.dampening * rise * self.flat.distance()

    def _add(self, name: str, value: Any) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _close_epoch(self) -> None:
        sums, names = self.sums, [] if self.flat is None else self.flat.names
        epoch = Epoch(sums["loss"] / sums["samples"])
        if "flips" in sums:
            epoch.flips = dict(zip(names, (sums["flips"] / self.batch).tolist(), strict=True))
        if "dead" in sums:
            epoch.dead = dict(zip(names, (sums["dead"] / sums["updates"]).tolist(), strict=True))
        self.epochs.append(epoch)
        self.batch, self.sums = 0, {}

    def _identity(self) -> dict[str, Any]:
        words = ("zero", "split_dead")
        quantizers = {
            name: [type(module).__name__, *(getattr(module, word, None) for word in words)]
            for name, module in self.model.named_modules()
            if isinstance(module, (WeightQuantizer, ActivationQuantizer))
        }
        return {
            "schema": CHECKPOINT,
            "config": {k: v for k, v in asdict(self.config).items() if k != "parts"},
            "seed": self.seed,
            "quantizers": quantizers,
            "steps": self.total,
            "earlier": [asdict(epoch) for epoch in self.earlier],
            "teacher": self.teacher is not None,
        }

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        state = {
            **self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "flips": {} if self.flips is None else self.flips.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "step": self.step,
            "batch": self.batch,
            "sums": self.sums,
            "random": random_state(),
        }
        write_state(self.checkpoint, state, self.group)

    def _load(self) -> dict[str, Any] | None:
        """Take up the checkpoint, if there is one; the random state in the middle of an epoch."""
        if self.checkpoint is None:
            return None
        state = read_state(self.checkpoint, self.device, self.group)
        if state is None or len(epochs_before(state)) < len(self.earlier):
            return None
        if not isinstance(state, Mapping) or any(
            state.get(key) != value for key, value in self._identity().items()
        ):
            raise InputError(
                f"checkpoint {self.checkpoint} is of another run (other options or seed): restore "
                "them, or remove the file to start anew"
            )
        shapes = {key: value.shape for key, value in self.model.state_dict().items()}
        try:
            # the optimizer checks before it loads, and what it loads is the run's own
            if {key: value.shape for key, value in state["model"].items()} != shapes:
                raise ValueError("its tensors have other names or shapes")
            self.optimizer.load_state_dict(state["optimizer"])
            self.model.load_state_dict(state["model"])
        except (RuntimeError, ValueError, KeyError) as error:
            text = " ".join(str(error).split())[:200]
            raise InputError(f"checkpoint {self.checkpoint} is of another model ({text})") from None
        self.scaler.load_state_dict(state["scaler"])
        if self.flips is not None:
            self.flips.load_state_dict(state["flips"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self.step, self.batch, self.sums = state["step"], state["batch"], state["sums"]
        random: dict[str, Any] = state["random"]
        random["torch"] = random["torch"].cpu()
        random["cuda"] = [t.cpu() for t in random["cuda"]]
        random["numpy"][1] = random["numpy"][1].cpu()
        return random if self.batch else None


def _flat(model: nn.Module, config: TrainingConfig) -> FlatWeights | None:
    flats = flats_of(model)
    if len(flats) > 1:
        raise InputError(
            f"{len(flats)} parts of the model are quantized apart: quantize the whole model at once"
        )
    if not flats:
        return None
    first = flats[0].quantizers[0]
    moving = isinstance(first, AdaptiveWeight) and config.codebook_decay is not None
    if config.freeze_above is not None and moving and first.split_dead:
        raise InputError(
            "freeze_above holds weights at the number of their level, which changes where a dead "
            "level is split: leave out codebook_decay, or set split_dead=False"
        )
    return flats[0]
