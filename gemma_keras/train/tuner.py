"""What the ways to teach a task have in common whose loss is not the text's own."""

from __future__ import annotations

import numbers
from typing import Any

import keras

from gemma_keras.causal_lm import GemmaCausalLM
from gemma_keras.learning import LearnsTokens
from gemma_keras.model.losses import TokenMetric
from gemma_keras.model.training import anew

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
        check_is_task(task, "the model to tune")
        if task.preprocessor is None:
            raise ValueError("the model has no preprocessor, and rows cannot be read without one")
        self.task = task
        self.built = True  # the layers are
        self._note(seen=None, has_trained=False)

    def compile(
        self, optimizer="auto", loss="auto", *, weighted_metrics: Any = "auto", **kwargs
    ) -> None:
        """Like Keras; the optimizer is Adam with a learning rate of 2e-5 by default.

        Raises:
            ValueError: a loss or metrics are given; it has its own.
        """
        given = {"loss": loss, "weighted_metrics": weighted_metrics, **kwargs}
        for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            if given.get(name, "auto") not in ("auto", None):
                raise ValueError(f"a {type(self).__name__} has its own {name}; leave that out")
            kwargs.pop(name, None)
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = keras.optimizers.Adam(_LEARNING_RATE)
        shown = [TokenMetric(name) for name in self.shown]
        super().compile(optimizer=optimizer, weighted_metrics=shown, **kwargs)
        # They are of no output. Keras would look for the one that each is of.
        self._compile_metrics.build(0, 0)

    def save(self, *args, **kwargs) -> None:
        """Save the task, which is all that has learnt; arguments as of its `save`."""
        self.task.save(*args, **kwargs)

    def save_weights(self, *args, **kwargs) -> None:
        """Save the task's weights; arguments as of its `save_weights`."""
        self.task.save_weights(*args, **kwargs)

    def load_weights(self, *args, **kwargs) -> None:
        """Load the task's weights; arguments as of its `load_weights`."""
        self.task.load_weights(*args, **kwargs)

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
        """Like Keras; a model that is asked for it is going to change."""
        self._note(has_trained=True)
        super().make_train_function(force)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As PyTorch has it. Keras knows parameters by their paths, which a task and its teacher
        share, and would leave the task's as they are."""
        for variable in self.task.trainable_variables:
            variable.value.grad = None

    def _begin(self, training: bool) -> None:
        if not self._token_metrics:
            raise ValueError("call compile first")
        self._follow()
        super()._begin(training)

    def _follow(self) -> None:
        """Compile again what has the task's adapters in it, if these have changed."""
        trained = [id(variable) for variable in self.task.trainable_variables]
        all_of_task = [id(variable) for variable in self.task.variables]
        now = (self.task._adapter_changes, trained, all_of_task)
        before: Any = self._seen
        optimizer = self.optimizer
        self._note(seen=now)
        if before is None or before == now:
            return
        self.train_function = self.test_function = self.predict_function = None
        if before[1] != trained:
            self.optimizer = anew(optimizer)

    def _check_that_it_learns(self) -> None:
        self.task._check_that_it_learns()
        if not self.task.trainable_variables:
            raise ValueError("all weights of the model are frozen, so that nothing can learn")

    def _learns(self) -> dict[str, Any]:
        return super()._learns() | {"another LoRA": self.task._lora_settings()}

    def _show(self, **sums: Any) -> None:
        """Add sums of a batch to what is shown."""
        for metric in self._token_metrics:
            metric.add(sums[metric.name])


def check_is_task(value: Any, what: str) -> None:
    """Raise `ValueError` for what is no `GemmaCausalLM`."""
    if not isinstance(value, GemmaCausalLM):
        raise ValueError(f"{what} must be a GemmaCausalLM, not {type(value).__name__}")


def is_number(value: Any) -> bool:
    """Whether it is one number, of Python or numpy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
