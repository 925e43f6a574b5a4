"""The two lowerings against each other: what one gets wrong the other shows.

Graphs are made without the pipeline, so that both stand over one weights file, and no quantized
product rounds its activations: what is left to differ is the order of sums.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import math
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from edge_demo.bundle.embedding import EmbeddingTable
from edge_demo.bundle.reader import Bundle
from edge_demo.engine.kv_cache import rope_table
from edge_demo.engine.runner import Engine
from edge_demo.text.generator import Generator
from edge_demo.text.sampling import Sampler
from edge_demo.text.tokenizer import Tokenizer
from export import export_onnx
from export.errors import ExportError, ExportRequestError
from export.formats.formats import Format
from export.formats.recipes import INT4, INT8, in_one_plane
from export.graph import traced
from export.graph.contract import WEIGHTS_FILE, engine_contract, interchange_contract, ropes
from export.graph.fused import build_graph
from export.graph.run_in_chunks import logits_in_chunks
from export.graph.store_weights import embedding_spec, store_weights
from export.graph.traced import build_traced_graph
from export.graph.weights_file import StoredTensor, WeightsFile
from gemma_keras.checkpoints.hf.config import config_from_hf, named_config
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.checkpoints.source import Checkpoint
from tests.gguf_files import metadata, tensors, write_gguf
from tests.models import GENERATIONS, WINDOW, hf_config, tiny_tokenizer_model

ROOT = Path(__file__).parents[2]
LENGTH, CAPACITY = 40, 48
LOWERINGS = {"fused": build_graph, "traced": build_traced_graph}
# of matrices and of tables
FORMATS = {
    "fp32": (Format(32), Format(32)),
    "fp16": (Format(16), Format(16)),
    "int8": (INT8, Format(8, 32, symmetric=False, planes=2)),
    "int4": (INT4, Format(8, 32, symmetric=False, planes=2)),
}
TOLERANCE = 1e-4  # of the logits' spread; 1e-5 is what the order of sums explains
MOST_BYTES = 2_000_000
TABLES: dict[Path, EmbeddingTable] = {}  # by the folder of the weights file

each_generation = pytest.mark.parametrize("generation", GENERATIONS)
each_format = pytest.mark.parametrize("fmt", FORMATS)


@functools.cache
def config_of(generation):
    """The small model of a generation; Gemma's with layers of one and of all key-value heads too."""
    config = config_from_hf(hf_config(generation, tied=generation != "gemma").to_dict())
    if generation != "gemma":
        return config
    layers = [
        dataclasses.replace(layer, num_kv_heads=heads)
        for layer, heads in zip(config.layers, (2, 1, 4), strict=True)
    ]
    return dataclasses.replace(config, layers=tuple(layers))


@functools.cache
def weights_of(generation):
    """Random weights that make attention far from uniform and every norm matter."""
    rng = np.random.default_rng(0)

    def make(spec):
        noise = rng.normal(size=spec.shape).astype(np.float32)
        if spec.kind == "norm":
            return 0.4 * noise + np.float32(8 * (spec.name == "final_norm"))
        if spec.kind == "table":
            return np.float32(0.05) * noise
        gain = 1.5 if spec.name.endswith(("query", "key")) else 1.0
        return noise * np.float32(gain / spec.shape[0] ** 0.5)

    return {name: make(spec) for name, spec in weight_specs(config_of(generation)).items()}


