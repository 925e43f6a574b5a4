"""The errors of `gemma_keras`; each message says what is wrong with a model and what to do."""

import reprlib
from collections.abc import Sequence
from typing import Any

_LONGEST = 100  # characters of a value in a sentence


def quoted(value: Any) -> str:
    """Formats a value from a file for an error message: its Python representation, shortened."""
    text = reprlib.repr(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def listed(names: Sequence[str]) -> str:
    """Formats names from a file for an error message: the first few, shortened, and the number of
    others."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(name[:60] for name in names[:10]) + more


class ModelError(ValueError):
    """A checkpoint, a configuration or a weight cannot be used."""


class ConfigError(ModelError):
    """The configuration does not describe a Gemma, or is inconsistent."""


class CheckpointError(ModelError):
    """A checkpoint file is missing, truncated, corrupt or in another format."""


class NotFiniteError(ModelError, ArithmeticError):
    """A model computes values that are not finite, so its output is meaningless."""
