"""Computes the names, shapes and dtypes of each graph's inputs and outputs from the configuration.

Three graphs share the same weights:

* `model.onnx`, the interchange graph, keeps the names that onnxruntime-genai, Optimum and
  transformers.js read. Its past grows by concatenation and it returns logits for all positions.
  `attention_mask` says where padding is, on the left, on the right or between; a row's tokens have
  the positions, and see of one another, what they would without it.
* `engine.onnx` is the graph that `edge_demo` runs. Keys and values are in buffers of fixed
  capacity, which are both input and output. The rotary tables are inputs, so they grow with the
  buffers instead of being stored for the longest context. Logits are computed only at requested
  positions. Sliding-window layers store only the last window of keys and values. The graph takes
  scaled embeddings instead of token ids: the device reads these rows itself, so that the table is
  not mapped.
* `candidates.onnx` is a variant for generation. It returns only the ids and logits of the few
  hundred most likely tokens, instead of all logits. With a head in two planes it multiplies by the
  high plane; the device may add the low plane for these tokens.

A text embedder has `model.onnx` and `engine.onnx` only. Both return one vector of length 1 for each
text, and have no keys and values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import repeat

import numpy as np

from edge_demo.bundle.manifest import GraphSpec, RopeSpec, TensorSpec, WindowSpec
from gemma_keras.config import GemmaConfig, LayerSpec

INTERCHANGE_FILE = "model.onnx"
ENGINE_FILE = "engine.onnx"
CANDIDATES_FILE = "candidates.onnx"
WEIGHTS_FILE = "model.onnx_data"
_BATCH = "batch_size"  # transformers.js makes an empty past by this name

_MOST_CANDIDATES = 256

Windows = Mapping[int | None, WindowSpec]
NO_WINDOWS: Windows = {}


def ropes(config: GemmaConfig) -> dict[tuple[float, float, int], RopeSpec]:
    """The distinct rotary tables of the model, keyed by `rope_key` of the layers that use them."""
    tables: dict[tuple[float, float, int], RopeSpec] = {}
    for layer in config.layers:
        key = rope_key(layer)
        if key not in tables:
            tables[key] = RopeSpec(
                f"rope.{len(tables)}", layer.rope_theta, layer.rope_scale, layer.head_dim // 2
            )
    return tables


def rope_key(layer: LayerSpec) -> tuple[float, float, int]:
    """Returns the values that two layers must have in common to share a rotary table."""
    return layer.rope_theta, layer.rope_scale, layer.head_dim


def windows(config: GemmaConfig, max_context: int) -> Windows:
    """The distinct sliding windows that are shorter than the context, keyed by their lengths."""
    lengths = sorted({layer.sliding_window or max_context for layer in config.layers})
    return {
        length: WindowSpec(f"window_capacity.{i}", length)
        for i, length in enumerate(lengths)
        if length < max_context
    }


def interchange_contract(config: GemmaConfig) -> GraphSpec:
    """The contract of `model.onnx`."""
    return GraphSpec(
        INTERCHANGE_FILE,
        inputs=(
            TensorSpec("input_ids", "int64", (_BATCH, "sequence_length")),
            TensorSpec("attention_mask", "int64", (_BATCH, "total_sequence_length")),
            *_key_values(config, "past_key_values", repeat("past_sequence_length"), _BATCH),
        ),
        outputs=(
            TensorSpec("logits", "float32", (_BATCH, "sequence_length", config.vocabulary_size)),
            *_key_values(config, "present", repeat("total_sequence_length"), _BATCH),
        ),
    )


def interchange_inputs(config: GemmaConfig, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Returns every input of `model.onnx`, by name, for rows of tokens without a past.

    Args:
        config: the model's.
        ids: `(batch, length)`.
    """
    sizes = {_BATCH: len(ids), "past_sequence_length": 0}
    given = {
        spec.name: np.zeros([n if isinstance(n, int) else sizes[n] for n in spec.shape], spec.dtype)
        for spec in interchange_contract(config).inputs
        if spec.name.startswith("past_key_values.")
    }
    return given | {
        "input_ids": ids.astype(np.int64),
        "attention_mask": np.ones_like(ids, np.int64),
    }


def whole_layers(config: GemmaConfig, windows: Windows) -> tuple[int, ...]:
    """The layers that keep the keys and values of the whole text, by index."""
    return tuple(i for i, s in enumerate(config.layers) if s.sliding_window not in windows)