def checkpoint_of(generation):
    """A source for `export_onnx`."""
    checkpoint = Checkpoint(
        config_of(generation), weights_of(generation), tiny_tokenizer_model(), False, {}
    )
    return SimpleNamespace(as_checkpoint=lambda: checkpoint)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Lowering, generation and format to the closed weights file and its plan, each made once."""

    @functools.cache
    def get(lowering, generation, fmt):
        config = config_of(generation)
        specs = weight_specs(config).values()
        plan = {s.name: FORMATS[fmt][s.kind == "table"] for s in specs if s.kind != "norm"}
        if lowering == "traced":
            plan = in_one_plane(plan)
        path = tmp_path_factory.mktemp(f"{lowering}-{generation}-{fmt}") / WEIGHTS_FILE
        with WeightsFile(path) as file:
            store_weights(config, weights_of(generation), plan, file, lambda done, total: None)
        TABLES[path.parent] = EmbeddingTable(path, embedding_spec(config, plan, file))
        return file, plan

    return get


@pytest.fixture(scope="module")
def graph(stored):
    """Lowering, generation, format and contract to an ONNX file, each made once."""

    @functools.cache
    def get(lowering, generation, fmt, contract):
        file, plan = stored(lowering, generation, fmt)
        config = config_of(generation)
        model = LOWERINGS[lowering](config, plan, file, contract(config), CAPACITY)
        return save(model, file, f"{lowering}-{contract(config).file}")

    return get


def save(model, file, name):
    path = file.path.with_name(name)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    ir.save(model, path)
    return path


def session_of(path, **entries):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if path.name.startswith("traced"):  # what is written, not what onnxruntime makes of it
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def random_ids(batch_size, length=LENGTH):
    return np.random.default_rng(1).integers(4, 300, (batch_size, length))


def difference(found, expected):
    """Greatest difference in units of the expected values' standard deviation."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / expected.std())


class EngineGraph:
    """`engine.onnx` over buffers that are its input and output at once, rows side by side."""

    def __init__(self, path, config, batch_size):
        self.session = session_of(path)
        self.table = TABLES[path.parent]
        self.cache = {
            f"past_key_values.{i}.{part}": ort.OrtValue.ortvalue_from_numpy(
                np.zeros((batch_size, layer.num_kv_heads, CAPACITY, layer.head_dim), np.float32)
            )
            for i, layer in enumerate(config.layers)
            for part in ("key", "value")
        }
        self.tables = {}
        for rope in ropes(config).values():
            for part, table in zip(("cos", "sin"), rope_table(rope, CAPACITY), strict=True):
                self.tables[f"{rope.name}.{part}"] = table

    def run(self, ids, lengths, positions=None):
        """Logits after the given positions of `ids`, when rows have `lengths` tokens in all."""
        if positions is None:
            positions = np.arange(ids.shape[1])
        binding = self.session.io_binding()
        feed = {
            "inputs_embeds": self.table.rows(ids.ravel().tolist()).reshape(*ids.shape, -1),
            "seqlens_k": (np.asarray(lengths) - 1).astype(np.int32),
            "total_sequence_length": np.array(max(lengths), np.int32),
            "logit_positions": np.asarray(positions, np.int64),
            **self.tables,
        }
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        logits = next(v for v in binding.get_outputs() if v.shape()[-1] == 300)
        return logits.numpy()


class InterchangeGraph:
    """`model.onnx` with a past that grows."""

    def __init__(self, path, config, batch_size):
        self.session = session_of(path)
        self.past = {
            f"past_key_values.{i}.{part}": np.zeros(
                (batch_size, layer.num_kv_heads, 0, layer.head_dim), np.float32
            )
            for i, layer in enumerate(config.layers)
            for part in ("key", "value")
        }

    def run(self, ids, mask):
        feed = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
        logits, *presents = self.session.run(None, feed | self.past)
        self.past = dict(zip(self.past, presents, strict=True))
        return logits


# --- one against the other -----------------------------------------------------------------------


def engine_logits(path, config, ids):
    """Of a prefill in two chunks, single tokens, a rewind into the first chunk and more tokens."""
    engine = EngineGraph(path, config, len(ids))
    bounds = [0, 2 * WINDOW, 25, 26, 27, 28]
    found = [engine.run(ids[:, a:b], [b] * len(ids)) for a, b in itertools.pairwise(bounds)]
    other = ids[:, ::-1]
    found.append(engine.run(other[:, 5:9], [9] * len(ids), [0, 3]))
    found.append(engine.run(other[:, 9:10], [10] * len(ids)))
    return np.concatenate(found, axis=1)


@each_generation
@each_format
def test_engine_graphs_agree(graph, generation, fmt, record_property):
    config, ids = config_of(generation), random_ids(1)
    fused, found = (
        engine_logits(graph(low, generation, fmt, engine_contract), config, ids)
        for low in LOWERINGS
    )
    apart = difference(found, fused)
    record_property(f"{generation} {fmt} traced against fused, of the spread", f"{apart:.1e}")
    assert apart < TOLERANCE


