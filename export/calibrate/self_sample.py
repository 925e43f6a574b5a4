"""Calibration text that the model writes itself: offline, in whatever languages it knows.

Every row begins with the beginning-of-sequence token and is sampled at temperature 1 from the most
likely tokens, on an 8-bit export of the model. Liu et al., 2023, LLM-QAT, arXiv:2305.17888, found
such text a better guide than a corpus that the model was not trained on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edge_demo.bundle.embedding import EmbeddingTable
from edge_demo.bundle.manifest import RopeSpec
from edge_demo.engine.binding import Binding
from edge_demo.engine.sessions import Session
from export.formats.formats import plan_bytes
from export.formats.recipes import INT8, table_format
from export.graph.contract import WEIGHTS_FILE, candidates_contract, ropes
from export.graph.fused import build_graph
from export.graph.store_weights import embedding_spec, store_weights
from export.graph.weights_file import WeightsFile
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig

ROWS_AT_ONCE = 64  # of a batch, for whose keys and values there must be memory


def self_sample(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    bos: int,
    shape: tuple[int, int],
    seed: int,
    folder: Path,
    on_progress: Callable[[int, int], None],
    first: int = 0,
) -> Iterator[np.ndarray]:
    """Sample token ids from a model.

    Args:
        config: the model's; its hidden width must be a multiple of 16.
        weights: canonical name to float32 array.
        bos: the beginning-of-sequence token.
        shape: rows, and tokens in each, `bos` among them.
        seed: of the random numbers.
        folder: where an 8-bit export of the model may stand meanwhile.
        on_progress: called with (tokens of a row written so far, batch after batch; all of them).
        first: how many batches are there already; they are not written again.

    Yields:
        The other batches of `ROWS_AT_ONCE` rows, int32; the last may have fewer.
    """
    rows, length = shape
    batches = -(-rows // ROWS_AT_ONCE)
    if first >= batches:
        return
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
        graph = build_graph(config, plan, file, contract, length)
        ir.save(graph, own / contract.file)
        run = ort.InferenceSession(str(own / contract.file), providers=["CPUExecutionProvider"])
        outputs = [spec for spec in contract.outputs if spec.name.startswith("candidate_")]
        session = Session(run, tuple(outputs))
        table = EmbeddingTable(file.path, embedding_spec(config, plan, file))
    for number in range(first, batches):
        size = min(ROWS_AT_ONCE, rows - number * ROWS_AT_ONCE), length
        yield _sample(
            session,
            table,
            list(ropes(config).values()),
            bos,
            size,
            np.random.default_rng([seed, number]),
            lambda done, before=number * length: on_progress(before + done, batches * length),
        )


def memory_needed(config: GemmaConfig, length: int) -> int:
    """What `self_sample` needs at most, in bytes: the 8-bit weights, as stored and as prepacked,
    and the keys and values of a batch of rows of `length` tokens."""
    keys = sum(layer.num_kv_heads * layer.head_dim for layer in config.layers)
    cache = 2 * 4 * ROWS_AT_ONCE * length * keys
    plan = {spec.name: INT8 for spec in weight_specs(config).values() if spec.kind != "norm"}
    return 2 * plan_bytes(plan, config) + cache


def _sample(
    session: Session,
    embedding: EmbeddingTable,
    tables: list[RopeSpec],
    bos: int,
    shape: tuple[int, int],
    random: np.random.Generator,
    on_progress: Callable[[int], None],
) -> np.ndarray:
    rows, length = shape
    ids = np.full(shape, bos, np.int32)
    rotary: dict[str, np.ndarray] = {}
    for rope in tables:
        frequencies = rope.theta ** (-np.arange(rope.dims) / rope.dims) / rope.scale
        angles = np.arange(length)[:, None] * frequencies
        rotary[f"{rope.name}.cos"] = np.cos(angles).astype(np.float32)
        rotary[f"{rope.name}.sin"] = np.sin(angles).astype(np.float32)
    buffers = {
        spec.name: np.zeros((rows, spec.shape[1], length, spec.shape[3]), np.float32)
        for spec in session.run.get_inputs()
        if spec.name.startswith("past_key_values.")
    }
    binding = Binding(session, embedding, buffers, rotary, 1, 1, rows)
    for position in range(length - 1):
        binding.fill(ids[:, position].tolist(), [position + 1] * rows, [0])
        candidates, logits = (array[:, 0] for array in binding.run())
        # Gumbel noise on the logits draws from their softmax.
        drawn = (logits + random.gumbel(size=logits.shape)).argmax(axis=-1)
        ids[:, position + 1] = candidates[np.arange(rows), drawn]
        on_progress(position + 2)
    return ids
