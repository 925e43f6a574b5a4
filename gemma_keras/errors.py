"""What can be wrong with a model that somebody hands us, as one sentence each."""


class ModelError(ValueError):
    """A checkpoint, a configuration or a weight cannot be used as it is."""


class ConfigError(ModelError):
    """The configuration describes something that is not a Gemma, or not consistently."""


class CheckpointError(ModelError):
    """A checkpoint file is missing, cut short, corrupt or of another format."""


class NotFiniteError(ModelError, ArithmeticError):
    """A model computes numbers that are not finite, so what it says means nothing."""