@each_generation
@each_format
def test_interchange_graphs_agree_on_a_padded_batch(graph, generation, fmt):
    config, ids = config_of(generation), random_ids(3)
    mask = np.ones_like(ids)
    mask[1, 15:30] = 0
    logits, presents = {}, {}
    for lowering in LOWERINGS:
        run = InterchangeGraph(
            graph(lowering, generation, fmt, interchange_contract), config, len(ids)
        )
        found = [run.run((ids * mask)[:, :30], mask[:, :30])]
        found[0][1, 15:] = 0  # what comes of padding means nothing
        found += [run.run(ids[:, i : i + 1], mask[:, : i + 1]) for i in range(30, 33)]
        logits[lowering] = np.concatenate(found, axis=1)
        presents[lowering] = run.past
    assert difference(logits["traced"], logits["fused"]) < TOLERANCE
    for name, expected in presents["fused"].items():
        found = presents["traced"][name]
        assert found.shape == expected.shape == (3, expected.shape[1], 33, 32)
        for row, length in enumerate((33, 18, 33)):
            assert difference(found[row, :, :length], expected[row, :, :length]) < TOLERANCE


# Rows of prompts: x is a real token, _ is padding.
PADDINGS = {
    "left": ["xxxxxxxxxxxx", "_______xxxxx", "___xxxxxxxxx", "___________x"],
    "right": ["xxxxxxxxxxxx", "xxxxx_______", "xxxxxxxxx___", "x___________"],
    "holes": ["__xxx__xxx_x", "x_x_x_x_x_x_", "_xxxxxxxxxx_", "xxxxxx_xxxxx"],
    "mixed": ["____xxxxxxxx", "xxx_________", "xxxxxxxxxxxx", "____________"],
}


@each_generation
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_each_row_of_a_padded_batch_is_as_it_is_alone(graph, generation, lowering, padding):
    """What transformers, Optimum and transformers.js feed: a mask, and a past that grows."""
    config, path = config_of(generation), graph(lowering, generation, "fp32", interchange_contract)
    prompts = np.array([list(row) for row in PADDINGS[padding]]) == "x"
    later = np.ones((len(prompts), 2 * WINDOW), bool)
    mask, start = np.concatenate([prompts, later], axis=1), prompts.shape[1]
    ids = random_ids(len(mask), mask.shape[1])
    run = InterchangeGraph(path, config, len(ids))
    found = [run.run(ids[:, :start], mask[:, :start])]
    found += [run.run(ids[:, i : i + 1], mask[:, : i + 1]) for i in range(start, mask.shape[1])]
    found = np.concatenate(found, axis=1)
    assert np.isfinite(found).all()
    for row, real in enumerate(mask):
        text = ids[row : row + 1, real]
        expected = InterchangeGraph(path, config, 1).run(text, np.ones_like(text))
        assert difference(found[row, real], expected[0]) < TOLERANCE


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_later_call_may_be_padded_too(graph, lowering):
    """The traced graph in a batch, the other a row at a time: onnxruntime's operator has it so."""
    config, path = config_of("gemma3"), graph(lowering, "gemma3", "fp32", interchange_contract)
    rows = ["___xxxxx|_xx_x|_|__xxxx|x", "xxxxxxxx|xxxxx|x|_xx_xx|x"]
    rows = rows if lowering == "traced" else rows[:1]
    mask = np.array([list(row.replace("|", "")) for row in rows]) == "x"
    bounds = np.cumsum([0, *(len(call) for call in rows[0].split("|"))])
    ids, run = random_ids(len(mask), mask.shape[1]), InterchangeGraph(path, config, len(mask))
    found = [run.run(ids[:, a:b], mask[:, :b]) for a, b in itertools.pairwise(bounds)]
    for row, real in enumerate(mask):
        text = ids[row : row + 1, real]
        expected = InterchangeGraph(path, config, 1).run(text, np.ones_like(text))
        assert difference(np.concatenate(found, axis=1)[row, real], expected[0]) < TOLERANCE


def test_padding_moves_no_bit_of_a_row(graph):
    config, ids = config_of("gemma2"), random_ids(2, 12)
    path = graph("fused", "gemma2", "int8", interchange_contract)
    mask = np.ones_like(ids)
    mask[1, :5] = 0
    found = InterchangeGraph(path, config, 2).run(ids, mask)
    again = InterchangeGraph(path, config, 2).run(np.where(mask, ids, 299), mask)
    np.testing.assert_array_equal(found[mask > 0], again[mask > 0])


