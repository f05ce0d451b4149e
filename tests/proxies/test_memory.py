"""Halving, and checkpoints that leave no trace of themselves."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adq.proxies.memory import checkpointing, in_halves
from adq.quant.errors import InputError

BATCH = (torch.arange(11), {"label": torch.arange(11) * 2})


def fits(most: int, error: RuntimeError | None = None) -> Any:
    def compute(batch: Any) -> list[int]:
        x, y = batch
        assert (y["label"] == 2 * x).all()
        if len(x) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return x.tolist()

    return compute


@pytest.mark.parametrize(
    ("most", "sizes"), [(11, [11]), (8, [6, 5]), (3, [3, 3, 3, 2]), (1, [1] * 11)]
)
def test_parts_are_halves_in_order(most: int, sizes: list[int]) -> None:
    said: list[str] = []
    found = list(in_halves(fits(most), BATCH, said.append))
    assert [len(part) for part in found] == sizes
    assert [i for part in found for i in part] == list(range(11))
    assert len(said) == len(sizes) - 1


def test_a_user_is_told_of_each_cut() -> None:
    said: list[str] = []
    list(in_halves(fits(3), BATCH, said.append))
    assert said == [
        "out of memory with 11 samples at once: going on with 6",
        "out of memory with 6 samples at once: going on with 3",
        "out of memory with 5 samples at once: going on with 3",
    ]


def test_an_allocation_that_fails_on_the_processor_counts_as_well() -> None:
    def compute(batch: Any) -> int:
        if len(batch[0]) > 3:
            torch.empty(2**50)  # no machine has that
        return len(batch[0])

    assert list(in_halves(compute, BATCH, lambda _: None)) == [3, 3, 3, 2]


@pytest.mark.parametrize(
    "text",
    [
        "MPS backend out of memory (MPS allocated: 1 GB)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_other_words_for_it(text: str) -> None:
    found = list(in_halves(fits(6, RuntimeError(text)), BATCH, lambda _: None))
    assert [len(part) for part in found] == [6, 5]


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        list(in_halves(fits(6, RuntimeError("size mismatch")), BATCH, lambda _: None))


def test_a_sample_that_does_not_fit_is_the_end() -> None:
    with pytest.raises(InputError, match=r"single sample .CUDA out of memory.*more memory"):
        list(in_halves(fits(0), BATCH, lambda _: None))


def test_results_need_not_be_held_together() -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def compute(batch: Any) -> Tensor:
        if len(batch[0]) > 2:
            raise torch.OutOfMemoryError
        assert not alive
        alive.add(result := torch.ones(1))
        return result

    parts = 0
    for part in in_halves(compute, BATCH, lambda _: None):
        assert len(alive) == 1
        parts += 1
        del part
    assert parts == 7


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.runs = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.runs += 1
        return x + scale * self.inner(x)


class Model(nn.Module):
    """Blocks in a list of lists, one of them twice, and one outside of any list."""

    def __init__(self) -> None:
        super().__init__()
        shared = Block()
        self.stages = nn.ModuleList([nn.ModuleList([shared, Block()]), nn.ModuleList([shared])])
        self.last = Block()

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage:
                x = block(x, scale=0.5)
        return self.last(x).square().mean()


def runs(model: Model) -> list[int]:
    return [model.stages[0][0].runs, model.stages[0][1].runs, model.last.runs]


def test_blocks_run_once_more_for_the_backward_pass() -> None:
    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(5, 3).double()
    plain = torch.autograd.grad(model(x), list(model.parameters()))
    assert runs(model) == [2, 1, 1]
    with checkpointing(model):
        saved = torch.autograd.grad(model(x), list(model.parameters()))
    assert runs(model) == [2 + 2 * 2, 1 + 2, 1 + 1]
    for a, b in zip(plain, saved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_blocks_own_forward_is_put_back_even_after_an_error() -> None:
    model, seen = Model().double(), []
    block = model.stages[0][1]
    kept = block.forward

    def mine(x: Tensor, **settings: Any) -> Tensor:
        seen.append(len(x))
        return kept(x, **settings)

    block.forward = mine

    def use() -> None:
        with checkpointing(model):
            assert block.forward is not mine
            model(torch.ones(4, 3).double())
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert block.forward is mine
    assert seen == [4]
    others = [m for m in model.modules() if m is not block]
    assert not any("forward" in vars(m) for m in others)
