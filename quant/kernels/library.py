"""The library `adq::` that the operators of this package are registered in.

The registrations are those of `torch.library.Library`. `torch.library.custom_op` says the same in
fewer lines, but looks at every argument again in each call: a tenth of the time that a quantizer of
a thousand values takes on a CPU.
"""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("adq", "FRAGMENT")


def register(
    schema: str,
    cpu: Callable[..., Any],
    gpu: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
) -> Any:
    """The new operator of this schema.

    `cpu` serves every device but CUDA (and ROCm), which `gpu` serves; `fake` gives the results'
    shapes to tracers; `autograd` is what a tensor that needs gradients meets first.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, cpu, "CompositeExplicitAutograd")
    LIBRARY.impl(name, gpu, "CUDA")
    if autograd is not None:
        LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"adq::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.adq, name).default