def engine_contract(
    config: GemmaConfig, windows: Windows = NO_WINDOWS, int8_layers: Collection[int] = ()
) -> GraphSpec:
    """The contract of `engine.onnx`.

    `seqlens_k` is the number of tokens of each row after the call, minus 1, as in
    `GroupQueryAttention`. `logit_positions` selects positions within the call.

    Args:
        config: the model's.
        windows: as `windows` returns them; layers with one of these windows store only the last
            window of keys and values.
        int8_layers: those whose keys and values are kept as 8-bit integers.
    """
    shape = ("batch", "num_logits", config.vocabulary_size)
    logits = TensorSpec("logits", "float32", shape)
    return _in_place(config, windows, int8_layers, ENGINE_FILE, logits)


def candidates_contract(
    config: GemmaConfig,
    windows: Windows = NO_WINDOWS,
    int8_layers: Collection[int] = (),
    low_plane_apart: bool = False,
) -> GraphSpec:
    """The contract of `candidates.onnx`: inputs as the engine's, the best tokens in no order.

    Args:
        config: the model's.
        windows: as for `engine_contract`.
        int8_layers: as for `engine_contract`.
        low_plane_apart: whether the device adds the low plane of the head. The graph then returns
            the products with the high plane, and the hidden state.
    """
    shape = ("batch", "num_logits", num_candidates(config))
    hidden = ("batch", "num_logits", config.hidden_dim)
    outputs = [TensorSpec("candidate_ids", "int64", shape)]
    if low_plane_apart:
        outputs.append(TensorSpec("candidate_high", "float32", shape))
        outputs.append(TensorSpec("candidate_hidden", "float32", hidden))
    else:
        outputs.append(TensorSpec("candidate_logits", "float32", shape))
    return _in_place(config, windows, int8_layers, CANDIDATES_FILE, *outputs)


def embedder_interchange_contract(dimensions: int) -> GraphSpec:
    """The contract of an embedder's `model.onnx`, which takes token ids.

    Args:
        dimensions: of a vector.
    """
    ids = TensorSpec("input_ids", "int64", (_BATCH, "sequence_length"))
    return _embedder(INTERCHANGE_FILE, ids, dimensions)


def embedder_engine_contract(config: GemmaConfig, dimensions: int) -> GraphSpec:
    """The contract of an embedder's `engine.onnx`, which takes scaled embeddings.

    Args:
        config: the model's.
        dimensions: of a vector.
    """
    shape = (_BATCH, "sequence_length", config.hidden_dim)
    return _embedder(ENGINE_FILE, TensorSpec("inputs_embeds", "float32", shape), dimensions)


def _embedder(file: str, tokens: TensorSpec, dimensions: int) -> GraphSpec:
    mask = TensorSpec("attention_mask", "int64", (_BATCH, "sequence_length"))
    vector = TensorSpec("sentence_embedding", "float32", (_BATCH, dimensions))
    return GraphSpec(file, inputs=(tokens, mask), outputs=(vector,))


def num_candidates(config: GemmaConfig) -> int:
    """How many tokens the candidates graph returns at each position."""
    return min(_MOST_CANDIDATES, config.vocabulary_size)


def _in_place(
    config: GemmaConfig,
    windows: Windows,
    int8_layers: Collection[int],
    file: str,
    *outputs: TensorSpec,
) -> GraphSpec:
    """A graph whose keys and values are buffers of fixed capacity, input and output at once."""
    capacities = [
        windows[layer.sliding_window].name if layer.sliding_window in windows else "capacity"
        for layer in config.layers
    ]
    tables = [
        TensorSpec(f"{rope.name}.{part}", "float32", ("rope_length", rope.dims))
        for rope in ropes(config).values()
        for part in ("cos", "sin")
    ]
    return GraphSpec(
        file,
        inputs=(
            TensorSpec("inputs_embeds", "float32", ("batch", "sequence", config.hidden_dim)),
            TensorSpec("seqlens_k", "int32", ("batch",)),
            TensorSpec("total_sequence_length", "int32", ()),
            TensorSpec("logit_positions", "int64", ("num_logits",)),
            *tables,
            *_key_values(config, "past_key_values", capacities, int8_layers=int8_layers),
        ),
        outputs=(*outputs, *_key_values(config, "present", capacities, int8_layers=int8_layers)),
    )


def _key_values(
    config: GemmaConfig,
    prefix: str,
    lengths: Iterable[str],
    batch: str = "batch",
    int8_layers: Collection[int] = (),
) -> list[TensorSpec]:
    return [
        TensorSpec(
            f"{prefix}.{i}.{part}",
            "int8" if i in int8_layers else "float32",
            (batch, layer.num_kv_heads, length, layer.head_dim),
        )
        for i, (layer, length) in enumerate(zip(config.layers, lengths, strict=False))
        for part in ("key", "value")
    ]
