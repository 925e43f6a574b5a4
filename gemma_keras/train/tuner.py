"""What the ways to teach a task have in common whose loss is not the text's own."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from gemma_keras.causal_lm import GemmaCausalLM
from gemma_keras.generate.compiled import train_options
from gemma_keras.learning import LearnsTokens
from gemma_keras.model.losses import TokenMetric

_LEARNING_RATE = 2e-5  # KerasHub's


class Tuner(LearnsTokens, keras.Model):
    """A model around a task, which is compiled and fitted in its place and changes its weights.

    Args:
        task: a `GemmaCausalLM` with a preprocessor; what of it is trainable is trained.

    Raises:
        ValueError: it has no preprocessor.
    """

    shown: tuple[str, ...] = ()  # beside the loss

    def __init__(self, task: GemmaCausalLM, **kwargs) -> None:
        super().__init__(**kwargs)
        if task.preprocessor is None:
            raise ValueError("the model has no preprocessor, and rows cannot be read without one")
        self.task = task
        self.built = True  # the layers are

    def compile(self, optimizer="auto", **kwargs) -> None:
        """Like Keras; the optimizer is Adam with a learning rate of 2e-5 by default."""
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = keras.optimizers.Adam(_LEARNING_RATE)
        super().compile(optimizer=optimizer, weighted_metrics=None, **kwargs)
        made = {name: TokenMetric(name) for name in ("loss", *self.shown)}
        self._note(loss_tracker=made["loss"], token_metrics=tuple(made.values()))

    @property
    def metrics(self) -> list[Any]:
        """Those of Keras, and what is shown beside the loss."""
        return [*super().metrics, *self._token_metrics[1:]]

    @property
    def backbone(self):
        """The task's."""
        return self.task.backbone

    @property
    def preprocessor(self):
        """The task's."""
        return self.task.preprocessor

    @property
    def turns(self):
        """The task's turn template."""
        return self.task.turns

    def make_train_function(self, force=False) -> None:
        """Like Keras; on a CPU JAX needs an option for gradient checkpointing."""
        options = train_options(self)
        if options is None or (self.train_function is not None and not force):
            return super().make_train_function(force)
        import jax

        step = jax.jit(self.train_step, donate_argnums=0, compiler_options=options)
        self.train_function = self._make_function(step)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As PyTorch has it. Keras knows parameters by their paths, which a task and its teacher
        share, and would leave the task's as they are."""
        for variable in self.task.trainable_variables:
            variable.value.grad = None

    def _check_that_it_learns(self) -> None:
        if not self._token_metrics:
            raise ValueError("call compile first")
        self.task._check_that_it_learns()

    def _show(self, **sums: Any) -> None:
        """Add sums of a batch to what is shown."""
        for metric in self._token_metrics:
            metric.add(sums[metric.name])


def token_weights(targets, sample_weight):
    """Weights of tokens as float32, all 1 if there are none."""
    weights = ops.ones(ops.shape(targets)) if sample_weight is None else sample_weight
    return ops.cast(weights, "float32")
