"""The errors of training."""

from gemma_keras.errors import ModelError


class RowError(ModelError):
    """A row of training data cannot be used; the message names the row."""
