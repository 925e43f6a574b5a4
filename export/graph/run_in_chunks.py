"""Runs a graph chunk by chunk, so that a model of any size runs on a laptop.

A chunk is a sequence of the graph's nodes with a limited amount of weights. onnxruntime loads a
chunk, runs all inputs through it and frees it; values for later chunks are kept. So the weights are
read once for any number of inputs, and only one chunk of them is in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from export.errors import ExportError
from export.graph.contract import INTERCHANGE_FILE, interchange_inputs
from gemma_keras.config import GemmaConfig

CHUNK_BYTES = 128 << 20
_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"


def logits_in_chunks(
    folder: Path,
    config: GemmaConfig,
    ids: np.ndarray,
    positions: np.ndarray,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    chunk_bytes: int = CHUNK_BYTES,
) -> np.ndarray:
    """Logits of an exported model of any size, by its interchange graph.

    Args:
        folder: of the bundle.
        config: the model's.
        ids: of the text, `(batch, length)`.
        positions: in each row, whose logits are needed.
        on_progress: called with (chunks done, all of them).
        chunk_bytes: as `cut_graph` takes it.

    Returns:
        float32 `(batch * len(positions), vocabulary_size)`, row after row.

    Raises:
        ExportError: onnxruntime cannot run it.
    """
    runs = run_in_chunks(
        folder / INTERCHANGE_FILE,
        [interchange_inputs(config, row[None]) for row in ids],
        {"logits": lambda logits: logits[0, positions]},
        on_progress,
        chunk_bytes,
    )
    return np.concatenate([values["logits"] for values in runs])


def run_in_chunks(
    path: Path,
    inputs: Sequence[Mapping[str, np.ndarray]],
    picks: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    chunk_bytes: int = CHUNK_BYTES,
) -> list[dict[str, np.ndarray]]:
    """Run a graph on several inputs.

    Args:
        path: of the ONNX model; its external weights are in the same folder.
        inputs: for each run, every input of the graph by name.
        picks: the names of the values to return, each with a function that selects the part to
            keep.
        on_progress: called with (chunks done, all of them).
        chunk_bytes: as `cut_graph` takes it.

    Returns:
        For each run, what was picked, by name.

    Raises:
        ExportError: onnxruntime cannot run it.
    """
    model = onnx.load(str(path), load_external_data=False)
    chunks = list(cut_graph(model.graph, picks, chunk_bytes))
    runs = [dict(given) for given in inputs]
    picked: list[dict[str, np.ndarray]] = [{} for _ in inputs]
    for number, chunk in enumerate(chunks):
        try:
            session = _session(model, chunk, runs[0], path.parent)
            for values, picks_of_run in zip(runs, picked, strict=True):
                outputs: Any = session.run(
                    chunk.gives, {name: values[name] for name in chunk.reads}
                )
                values |= dict(zip(chunk.gives, outputs, strict=True))
                for name in picks.keys() & chunk.gives:
                    picks_of_run[name] = picks[name](values[name])
                for name in values.keys() - chunk.kept:
                    del values[name]
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise ExportError(f"the exported model does not run: {error}") from error
        del session  # before the next is loaded
        on_progress(number + 1, len(chunks))
    return picked


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A run of a graph's nodes.

    Attributes:
        nodes: in the graph's order.
        weights: the initializers they read.
        reads: names of inputs of the graph, or of values of earlier chunks.
        gives: names of values that later chunks read, or that are returned.
        kept: names of what later chunks read.
    """

    nodes: list[onnx.NodeProto]
    weights: list[onnx.TensorProto]
    reads: list[str]
    gives: list[str]
    kept: set[str]


def cut_graph(
    graph: onnx.GraphProto, wanted: Collection[str], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """Split the part of a graph that some values need into chunks.

    Args:
        graph: its nodes in an order in which they can run.
        wanted: the names of the values to compute.
        chunk_bytes: maximum bytes of weights in one chunk, unless a single node has more.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    runs: list[list[onnx.NodeProto]] = []
    size = 0
    for node in _needed(graph, wanted):
        own = sum(weight_bytes(weights[name]) for name in node.input if name in weights)
        if not runs or size + own > chunk_bytes:
            runs.append([])
            size = 0
        runs[-1].append(node)
        size += own
    read = [{name for node in run for name in node.input if name} for run in runs]
    given = [{name for node in run for name in node.output if name} for run in runs]
    for number, run in enumerate(runs):
        later = set().union(*read[number + 1 :])
        inputs = read[number] - given[number] - weights.keys()
        own = [weights[name] for name in sorted(read[number] & weights.keys())]
        yield Chunk(run, own, sorted(inputs), sorted(given[number] & (later | set(wanted))), later)


def _needed(graph: onnx.GraphProto, wanted: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes that values depend on, in the graph's order."""
    needed, nodes = set(wanted), []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            nodes.append(node)
            needed.update(node.input)
    return nodes[::-1]


def weight_bytes(tensor: onnx.TensorProto) -> int:
    """Returns the size of an initializer in bytes, in the graph or in an external file."""
    placed = {entry.key: entry.value for entry in tensor.external_data}
    return int(placed["length"]) if placed else tensor.ByteSize()


def _session(
    model: onnx.ModelProto, chunk: Chunk, values: Mapping[str, np.ndarray], folder: Path
) -> ort.InferenceSession:
    def described(name: str) -> onnx.ValueInfoProto:
        dtype = onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype)
        return onnx.helper.make_tensor_value_info(name, dtype, [None] * values[name].ndim)

    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    part.graph.name = "chunk"
    part.graph.node.extend(chunk.nodes)
    part.graph.initializer.extend(chunk.weights)
    part.graph.input.extend(described(name) for name in chunk.reads)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in chunk.gives)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised, so they are not printed too
    options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(folder))
    return ort.InferenceSession(
        part.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
