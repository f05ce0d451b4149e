"""Staying within memory: smaller batches after an out-of-memory error, activation checkpoints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adq.quant.batches import Batch, batch_size, micro_batches
from adq.quant.errors import InputError, out_of_memory

T = TypeVar("T")


def in_halves(
    compute: Callable[[Batch], T], batch: Batch, say: Callable[[str], None]
) -> Iterator[T]:
    """`compute` on the batch, or on halves of it, and so on, where memory runs out.

    One result at a time: large ones need not be held together. Raises InputError when a single
    sample does not fit.
    """
    n = batch_size(batch)
    try:
        result = compute(batch)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        if n == 1:
            raise InputError(
                f"out of memory with a single sample ({' '.join(str(error).split())[:120]}); "
                "measure on a device with more memory (the hessian proxy takes less with "
                "--gradient-checkpoints on)"
            ) from None
    else:
        yield result
        return
    # outside the handler: the error's traceback holds on to what filled the memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(f"out of memory with {n} samples at once: going on with {(n + 1) // 2}")
    for part in micro_batches([batch], (n + 1) // 2):
        yield from in_halves(compute, part, say)


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Keep, for the backward pass, what enters the model's blocks, and compute the rest again
    (Chen et al., arXiv 1604.06174). Gradients of gradients work as well.

    A block is an outermost child of an nn.Sequential or nn.ModuleList that has modules of its own
    (and is not a mere list).
    """
    blocks = dict.fromkeys(  # each once, in whatever places it stands
        child
        for container in model.modules()
        if isinstance(container, nn.Sequential | nn.ModuleList)
        for child in container
        if next(child.children(), None) is not None and not isinstance(child, nn.ModuleList)
    )
    inside = {inner for block in blocks for inner in block.modules() if inner is not block}
    outermost = [block for block in blocks if block not in inside]
    own = {block: vars(block)["forward"] for block in outermost if "forward" in vars(block)}
    try:
        for block in outermost:
            run: Any = partial(checkpoint, block.forward, use_reentrant=False)
            block.forward = run
        yield
    finally:
        for block in outermost:
            vars(block).pop("forward", None)
        for block, before in own.items():
            block.forward = before
