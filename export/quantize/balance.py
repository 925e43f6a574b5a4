"""Moving the unevenness of activations into the weights, exactly, before both are rounded.

onnxruntime rounds the activations of a quantized matrix product to 8 bits too, with one scale for
each block of input channels; one large channel costs its whole block precision. Dividing channel
j by `s_j` and multiplying row j of the matrix by it changes nothing in exact arithmetic, and the
division costs nothing where something linear stands before it: the norm's factors, the value
projection, the `up` branch of the MLP. With `s_j` the square root of the channel's size, halfway
between evening out the activations and leaving the weights alone, both lose less.

Xiao et al., 2022, SmoothQuant, arXiv:2211.10438, with migration strength 0.5 and the activations'
root mean square in place of their maximum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from gemma_keras.config import GemmaConfig, LayerSpec

_STRENGTH = 0.5
_WIDEST = 1e3  # a channel is taken to be at most as much larger, or smaller, than the typical one


class BalancedWeights(Mapping[str, np.ndarray]):
    """The same model in other weights: canonical name to array, changed as it is read.

    Args:
        config: the model's.
        weights: canonical name to array.
        channel_rms: matrix name to the root mean square of its input channels, `[in]`; see
            `export.quantize.calibrate`.
    """

    def __init__(
        self,
        config: GemmaConfig,
        weights: Mapping[str, np.ndarray],
        channel_rms: Mapping[str, np.ndarray],
    ) -> None:
        self._weights = weights
        # name to factors of its inputs (rows) and of its outputs (columns, or a norm's entries)
        self._inputs: dict[str, np.ndarray] = {}
        self._outputs: dict[str, np.ndarray] = {}
        for i, layer in enumerate(config.layers):
            name = f"layers.{i}"
            shared = _factors(channel_rms[f"{name}.attention.query"])
            self._move(
                f"{name}.pre_attention_norm",
                shared,
                shared,
                *(f"{name}.attention.{part}" for part in ("query", "key", "value")),
            )
            shared = _factors(channel_rms[f"{name}.mlp.gate"])
            self._move(f"{name}.pre_ffw_norm", shared, shared, f"{name}.mlp.gate", f"{name}.mlp.up")
            hidden = _factors(channel_rms[f"{name}.mlp.down"])
            self._move(f"{name}.mlp.up", hidden, hidden, f"{name}.mlp.down")
            values = _factors(_over_groups(channel_rms[f"{name}.attention.output"], layer))
            self._move(
                f"{name}.attention.value",
                values,
                _for_groups(values, layer),
                f"{name}.attention.output",
            )

    def _move(self, before: str, divide: np.ndarray, multiply: np.ndarray, *after: str) -> None:
        self._outputs[before] = divide
        for name in after:
            self._inputs[name] = multiply

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._weights[name]
        if name.endswith("_norm") and name in self._outputs:
            return (1 + array) / self._outputs[name] - 1
        if name in self._inputs:
            array = array * self._inputs[name][:, None]
        if name in self._outputs:
            array = array / self._outputs[name]
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _factors(rms: np.ndarray) -> np.ndarray:
    """The square roots of the channels' sizes, about 1 in the geometric mean: float32 `[in]`."""
    typical = float(np.median(rms)) or 1.0
    sizes = np.clip(rms.astype(np.float64) / typical, 1 / _WIDEST, _WIDEST)
    logs = _STRENGTH * np.log(sizes)
    return np.exp(logs - logs.mean()).astype(np.float32)


def _over_groups(rms: np.ndarray, layer: LayerSpec) -> np.ndarray:
    """From the heads' channels to those of the key-value heads: `[kv_heads * head_dim]`."""
    grouped = rms.reshape(layer.num_kv_heads, -1, layer.head_dim)
    return np.sqrt((grouped**2).mean(axis=1)).ravel()


def _for_groups(values: np.ndarray, layer: LayerSpec) -> np.ndarray:
    """The inverse: each key-value head's factors once for every head that shares it."""
    group = layer.num_heads // layer.num_kv_heads
    grouped = values.reshape(layer.num_kv_heads, 1, layer.head_dim)
    return np.repeat(grouped, group, axis=1).ravel()
