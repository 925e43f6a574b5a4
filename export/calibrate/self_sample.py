"""Calibration text that the model writes itself: offline, in whatever languages it knows.

Every row begins with the beginning-of-sequence token and is sampled at temperature 1 from the most
likely tokens, on an 8-bit export of the model. Liu et al., 2023, LLM-QAT, arXiv:2305.17888, found
such text a better guide than a corpus that the model was not trained on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edge_demo.bundle.embedding import EmbeddingTable
from edge_demo.bundle.manifest import RopeSpec
from export.formats.formats import plan_bytes
from export.formats.recipes import INT8, table_format
from export.graph.contract import WEIGHTS_FILE, candidates_contract, ropes
from export.graph.fused import build_graph
from export.graph.store_weights import embedding_spec, store_weights
from export.graph.weights_file import WeightsFile
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig


def self_sample(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    bos: int,
    shape: tuple[int, int],
    seed: int,
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> np.ndarray:
    """Sample token ids from a model.

    Args:
        config: the model's; its hidden width must be a multiple of 16.
        weights: canonical name to float32 array.
        bos: the beginning-of-sequence token.
        shape: rows, and tokens in each, `bos` among them.
        seed: of the random numbers.
        folder: where an 8-bit export of the model may stand meanwhile.
        on_progress: called with (tokens of each row written so far, all of them).

    Returns:
        int32 array of that shape.
    """
    plan = {
        spec.name: table_format(config) if spec.kind == "table" else INT8
        for spec in weight_specs(config).values()
        if spec.kind != "norm"
    }
    contract = candidates_contract(config)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        own = Path(name)
        with WeightsFile(own / WEIGHTS_FILE) as file:
            store_weights(config, weights, plan, file, lambda done, total: None)
        graph = build_graph(config, plan, file, contract, shape[1])
        ir.save(graph, own / contract.file)
        session = ort.InferenceSession(str(own / contract.file), providers=["CPUExecutionProvider"])
        table = EmbeddingTable(file.path, embedding_spec(config, plan, file))
    return _sample(session, table, list(ropes(config).values()), bos, shape, seed, on_progress)


def memory_needed(config: GemmaConfig) -> int:
    """What `self_sample` needs at most, in bytes: the 8-bit weights, as stored and as prepacked."""
    plan = {spec.name: INT8 for spec in weight_specs(config).values() if spec.kind != "norm"}
    return 2 * plan_bytes(plan, config)


def _sample(
    session: ort.InferenceSession,
    embedding: EmbeddingTable,
    tables: list[RopeSpec],
    bos: int,
    shape: tuple[int, int],
    seed: int,
    on_progress: Callable[[int, int], None],
) -> np.ndarray:
    rows, length = shape
    random = np.random.default_rng(seed)
    ids = np.full(shape, bos, np.int32)
    feed: dict[str, np.ndarray] = {"logit_positions": np.zeros(1, np.int64)}
    for rope in tables:
        frequencies = rope.theta ** (-np.arange(rope.dims) / rope.dims) / rope.scale
        angles = np.arange(length)[:, None] * frequencies
        feed[f"{rope.name}.cos"] = np.cos(angles).astype(np.float32)
        feed[f"{rope.name}.sin"] = np.sin(angles).astype(np.float32)
    binding = session.io_binding()
    kept = []  # an OrtValue shares the memory of its array
    for spec in session.get_inputs():
        if spec.name.startswith("past_key_values."):
            _, heads, _, head_dim = spec.shape
            buffer = np.zeros((rows, heads, length, head_dim), np.float32)
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            kept += [buffer, value]
            binding.bind_ortvalue_input(spec.name, value)
            binding.bind_ortvalue_output(spec.name.replace("past_key_values", "present"), value)
    found: dict[str, np.ndarray] = {}
    for spec in session.get_outputs():
        if spec.name.startswith("candidate_"):
            dtype = np.int64 if spec.name == "candidate_ids" else np.float32
            found[spec.name] = np.empty((rows, 1, spec.shape[-1]), dtype)
            value = ort.OrtValue.ortvalue_from_numpy(found[spec.name])
            kept.append(value)
            binding.bind_ortvalue_output(spec.name, value)
    for position in range(length - 1):
        feed |= {
            "inputs_embeds": embedding.rows(ids[:, position].tolist())[:, None],
            "seqlens_k": np.full(rows, position, np.int32),
            "total_sequence_length": np.array(position + 1, np.int32),
        }
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        session.run_with_iobinding(binding)
        # Gumbel noise on the logits draws from their softmax.
        logits = found["candidate_logits"][:, 0]
        drawn = (logits + random.gumbel(size=logits.shape)).argmax(axis=-1)
        ids[:, position + 1] = found["candidate_ids"][np.arange(rows), 0, drawn]
        on_progress(position + 2, length)
    return ids