def test_rows_of_a_batch_in_the_engine_graph_may_end_at_different_places(graph):
    config, ids = config_of("gemma3"), random_ids(2)
    found = []
    for lowering in LOWERINGS:
        engine = EngineGraph(graph(lowering, "gemma3", "fp32", engine_contract), config, 2)
        first = engine.run(ids[:, :20], [20, 11])
        first[1, 11:] = 0
        found.append(np.concatenate([first, engine.run(ids[:, 20:21], [21, 12])], axis=1))
    assert difference(found[1], found[0]) < TOLERANCE


CHANGES = {
    "window": lambda layer: {"sliding_window": layer.sliding_window and layer.sliding_window + 1},
    "query scale": lambda layer: {"query_scale": layer.query_scale * 1.01},
    "rotation": lambda layer: {"rope_theta": layer.rope_theta * 1.01},
    "soft cap": lambda layer: {"attention_soft_cap": layer.attention_soft_cap * 1.01},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_small_mistake_in_one_of_them_shows(graph, stored, change):
    """The tolerance is no wider than what it has to tell apart."""
    config, ids = config_of("gemma2"), random_ids(1)
    file, plan = stored("fused", "gemma2", "fp32")
    layers = [dataclasses.replace(layer, **CHANGES[change](layer)) for layer in config.layers]
    wrong = dataclasses.replace(config, layers=tuple(layers))
    model = build_graph(wrong, plan, file, engine_contract(wrong), CAPACITY)
    path = save(model, file, "wrong.onnx")
    expected = engine_logits(graph("traced", "gemma2", "fp32", engine_contract), config, ids)
    assert difference(engine_logits(path, wrong, ids), expected) > 10 * TOLERANCE


# --- the files -----------------------------------------------------------------------------------


def described(value):
    tensor = value.type.tensor_type
    dims = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, dims


@each_generation
@each_format
@pytest.mark.parametrize("contract", [engine_contract, interchange_contract])
def test_graph_keeps_its_contract_in_standard_operators(graph, generation, fmt, contract, capfd):
    path = graph("traced", generation, fmt, contract)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    spec = contract(config_of(generation))
    for found, expected in (
        (model.graph.input, spec.inputs),
        (model.graph.output, spec.outputs),
    ):
        assert [described(value) for value in found] == [dataclasses.astuple(s) for s in expected]
    capfd.readouterr()
    ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert capfd.readouterr() == ("", "")


@each_format
def test_another_runtime_gives_the_same_logits(graph, fmt):
    """ONNX's reference implementation in numpy, which knows nothing of onnxruntime's operators."""
    path = graph("traced", "gemma3", fmt, interchange_contract)
    ids, config = random_ids(2, 12), config_of("gemma3")
    run = InterchangeGraph(path, config, 2)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)} | run.past
    found = ReferenceEvaluator(onnx.load(path)).run(["logits"], feed)[0]
    assert difference(found, run.run(ids, np.ones_like(ids))) < TOLERANCE


