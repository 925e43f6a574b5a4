"""What can be wrong with a model that somebody hands us, as one sentence each."""

import reprlib
from collections.abc import Sequence
from typing import Any

_LONGEST = 100  # characters of a value in a sentence


def quoted(value: Any) -> str:
    """A value from a file as it is told in an error: in Python's words, cut."""
    text = reprlib.repr(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def listed(names: Sequence[str]) -> str:
    """Names from a file as they are told in an error: the first few, cut, and how many more."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(name[:60] for name in names[:10]) + more


class ModelError(ValueError):
    """A checkpoint, a configuration or a weight cannot be used as it is."""


class ConfigError(ModelError):
    """The configuration describes something that is not a Gemma, or not consistently."""


class CheckpointError(ModelError):
    """A checkpoint file is missing, cut short, corrupt or of another format."""


class NotFiniteError(ModelError, ArithmeticError):
    """A model computes numbers that are not finite, so what it says means nothing."""
