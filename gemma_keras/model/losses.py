"""Cross-entropy of the next token in nats per token that counts: the loss, and what `fit` shows."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
from keras import ops

_PERPLEXITY, _ACCURACY = "perplexity", "sparse_categorical_accuracy"
NAMES = (_PERPLEXITY, _ACCURACY)  # what is shown beside the loss
_BETTER_IF_GREATER = (_ACCURACY, "preference_accuracy", "reward_margin", "chosen_reward")


class Sums(NamedTuple):
    """What a batch adds up to; float32 scalars.

    Attributes:
        weighted: cross-entropy in nats times weight; alone in having gradients.
        total: cross-entropy of tokens that count.
        correct: tokens that count whose logit is the greatest.
        count: tokens that count: those whose weight is not 0.
    """

    weighted: Any
    total: Any
    correct: Any
    count: Any


@keras.saving.register_keras_serializable(package="gemma_keras")
class TokenLoss(keras.losses.Loss):
    """Cross-entropy in nats per token that counts: the sum of loss times weight, over the number of
    tokens whose weight is not 0. Padding is in neither.

    `y_true` is int `(batch, length)`, `y_pred` logits, float `(batch, length, vocabulary_size)`.
    """

    def __init__(self, name: str = "token_loss", **kwargs) -> None:
        super().__init__(name=name, **kwargs)

    def __call__(self, y_true, y_pred, sample_weight=None):
        return mean(sums_of_logits(y_pred, y_true, token_weights(y_true, sample_weight)))


@keras.saving.register_keras_serializable(package="gemma_keras")
class TokenMetric(keras.metrics.Metric):
    """Something of all tokens that count since the epoch began, whatever batches they came in.

    Args:
        name: `loss`, in nats per token; its `perplexity`; `sparse_categorical_accuracy`; or the
            name of another mean.
    """

    def __init__(self, name: str = "loss", **kwargs) -> None:
        super().__init__(name=name, **kwargs)
        self._direction = "up" if name in _BETTER_IF_GREATER else "down"  # as callbacks ask for it
        self._total = self.add_variable((), "zeros", name="total")
        self._count = self.add_variable((), "zeros", name="count")

    def update_state(self, *args, **kwargs) -> None:
        """Does nothing: a trainer says a batch's mean, and not of how many tokens it is."""

    def add(self, sums: Sums) -> None:
        """Add a batch."""
        total = sums.correct if self.name == _ACCURACY else sums.total
        self._total.assign(self._total + total)
        self._count.assign(self._count + sums.count)

    def result(self):
        found = self._total / ops.maximum(self._count, 1.0)
        return ops.exp(found) if self.name == _PERPLEXITY else found


def mean(sums: Sums):
    """The loss of a batch, to be differentiated."""
    return sums.weighted / ops.maximum(sums.count, 1.0)


def sums_of_logits(logits, targets, weights) -> Sums:
    """The sums of logits that are there already.

    Args:
        logits: float `(..., vocabulary_size)`.
        targets: int `(...)`, the correct tokens.
        weights: float32 `(...)`.
    """
    logits, weights = ops.cast(logits, "float32"), ops.cast(weights, "float32")
    losses, chosen = token_losses(logits, targets)
    counts = ops.cast(ops.not_equal(weights, 0), "float32")
    # What does not count may be anything, also not finite.
    losses = ops.where(counts > 0, losses, 0.0)
    correct = ops.cast(chosen >= ops.max(logits, axis=-1), "float32") * counts
    return Sums(
        ops.sum(losses * weights),
        ops.stop_gradient(ops.sum(losses)),
        ops.stop_gradient(ops.sum(correct)),
        ops.sum(counts),
    )


def token_losses(logits, targets):
    """Cross-entropy of each token, in nats, and the logit of the correct one.

    Args:
        logits: float32 `(..., vocabulary_size)`.
        targets: int `(...)`.

    Returns:
        Two float32 `(...)`.
    """
    indices = ops.expand_dims(ops.cast(targets, "int32"), -1)
    chosen = ops.squeeze(ops.take_along_axis(logits, indices, axis=-1), -1)
    return ops.logsumexp(logits, axis=-1) - chosen, chosen


def token_weights(targets, sample_weight):
    """A weight for each token, as Keras is given them: for each, one of a row, or none, which is 1.

    Args:
        targets: int `(batch, length)`.
        sample_weight: `(batch, length)`, `(batch,)` or `None`.

    Returns:
        float32, as `targets`.
    """
    weights = ops.ones(ops.shape(targets)) if sample_weight is None else sample_weight
    weights = ops.convert_to_tensor(weights, dtype="float32")
    if len(weights.shape) < len(targets.shape):
        weights = ops.expand_dims(weights, -1) * ops.ones(ops.shape(targets))
    return weights


class Wanted(NamedTuple):
    """Which gradients are made with the value: of hidden states, and of the table."""

    hidden: bool
    table: bool
