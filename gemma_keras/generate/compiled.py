"""Compiles functions that read a model's variables, on every Keras backend.

JAX and TensorFlow compile a whole function with XLA. PyTorch runs as it goes, and Keras's layers
then cost as much time as a token's mathematics; there `recorded` keeps the operations of a part of
the function, and runs them again without the layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from gemma_keras.model.training import FOR_MEMORY

_IN_THE_LOOP = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,"
    "while-loop-expensive-invariant-code-motion"
}
_MOST_COPIED = 2 << 30  # bytes of float32 copies of weights that may be kept during a loop


def compiled(
    model: keras.Model,
    function: Callable[..., Any],
    seeds: Callable[[], Sequence[keras.Variable]],
    uses_up_first: bool = False,
) -> Callable[..., Any]:
    """A function that reads a model's variables, compiled once for each shape and each option.

    Args:
        model: whose variables it reads.
        function: takes tensors by position and options by name, and returns tensors; may change
            variables of `seeds`.
        seeds: variables of random number generators that it may advance.
        uses_up_first: whether it returns its first argument changed, which then is changed in
            place where the backend can, and not to be used again.

    Returns:
        A function of the same arguments, arrays or tensors.
    """
    backend = keras.config.backend()
    if backend == "torch":
        run = _torch(function)
    elif model.run_eagerly:
        run = function
    elif backend == "jax":
        run = _jax(model, function, seeds, uses_up_first)
    else:
        run = _tensorflow(model, function)

    def call(*tensors, **options):
        return run(*tree.map_structure(_placed, tensors), **options)

    return call


def _placed(array):
    """A tensor; of an array of rows, each device has those that the distribution gives it."""
    tensor = ops.convert_to_tensor(array)
    distribution = keras.distribution.distribution()
    if distribution is None or not isinstance(array, np.ndarray) or array.ndim == 0:
        return tensor
    layout = distribution.get_data_layout(array.shape)
    return keras.distribution.distribute_tensor(tensor, layout) if layout else tensor


def recorded(model: keras.Model, function: Callable[..., Any]) -> Callable[..., Any]:
    """With PyTorch, a function whose operations are recorded once for each shape; else itself.

    Args:
        model: whose variables it reads.
        function: takes tensors, and does the same operations for all values: no random numbers, no
            branches.
    """
    if keras.config.backend() != "torch" or model.run_eagerly:
        return function
    recordings: dict[Any, Callable[..., Any]] = {}

    def call(*tensors):
        flat = tree.flatten(tensors)
        kinds = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in flat)
        if kinds not in recordings:
            recordings[kinds] = _recording(function, tensors)
        return recordings[kinds](*flat)

    return call


def _recording(function, tensors):
    """A function of the flat tensors that does what `function` does with those."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from gemma_keras.generate.torch_graph import simplified

    structure = []

    def flat_function(*flat):
        result = function(*tree.pack_sequence_as(tensors, flat))
        structure.append(tree.map_structure(lambda _: 0, result))
        return tree.flatten(result)

    run = simplified(make_fx(flat_function)(*tree.flatten(tensors)))
    return lambda *flat: tree.pack_sequence_as(structure[0], run(*flat))


def _torch(function):
    import torch

    return torch.inference_mode()(function)


def _tensorflow(model, function):
    import tensorflow as tf

    return tf.function(function, jit_compile=bool(model.jit_compile))


def _cpu_options(model: keras.Model) -> dict[str, Any] | None:
    """Returns XLA options for a CPU, which multiplies 16-bit floats as float32; else `None`.

    By default it makes float32 copies of all weights at once, and before a loop over tokens.
    Scheduled for memory there is one at a time, which is faster too; a copy a token instead of one
    before the loop takes half as much time again, and is for models whose copies are large.
    """
    copied = sum(
        4 * math.prod(variable.shape)
        for variable in model.variables
        if variable.dtype in ("bfloat16", "float16")
    )
    if not copied:
        return None
    return FOR_MEMORY | (_IN_THE_LOOP if copied > _MOST_COPIED else {})


def _jax(model, function, seeds, uses_up_first):
    import jax

    @functools.partial(
        jax.jit,
        static_argnums=4,
        donate_argnums=(0,) if uses_up_first else (),
        compiler_options=_cpu_options(model) if jax.default_backend() == "cpu" else None,
    )
    def run(first, others, state, seed_state, options):
        variables = [*model.trainable_variables, *model.non_trainable_variables, *seeds()]
        mapping = zip(variables, [*state, *seed_state], strict=True)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            result = function(first, *others, **dict(options))
        return result, [scope.get_current_value(seed) for seed in seeds()]

    def call(first, *others, **options):
        state = [v.value for v in [*model.trainable_variables, *model.non_trainable_variables]]
        seed_state = [seed.value for seed in seeds()]
        result, seed_state = run(first, others, state, seed_state, tuple(sorted(options.items())))
        for seed, value in zip(seeds(), seed_state, strict=True):
            seed.assign(value)
        return result

    return call
