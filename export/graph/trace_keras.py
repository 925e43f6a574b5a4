"""Traces the Keras layers on TensorFlow as ONNX fragments: `python -m export.graph.trace_keras
FOLDER`.

It runs in a separate process, because the caller's Keras may have another backend. It reads a
configuration as JSON from stdin. It writes `embed.onnx`, `head.onnx` and one `block.{i}.onnx` for
each kind of block into FOLDER; i is the first layer of that kind. Blocks of a kind differ only in
their weights, and weights are inputs of the fragments. So time and file size do not grow with the
model's depth, and no weight is ever allocated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import onnx
import tensorflow as tf
from tf2onnx import optimizer, tf_loader, tfonnx

from export.graph.nodes import OPSET
from gemma_keras.checkpoints.names import WeightSpec, head_table, weight_specs
from gemma_keras.config import GemmaConfig
from gemma_keras.model.backbone import GemmaBackbone

# tf2onnx ends at 18. From 21 on DequantizeLinear knows blocks and 4-bit integers.
_TRACED_OPSET = 18
# Of tf2onnx's own optimizers. Those that turn transposes into reshapes and merge reshapes lose
# track of what a 0 in a shape refers to: with one key-value head they mix up batch and length.
_SOUND = {
    "fold_constants": optimizer.ConstFoldOptimizer,
    "merge_duplication": optimizer.MergeDuplicatedNodesOptimizer,
    "remove_identity": optimizer.IdentityOptimizer,
}


def trace(config: GemmaConfig, folder: Path) -> None:
    """Write the fragments of a model.

    * `embed`: `input_ids` int64 `(batch, length)`, `token_embedding` -> `hidden`.
    * `block.{i}`: `hidden` float32 `(batch, length, hidden_dim)`, `start` int32 `(batch,)`,
      `past.key` and `past.value` float32 `(batch, kv_heads, total, head_dim)`, weights by their
      names within the block -> `hidden_out`, `present.key`, `present.value`.
    * `head`: `hidden`, `final_norm`, `head` `[hidden_dim, vocabulary_size]` -> `logits`.

    A norm's weight is the factor `1 + scale`, as it is stored.

    Args:
        config: the model's.
        folder: exists and is empty.
    """
    # In this scope a variable is a shape and an initializer that is never called.
    with keras.StatelessScope(initialize_variables=False):
        backbone = GemmaBackbone(config, dtype="float32", kernel_initializer="zeros")
    specs = weight_specs(config)
    width = config.hidden_dim
    hidden = tf.TensorSpec((None, None, width), tf.float32, "hidden")

    def embed(weights, input_ids):
        with _weights_as(backbone.variable, specs, weights):
            return {"hidden": backbone._embed(config, input_ids)}

    ids = tf.TensorSpec((None, None), tf.int64, "input_ids")
    _write(embed, [specs["token_embedding"]], [ids], folder / "embed.onnx")

    for i, layer in first_of_each_kind(config).items():
        prefix, block = f"layers.{i}.", backbone.transformer_layers[i]
        within = {n.removeprefix(prefix): s for n, s in specs.items() if n.startswith(prefix)}

        def run(weights, hidden, start, past_key, past_value, block=block, within=within):
            with _weights_as(block.variable, within, weights):
                out, (key, value) = block(hidden, cache=(past_key, past_value), start=start)
            return {"hidden_out": out, "present.key": key, "present.value": value}

        past = (None, layer.num_kv_heads, None, layer.head_dim)
        others = [
            hidden,
            tf.TensorSpec((None,), tf.int32, "start"),
            tf.TensorSpec(past, tf.float32, "past.key"),
            tf.TensorSpec(past, tf.float32, "past.value"),
        ]
        _write(run, list(within.values()), others, folder / f"block.{i}.onnx", prefix)

    table = head_table(config)

    def head(weights, hidden):
        norm, matrix = weights["final_norm"], weights["head"]
        weights = {"final_norm": norm, table: tf.transpose(matrix)}
        with _weights_as(backbone.variable, specs, weights):
            normed = backbone.layer_norm(hidden)
            return {"logits": backbone.token_embedding(normed, reverse=True)}

    spec = WeightSpec("head", (width, config.vocabulary_size), "matrix", "", "")
    _write(head, [specs["final_norm"], spec], [hidden], folder / "head.onnx")


def first_of_each_kind(config: GemmaConfig):
    """The first layer of each distinct `LayerSpec`, by its index."""
    kinds = {}
    for i, layer in enumerate(config.layers):
        kinds.setdefault(layer, i)
    return {i: layer for layer, i in kinds.items()}


def _weights_as(variable: Callable[[str], object], specs: Mapping[str, WeightSpec], weights):
    """The scope in which Keras's variables have the values of a mapping by name."""
    values = []
    for name, value in weights.items():
        if specs[name].kind == "norm":
            value = value - 1.0
        elif name == "head":  # Keras keeps the untied one transposed
            value = tf.transpose(value)
        values.append((variable(name), value))
    return keras.StatelessScope(state_mapping=values, initialize_variables=False)


def _write(
    function: Callable,
    weights: Sequence[WeightSpec],
    others: Sequence[tf.TensorSpec],
    path: Path,
    prefix: str = "",
) -> None:
    names = [spec.name.removeprefix(prefix) for spec in weights]
    signature = [
        *others,
        # A placeholder of known size is allocated while TensorFlow simplifies the graph.
        *(
            tf.TensorSpec([None] * len(s.shape), tf.float32, n)
            for s, n in zip(weights, names, strict=True)
        ),
    ]

    def traced(*arguments):
        given = {
            name: tf.ensure_shape(value, spec.shape)
            for name, spec, value in zip(names, weights, arguments[len(others) :], strict=True)
        }
        return function(given, *arguments[: len(others)])

    compiled: Any = tf.function(traced, autograph=False)
    model = _convert(compiled.get_concrete_function(*signature))
    expected = {str(spec.name) for spec in signature}
    found = {value.name or "" for value in model.graph.input}
    if found != expected:
        raise AssertionError(
            f"{path.name}: {sorted(found ^ expected)} are missing or unexpected inputs"
        )
    path.write_bytes(model.SerializeToString(deterministic=True))


def _convert(function) -> onnx.ModelProto:
    """A traced function to ONNX, its inputs and outputs under the names they have in Python."""
    inputs = [tensor.name for tensor in function.inputs]
    outputs = {tensor.name: name for name, tensor in function.structured_outputs.items()}
    names = {name: name.removesuffix(":0") for name in inputs} | outputs
    graph_def = tf_loader.from_function(function, inputs, list(outputs))
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        converted = tfonnx.process_tf_graph(
            graph,
            opset=_TRACED_OPSET,
            input_names=inputs,
            output_names=list(outputs),
            tensors_to_rename=names,
        )
    converted = optimizer.optimize_graph(converted, catch_errors=False, optimizers=_SOUND)
    model = converted.make_model("fragment")
    return onnx.version_converter.convert_version(model, OPSET)


def main() -> int:
    """Trace the model that stdin describes; after a failure the last line on stderr says why."""
    try:
        trace(GemmaConfig.from_dict(json.load(sys.stdin)), Path(sys.argv[1]))
    except Exception as error:
        message = " ".join(str(error).split())
        print(f"\n{type(error).__name__}: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
