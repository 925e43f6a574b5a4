"""Reads and writes tensors and Keras variables in chunks, so that none is in memory twice.

Chunks are float32 arrays; the tensors that they are written to have their own dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some neighbouring rows or columns of a variable.

    Attributes:
        array: float, of as many axes as the variable.
        axis: along which it is a part.
        first: where it begins on that axis.
    """

    array: np.ndarray
    axis: int = 0
    first: int = 0

    @property
    def where(self) -> tuple[slice, ...]:
        """The part of the variable that it is."""
        part = slice(self.first, self.first + self.array.shape[self.axis])
        return (*(slice(None),) * self.axis, part)


def variable_chunks(variable, chunk_bytes: int, axis: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """A live matrix in chunks of about `chunk_bytes`: where each begins on the axis, float32.

    Args:
        variable: a Keras variable or a tensor, of two axes.
        chunk_bytes: of a chunk in float32.
        axis: along which it is cut.
    """
    length, other = variable.shape[axis], variable.shape[1 - axis]
    step = max(1, chunk_bytes // (4 * other))
    for first in range(0, length, step):
        part = slice(first, first + step)
        chunk = variable[part] if axis == 0 else variable[:, part]
        yield first, ops.convert_to_numpy(ops.cast(chunk, "float32"))


def made(shape: tuple[int, ...], dtype: str, chunks: Iterator[Chunk]):
    """A tensor of a shape and a Keras dtype, of chunks that cover it."""
    backend = keras.config.backend()
    if backend == "jax":
        return _jax_made(shape, dtype, chunks)
    if backend == "tensorflow":
        return _tensorflow_made(shape, dtype, chunks)
    tensor = ops.zeros(shape, dtype)
    _torch_fill(tensor, chunks)
    return tensor


def fill(variable: keras.Variable, chunks: Iterator[Chunk]) -> None:
    """Give a variable other values, in place where the backend can.

    Args:
        variable: of one or more axes; with JAX it may be on several devices.
        chunks: they cover it.
    """
    backend = keras.config.backend()
    if backend == "torch":
        _torch_fill(variable.value, chunks)
    elif backend == "jax" and len(variable.value.sharding.device_set) > 1:
        variable.assign(_jax_sharded(variable, chunks))
    else:
        variable.assign(made(tuple(variable.shape), variable.dtype, chunks))


# --- JAX -----------------------------------------------------------------------------------------


def _jax_made(shape, dtype: str, chunks: Iterator[Chunk]):
    whole = ops.zeros(shape, dtype)
    for chunk in chunks:
        whole = _jax_put()(whole, chunk.array, chunk.first, axis=chunk.axis)
        whole.block_until_ready()  # or chunks would queue up
    return whole


def _jax_sharded(variable: keras.Variable, chunks: Iterator[Chunk]):
    """Makes an array with a variable's sharding; each device of this host gets only its part."""
    import jax

    shape, sharding = tuple(variable.shape), variable.value.sharding
    parts, bounds = {}, {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds[device] = [part.indices(n)[:2] for part, n in zip(index, shape, strict=True)]
        size = [end - begin for begin, end in bounds[device]]
        parts[device] = jax.numpy.zeros(size, variable.dtype, device=device)
    for chunk in chunks:
        for device in parts:
            inside, first = _within(chunk, bounds[device])
            if inside.size:
                inside = jax.device_put(inside, device)
                parts[device] = _jax_put()(parts[device], inside, first, axis=chunk.axis)
        jax.block_until_ready(list(parts.values()))
    return jax.make_array_from_single_device_arrays(shape, sharding, list(parts.values()))


def _within(chunk: Chunk, bounds: list[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Returns the part of a chunk within the bounds of each axis, and where it begins there."""
    begin, end = bounds[chunk.axis]
    part = [slice(*bound) for bound in bounds]
    part[chunk.axis] = slice(max(begin - chunk.first, 0), max(end - chunk.first, 0))
    return chunk.array[tuple(part)], max(chunk.first - begin, 0)


@functools.cache
def _jax_put():
    """A compiled function that writes a chunk into an array of floats, which is used up, in place.

    It works on integers, because with 16-bit floats XLA's CPU code would write the whole array each
    time.
    """
    import jax

    @functools.partial(jax.jit, donate_argnums=0, static_argnames="axis")
    def put(whole, chunk, first, axis):
        bits = f"uint{8 * whole.dtype.itemsize}"
        old, new = (
            jax.lax.bitcast_convert_type(x.astype(whole.dtype), bits) for x in (whole, chunk)
        )
        new = jax.lax.dynamic_update_slice_in_dim(old, new, first, axis)
        return jax.lax.bitcast_convert_type(new, whole.dtype)

    return put


# --- TensorFlow and PyTorch ----------------------------------------------------------------------


def _tensorflow_made(shape: tuple[int, ...], dtype: str, chunks: Iterator[Chunk]):
    """A tensor over memory that numpy has filled.

    A `tf.Variable` that a part has been assigned to is copied whenever it is read, and so is an
    array that TensorFlow is given.
    """
    import tensorflow as tf

    array = _aligned(shape, np.dtype(dtype))
    for chunk in chunks:
        with np.errstate(over="ignore"):  # infinite in float16, as with the other backends
            array[chunk.where] = chunk.array
    bits = array.view(f"uint{8 * array.itemsize}")  # numpy's DLPack knows no bfloat16
    tensor = tf.experimental.dlpack.from_dlpack(bits.__dlpack__())
    return tf.bitcast(tensor, dtype)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address that TensorFlow does not copy from."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)


def _torch_fill(tensor, chunks: Iterator[Chunk]) -> None:
    import torch

    with torch.no_grad():
        for chunk in chunks:
            tensor[chunk.where].copy_(ops.convert_to_tensor(chunk.array))