@each_generation
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_onnxruntime_runs_quantized_products_on_packed_weights(graph, generation, fmt, tmp_path):
    """What a traced bundle's speed stands on: nothing is dequantized."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # that such a file fits this machine only
    ort.InferenceSession(
        graph("traced", generation, fmt, engine_contract),
        options,
        providers=["CPUExecutionProvider"],
    )
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    ops = [node.op_type for node in nodes]
    matrices = [s for s in weight_specs(config_of(generation)).values() if s.kind == "matrix"]
    padded = [s for s in matrices if s.shape[0] % FORMATS[fmt][0].block_size]  # not recognized
    assert ops.count("MatMulNBits") == len(matrices) - len(padded) + 1  # the head
    assert ops.count("DequantizeLinear") == len(padded) < len(matrices)


@pytest.mark.parametrize("fmt", ["fp32", "int8"])
def test_gemma_7b_is_a_small_graph_over_a_weights_file_of_any_size(fmt, tmp_path):
    config = named_config("gemma_7b")
    file = WeightsFile(tmp_path / WEIGHTS_FILE)
    with file:
        plan = note_without_writing(config, FORMATS[fmt][0], file)
    for contract in (engine_contract(config), interchange_contract(config)):
        model = build_traced_graph(config, plan, file, contract, 8192)
        proto = ir.to_proto(model)
        assert proto.ByteSize() < MOST_BYTES
        outside = {
            t.name: sum(int(e.value) for e in t.external_data if e.key == "length")
            for t in proto.graph.initializer
            if t.data_location == onnx.TensorProto.EXTERNAL
        }
        assert sum(outside.values()) > (34e9 if fmt == "fp32" else 9e9)
        assert max(len(t.raw_data) for t in proto.graph.initializer) <= 4 * 128


def note_without_writing(config, fmt, file):
    """Fill the table of a weights file as `store_weights` would, and write nothing."""
    position, plan = 0, {}

    def note(name, dtype, shape):
        nonlocal position
        num_bytes = math.prod(shape) * dtype.itemsize
        file.tensors[name] = StoredTensor(dtype, shape, position, int(num_bytes))
        position += num_bytes

    for name, spec in weight_specs(config).items():
        if spec.kind == "norm" or not fmt.quantized:
            note(name, ir.DataType.FLOAT, spec.shape)
        else:
            rows, width = spec.shape if spec.kind == "table" else spec.shape[::-1]
            blocks = width // fmt.block_size
            note(f"{name}.quantized", ir.DataType.UINT8, (rows, blocks, fmt.block_size))
            file.add_view(f"{name}.rows", f"{name}.quantized", (rows, width))
            note(f"{name}.scales", ir.DataType.FLOAT, (rows, blocks))
        if spec.kind != "norm":
            plan[name] = fmt
    return plan


def test_what_varies_from_trace_to_trace_does_not_show(graph, stored, monkeypatch):
    """tf2onnx numbers names, and orders nodes and constants, as its sets happen to be ordered."""
    file, plan = stored("traced", "gemma2", "int8")
    config = config_of("gemma2")
    first = graph("traced", "gemma2", "int8", engine_contract).read_bytes()
    others = {n: otherwise_written(fragment) for n, fragment in traced.trace(config).items()}
    monkeypatch.setattr(traced, "trace", lambda config: others)
    again = build_traced_graph(config, plan, file, engine_contract(config), CAPACITY)
    assert save(again, file, "traced-again.onnx").read_bytes() == first


def otherwise_written(fragment):
    """The same graph under other names, in another order that is valid too."""
    model, rng = onnx.ModelProto.FromString(fragment), np.random.default_rng(0)
    graph = model.graph
    kept = {value.name for value in (*graph.input, *graph.output)}

    def renamed(name):
        return name if name in kept or not name else f"x{zlib.crc32(name.encode())}"

    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        node.name = renamed(node.name)
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    del graph.value_info[:]
    constants, nodes = list(graph.initializer), list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(constants[i] for i in rng.permutation(len(constants)))
    known = kept | {""} | {tensor.name for tensor in constants}
    known -= {value.name for value in graph.output}
    while nodes:
        ready = [node for node in nodes if known.issuperset(node.input)]
        node = ready[rng.integers(len(ready))]
        nodes.remove(node)
        graph.node.append(node)
        known.update(node.output)
    assert model.SerializeToString() != fragment
    return model.SerializeToString()


# --- bundles -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {
        lowering: export_onnx(
            checkpoint_of("gemma2"), folder / lowering, "fp32", lowering=lowering, verify=False
        ).path
        for lowering in LOWERINGS
    }


def test_the_engine_says_the_same_with_either_bundle(bundles):
    said, logits = {}, {}
    for lowering, path in bundles.items():
        bundle = Bundle.open(path)
        assert bundle.manifest["lowering"] == lowering
        engine = Engine(bundle, threads=1)
        ids = random_ids(1)[0].tolist()
        logits[lowering] = np.concatenate(list(engine.all_logits(ids)))
        engine.rewind(10)
        logits[lowering] = np.append(logits[lowering], [engine.prefill(ids[20:])], axis=0)
        generator = Generator(engine, Tokenizer(bundle))
        said[lowering] = generator.generate(ids[:20], Sampler(temperature=0), 60).ids
    assert difference(logits["traced"], logits["fused"]) < TOLERANCE
    assert said["traced"] == said["fused"]
    assert len(set(said["traced"])) > 3


def test_pieces_of_a_traced_graph_give_what_the_engine_gives(bundles):
    ids, config = random_ids(1), config_of("gemma2")
    positions = np.arange(ids.shape[1])
    found = logits_in_chunks(bundles["traced"], config, ids, positions, chunk_bytes=50_000)
    engine = Engine(Bundle.open(bundles["traced"]), threads=1)
    expected = np.concatenate(list(engine.all_logits(ids[0].tolist())))
    assert difference(found, expected) < TOLERANCE


def test_both_lowerings_read_one_weights_file(bundles):
    fused, found = ((path / WEIGHTS_FILE).read_bytes() for path in bundles.values())
    assert found == fused


@pytest.mark.keras
def test_export_of_a_keras_model_on_any_backend(tmp_path):
    """Traced on TensorFlow in its own process, verified against the model on this one's backend."""
    from gemma_keras import GemmaCausalLM

    checkpoint = checkpoint_of("gemma3").as_checkpoint()
    model = GemmaCausalLM.from_checkpoint(checkpoint, dtype="float32")
    result = model.export(tmp_path / "out", format="onnx", recipe="fp32", lowering="traced")
    assert result.quality.mean_kl < 1e-8
    assert result.quality.same_top_token == 1
    assert result.quality.max_logit_difference < TOLERANCE * result.quality.logit_spread
    graph = onnx.load(result.path / "engine.onnx", load_external_data=False).graph
    assert {node.domain for node in graph.node} == {""}


