"""Defines `GemmaDense`, a `Dense` with LoRA."""

from __future__ import annotations

import math
import random

import keras
from keras import ops, quantizers

from gemma_keras.model import grouped


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaDense(keras.layers.Dense):
    """A `Dense` that Keras can quantize, and that is saved with its LoRA weights as well as merged.

    Keras saves only the merged weights of a LoRA layer, and loads it with an adapter of zeros,
    which never learns. Keras also adds the product of the two LoRA matrices to the kernel for each
    run, so that training makes a gradient as large as the kernel. Here the input goes through both,
    as in PEFT, and through dropout first.

    Attributes:
        lora_dropout: the share of inputs of LoRA that training leaves out.
    """

    lora_dropout = 0.0

    LORA = ("lora_kernel_a", "lora_kernel_b")

    @property
    def has_lora(self) -> bool:
        """Whether it has the two matrices; `lora_enabled` says whether they are in use."""
        return getattr(self, "lora_kernel_a", None) is not None

    def quantize(self, mode=None, type_check=True, config=None) -> None:
        """Like `Dense.quantize`, which rejects subclasses unless `type_check` is false."""
        super().quantize(mode, type_check=False, config=config)

    def enable_lora(
        self, rank, lora_alpha=None, a_initializer="he_uniform", b_initializer="zeros", dropout=0.0
    ) -> None:
        """Like `Dense.enable_lora`, with dropout of what goes into LoRA."""
        super().enable_lora(rank, lora_alpha, a_initializer, b_initializer)
        self.lora_dropout = float(dropout)
        if dropout:
            self._tracker.unlock()
            # Without a number of its own it would follow PyTorch's state, which no variable holds.
            self._lora_seed = keras.random.SeedGenerator(random.randrange(1, 1 << 30))
            self._tracker.lock()

    def disable_lora(self) -> None:
        """Remove LoRA; the kernel is what it was before."""
        for name in self.LORA:  # `delattr` of Keras would collect garbage for each
            self._untrack_variable(getattr(self, name))
            object.__delattr__(self, name)
        if self.lora_dropout:
            self._tracker.unlock()
            self._seed_generators.remove(self._lora_seed)
            self._tracker.lock()
            del self._lora_seed
        self.lora_enabled, self.lora_rank, self.lora_alpha = False, None, None
        self.lora_dropout = 0.0
        if self.quantization_mode is None:
            self._kernel.trainable = True

    def call(self, inputs, training=None):
        if not self.lora_enabled:
            return super().call(inputs, training=training)
        return self._adapted(ops.matmul(inputs, self._kernel), inputs, training)

    def quantized_call(self, inputs, training=None):
        if training and self.quantization_mode in ("int8", "int4"):
            outputs = self._multiplied(inputs)
            return self._adapted(outputs, inputs, training) if self.lora_enabled else outputs
        if not (self.lora_enabled and self.lora_dropout):
            return super().quantized_call(inputs, training=training)
        self.lora_enabled = False
        try:
            outputs = super().quantized_call(inputs, training=training)
        finally:
            self.lora_enabled = True
        return self._adapted(outputs, inputs, training)

    def _multiplied(self, inputs):
        """The product with a kernel in integers; gradients make it float again.

        Keras keeps the float kernels of int4 for the gradients, in all layers. It multiplies int8
        as integers, for which a processor has no fast product of matrices.
        """
        arrays = [self._kernel, self.kernel_scale]
        if getattr(self, "kernel_zero", None) is not None:
            arrays += [self.kernel_zero, self.g_idx]

        def kernel_of(levels, scale, *groups):
            if self.quantization_mode == "int4":
                levels = quantizers.unpack_int4(levels, self._orig_output_dim, axis=-1)
            levels = ops.cast(levels, self.compute_dtype)
            if not groups:
                return levels, scale
            levels = grouped.values(levels, scale, *groups, axis=0)
            return levels, ops.ones((1,), levels.dtype)

        @ops.custom_gradient
        def multiplied(inputs, levels, *others):
            def gradients(*args, upstream=None):
                upstream = args[0] if upstream is None else upstream
                kernel, scale = kernel_of(_not_before(upstream, levels), *others)
                found = ops.matmul(upstream / scale, ops.transpose(kernel))
                return (ops.cast(found, inputs.dtype), *(None,) * (1 + len(others)))

            kernel, scale = kernel_of(_not_before(inputs, levels), *others)
            x = inputs
            if self.inputs_quantizer:
                x, of_input = self.inputs_quantizer(x, axis=-1)
                x, scale = ops.cast(x, kernel.dtype), scale * of_input
            return ops.cast(ops.matmul(x, kernel) / scale, self.compute_dtype), gradients

        return multiplied(ops.cast(inputs, self.compute_dtype), *map(ops.convert_to_tensor, arrays))

    def _adapted(self, outputs, inputs, training):
        """The outputs, plus what LoRA makes of the inputs."""
        if training and self.lora_dropout:
            inputs = keras.random.dropout(inputs, self.lora_dropout, seed=self._lora_seed)
        low = ops.matmul(ops.matmul(inputs, self.lora_kernel_a), self.lora_kernel_b)
        assert self.lora_rank and self.lora_alpha is not None
        # LoRA's matrices are float32, also beside weights of 16 bits
        return outputs + ops.cast(low * (self.lora_alpha / self.lora_rank), outputs.dtype)

    def save_own_variables(self, store) -> None:
        super().save_own_variables(store)
        if not self.built or not self.has_lora:
            return
        for name in self._unmerged():
            store[f"unmerged.{name}"] = getattr(self, f"_{name}" if name == "kernel" else name)
        for name in self.LORA:
            store[name] = getattr(self, name)

    def load_own_variables(self, store) -> None:
        names, in_use = list(store.keys()), self.lora_enabled
        self.lora_enabled = self.has_lora  # or Keras counts its matrices among the others
        super().load_own_variables({name: store[name] for name in names if name.isdigit()})
        self.lora_enabled = in_use
        if not self.has_lora or "lora_kernel_a" not in names:
            return
        for name in self._unmerged():
            variable = getattr(self, f"_{name}" if name == "kernel" else name)
            variable.assign(store[f"unmerged.{name}"])
        for name in self.LORA:
            getattr(self, name).assign(store[name])

    def _unmerged(self) -> list[str]:
        """Names of the variables that merging changes."""
        names = self.variable_serialization_spec[self.quantization_mode]
        return [name for name in names if name != "bias" and getattr(self, name, None) is not None]


def _not_before(this, array):
    """An array of integers that a compiler has when it has something else, and not before: it
    would make the float kernels of all layers at once, or keep them until their gradients."""
    if keras.config.backend() == "torch":
        return array
    first = this[(0,) * len(this.shape)]
    return array + ops.cast(ops.less(first, -math.inf), array.dtype)  # plus 0
