"""Balances activations by moving their channel scales into the weights before both are quantized.

onnxruntime also rounds the activations of a quantized matrix product to 8 bits, with one scale for
each block of input channels. One large channel reduces the precision of its whole block. Dividing
channel j by `s_j` and multiplying row j of the matrix by it changes nothing in exact arithmetic.
The division is free if a linear operation precedes it: the norm's factors, the value projection,
the `up` branch of the MLP. With `s_j` the square root of the channel's size, both activations and
weights lose less.

Xiao et al., 2022, SmoothQuant, arXiv:2211.10438, with migration strength 0.5 and the activations'
root mean square instead of their maximum.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from gemma_keras.checkpoints.source import table_chunks
from gemma_keras.config import GemmaConfig, LayerSpec

_STRENGTH = 0.5
_WIDEST = 1e3  # limit of a channel's size relative to the typical one


class BalancedWeights(Mapping[str, np.ndarray]):
    """The weights of an equivalent, balanced model: canonical name to array, computed on reading.

    Args:
        config: the model's.
        weights: canonical name to array.
        channel_rms: matrix name to the root mean square of its input channels, `[in]`, for those
            of `export.calibrate.observe.OBSERVED`; without it, `balance_block` is to be called.
    """

    def __init__(
        self,
        config: GemmaConfig,
        weights: Mapping[str, np.ndarray],
        channel_rms: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._config = config
        self._weights = weights
        # name to factors of its inputs (rows) and of its outputs (columns, or a norm's entries)
        self._inputs: dict[str, np.ndarray] = {}
        self._outputs: dict[str, np.ndarray] = {}
        channel_rms = channel_rms or {}
        for i in range(len(config.layers)) if channel_rms else ():
            prefix = f"layers.{i}."
            rms = {
                n.removeprefix(prefix): v for n, v in channel_rms.items() if n.startswith(prefix)
            }
            self.balance_block(i, rms)

    def balance_block(
        self, i: int, rms: Mapping[str, np.ndarray], keep: Collection[str] = ()
    ) -> None:
        """Balance one decoder block.

        Args:
            i: which.
            rms: name within the block to the root mean square of its input channels, `[in]`.
            keep: canonical names of matrices that must not change.
        """
        name, layer = f"layers.{i}", self._config.layers[i]
        shared = _factors(rms["attention.query"])
        projections = [f"{name}.attention.{part}" for part in ("query", "key", "value")]
        self._move(f"{name}.pre_attention_norm", shared, shared, projections, keep)
        shared = _factors(rms["mlp.gate"])
        branches = [f"{name}.mlp.gate", f"{name}.mlp.up"]
        self._move(f"{name}.pre_ffw_norm", shared, shared, branches, keep)
        hidden = _factors(rms["mlp.down"])
        self._move(f"{name}.mlp.up", hidden, hidden, [f"{name}.mlp.down"], keep)
        values = _factors(_over_groups(rms["attention.output"], layer))
        for_heads = _for_groups(values, layer)
        output = [f"{name}.attention.output"]
        self._move(f"{name}.attention.value", values, for_heads, output, keep)

    def input_factors(self, name: str) -> np.ndarray | None:
        """Returns the divisors of a matrix's inputs, `[in]`; `None` if they were not divided."""
        return self._inputs.get(name)

    def _move(
        self,
        before: str,
        divide: np.ndarray,
        multiply: np.ndarray,
        after: list[str],
        keep: Collection[str],
    ) -> None:
        if not {before, *after}.isdisjoint(keep):
            return
        self._outputs[before] = divide
        for name in after:
            self._inputs[name] = multiply

    def table_chunks(self, name: str, chunk_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
        """Returns a table, which balancing does not change."""
        return table_chunks(self._weights, name, chunk_bytes)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._weights[name]
        if name.endswith("_norm") and name in self._outputs:
            return (1 + array) / self._outputs[name] - 1
        fresh = None  # a copy, which may be changed in place because matrices are large
        if name in self._inputs:
            array = fresh = array * self._inputs[name][:, None]
        if name in self._outputs:
            array = np.divide(array, self._outputs[name], out=fresh)
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
