"""The Keras layers as ONNX fragments, traced on TensorFlow: `python -m export.trace_keras FOLDER`.

A process of its own, whatever backend the caller's Keras has. It reads a configuration as JSON from
stdin and writes into FOLDER `embed.onnx`, `head.onnx` and, for each kind of block, `block.{i}.onnx`
with i the first layer of that kind. Blocks of a kind differ in their weights only, and weights are
inputs of the fragments: the time and the size of what is written do not grow with the model's depth,
and no weight is ever allocated.
"""

# Keras's operations are typed as if they returned None or a PyTree.
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
import onnx
import tensorflow as tf
import tf2onnx
from keras import ops

from gemma_keras.backbone import GemmaBackbone
from gemma_keras.checkpoints.names import WeightSpec, weight_specs
from gemma_keras.config import GemmaConfig

# tf2onnx ends at 18. From 21 on DequantizeLinear knows blocks and 4-bit integers.
_TRACED_OPSET, OPSET = 18, 21


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
    # In this scope a variable is a shape and an initializer that nobody calls.
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

    table = "token_embedding" if config.tied_head else "head"

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

    @tf.function(autograph=False)
    def traced(*arguments):
        given = {
            name: tf.ensure_shape(value, spec.shape)
            for name, spec, value in zip(names, weights, arguments[len(others) :], strict=True)
        }
        return function(given, *arguments[: len(others)])

    model, _ = tf2onnx.convert.from_function(traced, signature, opset=_TRACED_OPSET)
    expected = {spec.name for spec in signature}
    found = {value.name for value in model.graph.input}
    if found != expected:
        raise AssertionError(
            f"{path.name} has the inputs {sorted(found ^ expected)} too many or few"
        )
    model = onnx.version_converter.convert_version(model, OPSET)
    path.write_bytes(model.SerializeToString(deterministic=True))


def main() -> int:
    """Trace the model that stdin describes; the last line on stderr tells a failure."""
    try:
        trace(GemmaConfig.from_dict(json.load(sys.stdin)), Path(sys.argv[1]))
    except Exception as error:
        message = " ".join(str(error).split())
        print(f"\n{type(error).__name__}: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
