"""Reads the weights of Keras's quantized layers as floats or as a `QuantizedGrid`.

`model.quantize` (Keras 3.15) turns the kernel of a `Dense`, and the tables of a
`ReversibleEmbedding`, into packed integers with

* int8, and int4 without a block size: one scale for each output (for a table, each token), which
  divides;
* int4 in blocks: a scale and a zero point for each block of inputs, `(level - zero) * scale`;
* GPTQ: the same, the block of each input in `g_idx`, which need not be in order;
* AWQ: the same, and a factor for each input that divides afterwards.

In the forward pass of int8, and of a quantized head, Keras also rounds the activations to 8 bits,
with one scale for each token. This module reads only the weights. An exported model does not round
activations as Keras does.

Source: keras/src/layers/core/dense.py, embedding.py, reversible_embedding.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from gemma_keras.checkpoints.quantized_grid import QuantizedGrid


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A matrix or table of values `(level - zero) * scale / input_factor + correction`.

    Attributes:
        mode: what `quantize` was called with: `int8`, `int4`, `gptq` or `awq`.
        levels: uint8 `[rows, inputs]`, each below `2 ** bits`; a row is an output or a token.
        scales: float32 `[rows, groups]`.
        zero_points: int16 `[rows, groups]`.
        groups: of each input, int `[inputs]`.
        bits: of a level.
        input_factors: float32 `[inputs]`, AWQ's, or `None` where all are 1.
        correction: float32 `[rows, inputs]`, LoRA's, or `None`.
    """

    mode: str
    levels: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    groups: np.ndarray
    bits: int
    input_factors: np.ndarray | None = None
    correction: np.ndarray | None = None

    def values(self) -> np.ndarray:
        """Returns the dequantized values, float32 `[rows, inputs]`."""
        values = self.levels.astype(np.float32)
        values -= self.zero_points[:, self.groups]
        values *= self.scales[:, self.groups]
        if self.input_factors is not None:
            values /= self.input_factors
        if self.correction is not None:
            values += self.correction
        return values

    def grid(self) -> QuantizedGrid | None:
        """Returns the same as a grid with blocks of neighbouring inputs; `None` if that is
        impossible: with GPTQ that groups inputs by activation, AWQ's factors, or LoRA."""
        block_size = int((self.groups == 0).sum())
        if self.input_factors is not None or self.correction is not None or not block_size:
            return None
        if (self.groups != np.arange(len(self.groups)) // block_size).any():
            return None
        return QuantizedGrid(
            self.levels, self.scales, self.zero_points, None, self.bits, block_size
        )


def quantized_weight(layer: keras.layers.Layer, reverse: bool = False) -> QuantizedWeight | None:
    """Reads a layer's weight as Keras has quantized it, with LoRA as its correction.

    Args:
        layer: a `Dense` without a bias or a `ReversibleEmbedding`.
        reverse: whether to read the table of an untied head instead of the embedding.

    Returns:
        The weight with outputs or tokens as rows; `None` if the layer holds floats. It also holds
        floats with float8, which rounds in every forward pass, and with GPTQ and AWQ before
        calibration.
    """
    mode = layer.quantization_mode
    if mode in ("int8", "int4"):
        return _embedding(layer, reverse) if hasattr(layer, "embeddings") else _dense(layer)
    if mode in ("gptq", "awq") and getattr(layer, f"is_{mode}_calibrated"):
        return _calibrated(layer)
    return None


def _dense(layer: Any) -> QuantizedWeight:
    levels = _array(layer._kernel)  # [in, out], int4 in pairs along out
    if layer.quantization_mode == "int4":
        levels = _unpack(levels, 1, layer.units, signed=True)
    scales, zeros = _array(layer.kernel_scale), _optional(layer, "kernel_zero")
    if zeros is not None:  # [groups, out]
        scales, zeros = scales.T, zeros.T
    weight = _signed(layer, levels.T, scales, zeros)
    return dataclasses.replace(weight, correction=_lora(layer, "kernel", transposed=True))


def _embedding(layer: Any, reverse: bool) -> QuantizedWeight:
    int4 = layer.quantization_mode == "int4"
    name = "reverse_embeddings" if reverse else "embeddings"
    # The table is [tokens, width], the head [width, tokens]; int4 in pairs along the width.
    levels = _array(getattr(layer, name if reverse else "_embeddings"))
    scales, zeros = _array(getattr(layer, f"{name}_scale")), _optional(layer, f"{name}_zero")
    if reverse:
        levels, scales = levels.T, scales.T
        zeros = None if zeros is None else zeros.T
    if int4:
        levels = _unpack(levels, 1, layer.output_dim, signed=True)
    weight = _signed(layer, levels, scales, zeros)
    correction = None if reverse else _lora(layer, "embeddings", transposed=False)
    return dataclasses.replace(weight, correction=correction)


def _signed(
    layer: Any, levels: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None
) -> QuantizedWeight:
    """Makes it from levels around 0, int8 `[rows, inputs]`.

    Scales `[rows]` divide; scales `[rows, groups]`, which come with zero points, multiply.
    """
    mode = layer.quantization_mode
    bits = 8 if mode == "int8" else 4
    middle = 1 << (bits - 1)
    groups = np.zeros(levels.shape[1], np.int32)
    if zeros is None:
        scales = (1 / scales)[:, None]
        zeros = np.zeros(scales.shape, np.int16)
    else:
        groups = _array(layer.g_idx).astype(np.int32)
    return QuantizedWeight(
        mode,
        (levels.astype(np.int16) + middle).astype(np.uint8),
        scales,
        zeros.astype(np.int16) + np.int16(middle),
        groups,
        bits,
    )


def _calibrated(layer: Any) -> QuantizedWeight:
    levels = _array(layer.quantized_kernel)  # [out, in], 4 bits in pairs along out
    if len(levels) < layer.units:
        levels = _unpack(levels, 0, layer.units, signed=False)
    factors = None
    if layer.quantization_mode == "awq":
        factors = _array(layer.awq_scales)
        factors = None if (factors == 1).all() else factors
    return QuantizedWeight(
        layer.quantization_mode,
        levels,
        _array(layer.kernel_scale),
        _array(layer.kernel_zero).astype(np.int16),
        _array(layer.g_idx).astype(np.int32),
        int(layer.dtype_policy.weight_bits),
        factors,
        _lora(layer, "kernel", transposed=True),
    )


def _array(variable: Any) -> np.ndarray:
    """Converts a variable to numpy: integers unchanged, floats as float32."""
    if "float" in keras.backend.standardize_dtype(variable.dtype):
        variable = ops.cast(variable, "float32")
    return ops.convert_to_numpy(variable)


def _optional(layer: Any, name: str) -> np.ndarray | None:
    variable = getattr(layer, name, None)
    return None if variable is None else _array(variable)


def _unpack(packed: np.ndarray, axis: int, length: int, *, signed: bool) -> np.ndarray:
    """Two 4-bit integers a byte, the first in the low half, to the first `length` along an axis."""
    packed = packed.view(np.uint8)
    pairs = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=axis + 1)
    shape = list(packed.shape)
    shape[axis] *= 2
    levels = pairs.reshape(shape).take(range(length), axis=axis)
    # two's complement of 4 bits: 8 to 15 are -8 to -1
    return (levels ^ np.uint8(8)).astype(np.int8) - np.int8(8) if signed else levels


def _lora(layer: Any, name: str, *, transposed: bool) -> np.ndarray | None:
    """Returns the LoRA update, float32 `[rows, inputs]`; the product of a `Dense` is `[in,
    out]`."""
    if not layer.lora_enabled:
        return None
    product = _array(getattr(layer, f"lora_{name}_a")) @ _array(getattr(layer, f"lora_{name}_b"))
    product *= np.float32(layer.lora_alpha / layer.lora_rank)
    return product.T if transposed else product