# --- requests and failures -----------------------------------------------------------------------


def test_an_unknown_lowering_is_refused(tmp_path):
    with pytest.raises(ExportRequestError, match=r"no lowering 'upper'.*fused, traced"):
        export_onnx(checkpoint_of("gemma"), tmp_path / "out", lowering="upper")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fmt", "words"), [(Format(2, 32), "2 bits"), (FORMATS["int8"][1], "2 planes")]
)
def test_a_format_without_standard_operators_is_refused(stored, fmt, words):
    file, plan = stored("traced", "gemma", "fp32")
    config = config_of("gemma")
    plan = plan | {"token_embedding": fmt}
    with pytest.raises(ExportRequestError, match=f"token_embedding in {words}"):
        build_traced_graph(config, plan, file, engine_contract(config), CAPACITY)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo noise >&2; echo \"ModuleNotFoundError: No module named 'tf2onnx'\" >&2; exit 1",
         r"No module named 'tf2onnx'; run: pip install 'gemma-keras\[export\]'$"),
        ("echo 'ValueError: what it was' >&2; exit 1", "on TensorFlow: ValueError: what it was$"),
        ("kill -9 $$", "signal 9 ended the process, perhaps because memory was short"),
        ("exit 3", "exit status 3$"),
    ],
    ids=["package", "error", "signal", "silent"],
)  # fmt: skip
def test_a_trace_that_fails_is_one_sentence(monkeypatch, tmp_path, script, reason):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(traced.sys, "executable", str(python))
    config = dataclasses.replace(config_of("gemma"), norm_epsilon=1e-5)  # traced by no other test
    with pytest.raises(ExportError, match=reason) as caught:
        traced.trace(config)
    assert "\n" not in str(caught.value)


@pytest.mark.keras
def test_a_configuration_that_cannot_be_traced_says_why(monkeypatch, tmp_path, capsys):
    from export.graph import trace_keras

    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"layers": []})))
    monkeypatch.setattr("sys.argv", ["trace_keras", str(tmp_path)])
    assert trace_keras.main() == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("ConfigError: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupted_export_ends_the_trace(tmp_path, number):
    meta = metadata("gemma", 1)
    source = write_gguf(tmp_path / "tiny.gguf", meta, tensors(meta))
    command = [sys.executable, "-m", "export.cli", source, tmp_path / "out"]
    options = ["--recipe", "fp32", "--lowering", "traced", "--no-verify"]
    export = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    child = wait_for(lambda: child_of(export.pid, "export.graph.trace_keras"))
    export.send_signal(number)
    _, said = export.communicate(timeout=60)
    assert export.returncode == 130, said
    assert said.splitlines()[-1] == "export-onnx: interrupted; nothing was kept"
    wait_for(lambda: not Path(f"/proc/{child}").exists())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def child_of(pid, module):
    """The process that `pid` has started to run a module, or `None`."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if module in Path(f"/proc/{child}/cmdline").read_text():
            return int(child)
    return None


def wait_for(found, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.02)
    raise AssertionError("it did not come to that in time")
