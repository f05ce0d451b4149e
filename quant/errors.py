"""Errors that a user can mend.

ValueError
└── InputError            a value, file or surrounding that does not fit; the message is one line
    ├── NonFiniteLossError   a loss became nan or infinite
    └── CheckpointError      a checkpoint is damaged; without it, the run starts anew
"""


class InputError(ValueError):
    """Something the user gave does not fit: what was expected, what came, what to do."""


class NonFiniteLossError(InputError):
    """A training or evaluation loss became nan or infinite."""


class CheckpointError(InputError):
    """A checkpoint is damaged: remove it, and the run starts anew."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device."""
    import torch  # kept out of modules that must be light

    # other devices than CUDA, and its libraries, have no class of their own
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
