"""What a task learns of tokens: its loss, `fit` and `evaluate` on rows, and what they show."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from gemma_keras.model.losses import (
    NAMES,
    TokenLoss,
    TokenMetric,
    mean,
    sums_of_logits,
    token_weights,
)
from gemma_keras.model.token_loss import token_sums
from gemma_keras.model.training import TrainsOn


class LearnsTokens(TrainsOn):
    """A task with a `backbone` that learns to predict the next token.

    Compiled with `TokenLoss`, it shows nats per token that counts, and makes logits for a few
    tokens at a time: within a step `y_pred` is the normed hidden states. With metrics of the user's
    own, which need logits, it makes all.
    """

    _learns_pairs = False  # rows that prefer an answer to another
    _in_step = False
    _needs_logits = False
    _token_metrics: tuple[TokenMetric, ...] = ()

    def compile(
        self, optimizer="auto", loss="auto", *, weighted_metrics: Any = "auto", **kwargs
    ) -> None:
        """Like `keras_hub.models.CausalLM.compile`, but the loss is `TokenLoss`, and its perplexity
        is shown too."""
        if isinstance(loss, str) and loss == "auto":
            loss = TokenLoss()
        counts = type(loss) is TokenLoss  # one that is derived may count otherwise
        if counts and isinstance(weighted_metrics, str) and weighted_metrics == "auto":
            weighted_metrics = [TokenMetric(name) for name in NAMES]
        if counts and kwargs.get("loss_weights") is not None:
            raise ValueError("loss_weights is for several losses; scale the learning rate instead")
        # Keras would keep what it was compiled with before.
        for name in ("_compile_metrics", "_compile_loss", "loss"):
            object.__setattr__(self, name, None)
        super().compile(optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, **kwargs)
        if not counts:
            return self._note(token_metrics=(), needs_logits=True)
        shown = keras.tree.flatten([weighted_metrics, kwargs.get("metrics")])
        tracker, own = TokenMetric("loss"), [m for m in shown if isinstance(m, TokenMetric)]
        others = [m for m in shown if m is not None and not isinstance(m, TokenMetric)]
        self._note(token_metrics=(tracker, *own), needs_logits=bool(others), loss_tracker=tracker)
        self._compile_loss.built = True  # or Keras would run the model once more to build it

    def _note(self, **values: Any) -> None:
        """Set attributes that Keras shall neither list among its metrics twice nor save."""
        for name, value in values.items():
            object.__setattr__(self, f"_{name}", value)

    def call(self, inputs, training=None, mask=None):
        """Returns logits; within a step that needs none of them whole, normed hidden states."""
        if self._in_step:
            return self.backbone(inputs, training=training)
        return super().call(inputs, training=training, mask=mask)

    def train_step(self, *args):
        with self._step():
            return super().train_step(*args)

    def test_step(self, *args):
        with self._step():
            return super().test_step(*args)

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        validation_data=None,
        validation_split=None,
        callbacks=None,
        *,
        pack=False,
        on_too_long="truncate",
        checkpoint_dir=None,
        checkpoint_every=100,
        **kwargs,
    ):
        """Teach the model. What it prints is nats per token that counts, and their perplexity.

        Rows are texts or mappings, as `gemma_keras.train.rows` lists them: `{"messages": ...}`,
        `{"prompt", "completion"}`, `{"prompts", "responses"}` or `{"text"}`. Of a text the model
        learns all, of a prompt and its completion the completion. Of a conversation it learns its
        answers and the end of each turn. Conversations are written in the template of `chat`.

        All rows are read before training starts. A generator, and what else has no length, is read
        as far as `steps_per_epoch` goes, if that is given.

        Args:
            x: rows: a list, a mapping of columns, the path of a JSONL file, a dataset, a generator.
                Or what Keras's `fit` takes: arrays, or a `tf.data.Dataset` of texts.
            y: targets, if `x` is arrays.
            batch_size: rows of a batch.
            sample_weight: of `y`, 0 where a token does not count.
            validation_data: like `x`; or arrays `(x, y, sample_weight)`.
            validation_split: the part of the rows, the last of them, to validate on.
            callbacks: as for Keras.
            pack: whether a row of the model's input may hold several examples, which do not see
                each other. So little is padding.
            on_too_long: what becomes of a row with more tokens than the preprocessor's
                `sequence_length`: `"error"`, `"truncate"` to its beginning, or `"skip"`. What was
                cut or skipped is printed before training starts.
            checkpoint_dir: a folder for the state of the training: what is trained, the optimizer,
                seeds, and the place in the rows. If it holds one, training goes on from there.
            checkpoint_every: batches from one checkpoint to the next. The last two are kept.
            **kwargs: as for Keras, such as `epochs`.

        Raises:
            RowError: a row cannot be used, or none is left; the message names it.
            OSError: the file cannot be read.
            CheckpointError: `checkpoint_dir` cannot be written or read, is of another training, or
                another process trains in it.
            ValueError: an option does not fit what `x` is, or nothing can learn, since LoRA is
                merged or not in use.
            MemoryError: a step needs far more memory than is free; says what would take less.

        Warns:
            UserWarning: the loss is not finite, or weights that are trained are float16 or
                bfloat16, which lose small updates.
        """
        from gemma_keras.train.fit import fit

        self._begin(training=True)
        return fit(
            self,
            super().fit,
            x,
            batch_size,
            validation_data,
            validation_split,
            pack,
            on_too_long,
            checkpoint_dir,
            checkpoint_every,
            y=y,
            sample_weight=sample_weight,
            callbacks=callbacks,
            **kwargs,
        )

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        *,
        pack=False,
        on_too_long="truncate",
        **kwargs,
    ):
        """Measure the loss, its perplexity and the accuracy on what `fit` takes.

        Args:
            x: rows, arrays or a dataset, as for `fit`.
            y: targets, if `x` is arrays.
            batch_size: rows of a batch.
            sample_weight: of `y`, 0 where a token does not count.
            pack: as for `fit`.
            on_too_long: as for `fit`.
            **kwargs: as for Keras, such as `return_dict`.

        Raises:
            RowError, OSError, ValueError: as `fit`.
        """
        if kwargs.get("_use_cached_eval_dataset"):  # what `fit` validates on
            return super().evaluate(x, y, batch_size, sample_weight, **kwargs)
        self._begin(training=False)
        from gemma_keras.train.fit import evaluate

        return evaluate(
            self,
            super().evaluate,
            functools.partial(keras.Model.evaluate, self),
            x,
            batch_size,
            pack,
            on_too_long,
            y=y,
            sample_weight=sample_weight,
            **kwargs,
        )

    def _begin(self, training: bool) -> None:
        """Get ready for `fit` or `evaluate`, or say why that cannot be."""
        if training:
            self._check_that_it_learns()

    def _check_that_it_learns(self) -> None:
        """Raise `ValueError` if no weight could change."""

    def _learns(self) -> dict[str, Any]:
        """What makes an update, by name; a training that goes on must have the same."""
        optimizer: Any = self.optimizer
        return {
            "another optimizer": [type(optimizer).__name__, _settings(optimizer.get_config())],
            "another dtype": self.backbone.dtype_policy.name,
            "other steps_per_execution": self.steps_per_execution,
        }

    def _with_targets(self, examples: Sequence[Any], show: bool = False) -> list[Any]:
        """Examples of rows, with what else is to be learnt of their tokens; `show` allows to print
        how far that is."""
        return list(examples)

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        self._note(in_step=not self._needs_logits)
        try:
            yield
        finally:
            self._note(in_step=False)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not self._token_metrics or y is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        weights = token_weights(y, sample_weight)
        if self._in_step:
            embedding = self.backbone.token_embedding
            sums = token_sums(embedding, y_pred, y, weights, bool(training))
        else:
            sums = sums_of_logits(y_pred, y, weights)
        for metric in self._token_metrics:
            metric.add(sums)
        return self._with_regularizers(mean(sums))

    def _with_regularizers(self, loss):
        """A loss, and those that layers add."""
        return sum((self._aggregate_additional_loss(more) for more in self.losses), loss)


def _settings(config: Any) -> Any:
    """An optimizer's configuration, without its name, and without a rate that callbacks change."""
    if not isinstance(config, Mapping):
        return config
    left_out = {"name"}
    if not isinstance(config.get("learning_rate"), Mapping):
        left_out.add("learning_rate")
    return {key: _settings(value) for key, value in config.items() if key not in left_out}
