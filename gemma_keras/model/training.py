"""Supports `fit`: saves and restores the training state, and warns when the loss is not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras

from gemma_keras.model.lora import note_lora

# JAX's default schedule on a CPU computes all blocks again at once.
FOR_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

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

    def make_train_function(self, force=False) -> None:
        """Like Keras; on a CPU JAX needs an option for gradient checkpointing."""
        options = train_options(self)
        if options is None or (self.train_function is not None and not force):
            return super().make_train_function(force)
        import jax

        step = jax.jit(self.train_step, donate_argnums=0, compiler_options=options)
        self.train_function = self._make_function(step)

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


def train_options(model: keras.Model) -> dict[str, Any] | None:
    """Returns JAX compiler options for training with gradient checkpointing on a CPU, where XLA's
    default schedule would recompute everything at once; `None` elsewhere."""
    if keras.config.backend() != "jax" or model.run_eagerly or not model.jit_compile:
        return None
    import jax

    spread = keras.distribution.distribution() is not None  # Keras then says where results lie
    if spread or jax.default_backend() != "cpu" or not model.backbone.gradient_checkpointing:
        return None
    return dict(FOR_MEMORY)


def anew(optimizer: Any) -> Any:
    """An optimizer of the same settings that has not learnt yet."""
    with warnings.catch_warnings():  # Keras reads its own learning rate in an old way
        warnings.simplefilter("ignore", DeprecationWarning)
        return type(optimizer).from_config(optimizer.get_config())


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
    are 0 without LoRA, and whether that is in use."""
    return [[bool(layer.trainable), *_lora_of(layer)] for layer in _layers_with_weights(model)]


def _lora_of(layer: Any) -> tuple[int, float, float, bool]:
    in_use = bool(getattr(layer, "lora_enabled", False))
    if not getattr(layer, "has_lora", in_use):
        return 0, 0.0, 0.0, False
    dropout = getattr(layer, "lora_dropout", 0.0)
    return int(layer.lora_rank), float(layer.lora_alpha), float(dropout), in_use


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
        if rank:  # of a model that was saved before no more is said
            dropout, in_use = more or (0.0, True)
            options = {"dropout": dropout} if dropout else {}
            layer.enable_lora(rank, lora_alpha=alpha, **options)
            layer.lora_enabled = in_use
    note_lora(model.backbone)


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
