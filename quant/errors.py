"""Errors that a user can mend.

ValueError
└── InputError            a value, file or surrounding that does not fit; the message is one line
    └── NonFiniteLossError   a loss became nan or infinite
"""


class InputError(ValueError):
    """Something the user gave does not fit: what was expected, what came, what to do."""


class NonFiniteLossError(InputError):
    """A training or evaluation loss became nan or infinite."""
