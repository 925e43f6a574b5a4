"""Supports `fit`: what is learnt and shown of a batch, the training state that is saved, and a
warning when the loss is not finite."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from gemma_keras.model.lora import note_lora
from gemma_keras.model.losses import NAMES, TokenLoss, TokenMetric, mean, sums_of_logits
from gemma_keras.model.token_loss import token_sums

if TYPE_CHECKING:
    _Task = keras.Model
else:
    _Task = object


class TrainsOn(_Task):
    """A task that resumes training after `save` and `keras.saving.load_model`, and warns if the
    loss is not finite."""

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        validation_data=None,
        validation_split=None,
        callbacks=None,
        **kwargs,
    ):
        """Like Keras's `fit`, on the inputs of the preprocessor.

        Warns:
            UserWarning: the loss is not finite, or weights that are trained are float16 or
                bfloat16, which lose small updates.
        """
        return super().fit(
            x,
            y,
            batch_size=batch_size,
            sample_weight=sample_weight,
            validation_data=validation_data,
            validation_split=validation_split,
            callbacks=_watched(self, callbacks),
            **kwargs,
        )

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the arguments of `compile` including the sampler, and which layers are trainable,
        LoRA included."""
        config = dict(super().get_compile_config())
        if not config:
            return config
        # The backend chooses again when the model is loaded.
        if config.get("jit_compile") == self._resolve_auto_jit_compile():
            config["jit_compile"] = "auto"
        if getattr(self, "sampler", None) is not None:
            config["sampler"] = keras.saving.serialize_keras_object(self.sampler)
        built = self.optimizer is not None and self.optimizer.built
        return config | {"layers": _layer_states(self), "optimizer_built": built}

    def compile_from_config(self, config: Mapping[str, Any]) -> None:
        """Train as before: with this optimizer and sampler, these layers, this LoRA."""
        config = dict(config)
        _restore_layer_states(self, config.pop("layers", []))
        built = config.pop("optimizer_built", True)
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and built:  # one that has never trained holds nothing
            self.optimizer.build(self.trainable_variables)


def fit_prepared(model: keras.Model, batches, callbacks=None, **options):
    """Keras's `fit` on batches that need no preprocessor, in their own order, with the warnings of
    `TrainsOn.fit`."""
    callbacks = _watched(model, callbacks)
    return keras.Model.fit(model, batches, callbacks=callbacks, shuffle=False, **options)


def _watched(model: keras.Model, callbacks):
    """The callbacks, and one that warns of the loss; warns of weights that cannot learn."""
    dtypes = {variable.dtype for variable in model.trainable_variables}
    narrow = next((dtype for dtype in ("float16", "bfloat16") if dtype in dtypes), None)
    if narrow is not None:
        warnings.warn(
            f"the weights are {narrow}, in which most weight updates are rounded to zero, or "
            f"overflow. To train, load the model with dtype='mixed_{narrow}', or use LoRA",
            stacklevel=3,
        )
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    given = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
    return [*(one for one in given if one is not None), WarnsOfLoss()]


def _layers_with_weights(model: keras.Model) -> list[keras.layers.Layer]:
    """Each layer below the task, in an order that its configuration decides."""
    return [layer for layer in model._flatten_layers(include_self=False) if layer.weights]


def _layer_states(model: keras.Model) -> list[list[Any]]:
    """Returns for each layer whether it is trainable, and its LoRA's rank, alpha and dropout, which
    are 0 without LoRA."""
    return [[bool(layer.trainable), *_lora_of(layer)] for layer in _layers_with_weights(model)]


def _lora_of(layer: Any) -> tuple[int, float, float]:
    if not getattr(layer, "lora_enabled", False):
        return 0, 0.0, 0.0
    dropout = getattr(layer, "lora_dropout", 0.0)
    return int(layer.lora_rank), float(layer.lora_alpha), float(dropout)


def _restore_layer_states(model: keras.Model, states: list[list[Any]]) -> None:
    layers = _layers_with_weights(model)
    if not any(state[1] for state in states) and all(state[0] for state in states):
        return
    if len(layers) != len(states):
        raise ValueError(
            f"the saved model has {len(states)} layers with weights, but this one has "
            f"{len(layers)}; load it with compile=False and compile it again"
        )
    for layer, (trainable, rank, alpha, *more) in zip(layers, states, strict=True):
        if layer.trainable != trainable:
            layer.trainable = trainable
        if rank:  # a model that was saved before has no dropout
            options = {"dropout": more[0]} if more and more[0] else {}
            layer.enable_lora(rank, lora_alpha=alpha, **options)
    note_lora(model.backbone)


class LearnsTokens(TrainsOn):
    """A task with a `backbone` that learns to predict the next token.

    Compiled with `TokenLoss`, it shows nats per token that counts, and makes logits for a few
    tokens at a time: within a step `y_pred` is the normed hidden states. With metrics of the user's
    own, which need logits, it makes all.
    """

    _in_step = False
    _needs_logits = False
    _token_metrics: tuple[TokenMetric, ...] = ()

    def compile(self, optimizer="auto", loss="auto", *, weighted_metrics="auto", **kwargs) -> None:
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
        weights = ops.ones(ops.shape(y)) if sample_weight is None else sample_weight
        weights = ops.convert_to_tensor(weights, dtype="float32")
        if len(weights.shape) < len(y.shape):  # one of a row
            weights = ops.expand_dims(weights, -1) * ops.ones(ops.shape(y))
        if self._in_step:
            embedding = self.backbone.token_embedding
            sums = token_sums(embedding, y_pred, y, weights, bool(training))
        else:
            sums = sums_of_logits(y_pred, y, weights)
        for metric in self._token_metrics:
            metric.add(sums)
        # those of regularizers
        return sum((self._aggregate_additional_loss(more) for more in self.losses), mean(sums))


class WarnsOfLoss(keras.callbacks.Callback):
    """Warns once if the training loss is not finite, because the model then no longer learns.

    Training continues, as in Keras; `keras.callbacks.TerminateOnNaN` ends it.
    """

    async_safe = True  # as Keras calls what need not be waited for

    def __init__(self) -> None:
        super().__init__()
        self._warned = False

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        loss = (logs or {}).get("loss")
        if self._warned or loss is None or math.isfinite(float(loss)):
            return
        self._warned = True
        policy = self.model.dtype_policy.name
        wider = "" if policy == "float32" else f", or in float32 (the policy now is {policy})"
        warnings.warn(
            f"the loss is {float(loss)} from batch {batch} on, and the weights may be "
            "damaged. Load the model again and train with a lower learning rate or clipped "
            f"gradients{wider}. keras.callbacks.TerminateOnNaN() stops a training in this "
            "case",
            stacklevel=2,
        )
