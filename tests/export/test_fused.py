"""The exported graphs against the Keras model of the same weights, for each generation."""

from __future__ import annotations

import dataclasses
import json
import platform
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from keras import ops
from onnx import numpy_helper

from edge_demo.bundle.embedding import EmbeddingTable
from edge_demo.bundle.reader import Bundle
from edge_demo.engine import float_prompts
from edge_demo.engine.runner import Engine
from export import export_onnx
from export.errors import ExportError
from export.formats.formats import Format, plan_bytes
from export.formats.packing import unpack_bits
from export.formats.recipes import plan_for_recipe
from export.graph import one_token
from export.graph.contract import WEIGHTS_FILE, engine_contract, interchange_contract, windows
from gemma_keras import GemmaBackbone, GemmaCausalLM, open_checkpoint
from gemma_keras.checkpoints.names import weight_specs
from tests.edge_demo.make_bundles import WIDE
from tests.models import GENERATIONS, WINDOW, write_tiny_hf

pytestmark = pytest.mark.keras

LENGTH = 100  # more than the engine scores at once, and many windows of 7
GRAPHS = ("model.onnx", "engine.onnx")
each_generation = pytest.mark.parametrize("generation", GENERATIONS)
each_recipe = pytest.mark.parametrize("recipe", ["fp32", "int8"])
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Generation to a checkpoint folder and the Keras model of it, each made once."""
    made = {}

    def get(generation, tied=True):
        if (generation, tied) not in made:
            folder = tmp_path_factory.mktemp(generation) / "checkpoint"
            write_tiny_hf(folder, generation, tied=tied)
            model = GemmaCausalLM.from_preset(folder, dtype="float32")
            made[generation, tied] = SimpleNamespace(folder=folder, model=model)
        return made[generation, tied]

    return get


@pytest.fixture(scope="module")
def exported(tiny):
    """Generation and recipe to the bundle that is made from the checkpoint folder."""
    made = {}

    def get(generation, recipe, tied=True):
        if (generation, recipe, tied) not in made:
            folder = tiny(generation, tied).folder
            out = folder.with_name(recipe)
            made[generation, recipe, tied] = export_onnx(folder, out, recipe, verify=False).path
        return Bundle.open(made[generation, recipe, tied])

    return get


def random_ids(batch_size=1, length=LENGTH, seed=1):
    return np.random.default_rng(seed).integers(4, 300, (batch_size, length)).astype("int32")


def relative_difference(found, expected):
    """Greatest difference in units of the expected values' standard deviation."""
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / expected.std()


def mean_kl(reference, found):
    """Of the next-token distributions, in nats, float64 `(..., vocabulary_size)` or wider."""

    def log_softmax(logits):
        logits = logits.astype("float64") - logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(found)
    return (np.exp(p) * (p - q)).sum(axis=-1).mean()


def engine_of(bundle):
    return Engine(bundle, threads=1)


def engine_logits(bundle, ids):
    return np.concatenate(list(engine_of(bundle).all_logits(ids[0].tolist())))[None]


class Interchange:
    """`model.onnx` run as other runtimes run it: the past is an input and grows."""

    def __init__(self, bundle):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = bundle.path / "model.onnx"
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.past = {}

    def run(self, ids, mask):
        feed = {"input_ids": ids.astype("int64"), "attention_mask": mask.astype("int64")}
        for spec in self.session.get_inputs()[2:]:
            _, heads, _, head_dim = spec.shape
            empty = np.zeros((len(ids), heads, 0, head_dim), "float32")
            feed[spec.name] = self.past.get(spec.name, empty)
        logits, *presents = self.session.run(None, feed)
        names = (spec.name for spec in self.session.get_inputs()[2:])
        self.past = dict(zip(names, presents, strict=True))
        return logits


# --- float32: the same logits --------------------------------------------------------------------


@pytest.mark.spread
@each_generation
@tied_or_not
def test_fp32_engine_gives_the_logits_of_the_keras_model(
    tiny, exported, generation, tied, record_property
):
    ids = random_ids()
    found = engine_logits(exported(generation, "fp32", tied), ids)
    difference = relative_difference(found, tiny(generation, tied).model.logits(ids))
    record_property(f"{generation} fp32 bundle, greatest difference / spread", f"{difference:.1e}")
    assert difference < 1e-4


@pytest.mark.spread
@each_generation
def test_fp32_engine_token_by_token_gives_the_logits_of_the_keras_model(tiny, exported, generation):
    ids = random_ids()
    engine = engine_of(exported(generation, "fp32"))
    found = np.stack([engine.decode(token).copy() for token in ids[0].tolist()])
    assert relative_difference(found[None], tiny(generation).model.logits(ids)) < 1e-4


@pytest.mark.spread
@each_generation
@pytest.mark.parametrize("prefill", [1, WINDOW - 1, WINDOW, WINDOW + 1, LENGTH - 1])
def test_fp32_engine_continues_a_prefill(tiny, exported, generation, prefill):
    ids = random_ids()
    engine = engine_of(exported(generation, "fp32"))
    found = [engine.prefill(ids[0, :prefill].tolist()), engine.decode(int(ids[0, prefill]))]
    expected = tiny(generation).model.logits(ids)[0, prefill - 1 : prefill + 1]
    assert relative_difference(np.stack(found), expected) < 1e-4


@pytest.mark.spread
@each_generation
@tied_or_not
def test_interchange_graph_gives_the_logits_of_the_keras_model(tiny, exported, generation, tied):
    ids = random_ids(batch_size=3)
    found = Interchange(exported(generation, "fp32", tied)).run(ids, np.ones_like(ids))
    assert relative_difference(found, tiny(generation, tied).model.logits(ids)) < 1e-4


@pytest.mark.spread
@each_generation
def test_interchange_graph_continues_over_its_growing_past(tiny, exported, generation):
    ids = random_ids(batch_size=3, length=30)
    graph = Interchange(exported(generation, "fp32"))
    found, start = [], 0
    for length in [WINDOW + 3, *[1] * (30 - WINDOW - 3)]:
        mask = np.ones((3, start + length))
        found.append(graph.run(ids[:, start : start + length], mask))
        start += length
    expected = tiny(generation).model.logits(ids)
    assert relative_difference(np.concatenate(found, axis=1), expected) < 1e-4


@pytest.mark.spread
@each_generation
@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_interchange_graph_gives_the_engines_logits_to_the_last_bit(exported, generation, recipe):
    """So another runtime that picks the likeliest token picks ours, ties and rounding and all.

    As many rows as it: some processors sum one row of 4-bit products in another order than several.
    """
    bundle = exported(generation, recipe)
    ids = random_ids()
    engine, graph = engine_of(bundle), Interchange(bundle)
    found = list(next(engine.all_logits(ids[0, :11].tolist())))
    expected = list(graph.run(ids[:, :11], np.ones((1, 11)))[0])
    for length in range(12, LENGTH + 1):
        found.append(engine.decode(int(ids[0, length - 1])).copy())
        expected.append(graph.run(ids[:, length - 1 : length], np.ones((1, length)))[0, -1])
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))


@pytest.mark.spread
@each_generation
def test_interchange_graph_ignores_padding_on_the_right(tiny, exported, generation):
    ids, model = random_ids(batch_size=3, length=31), tiny(generation).model
    mask = np.ones_like(ids)
    mask[1, 15:30] = 0
    graph = Interchange(exported(generation, "fp32"))
    found = graph.run((ids * mask)[:, :30], mask[:, :30])
    expected = model.logits(ids)
    assert relative_difference(found[1, :15], expected[1, :15]) < 1e-4
    assert relative_difference(found[::2], expected[::2, :30]) < 1e-4
    # the next token of the shorter row follows its last real one
    found = graph.run(ids[:, 30:], mask)
    shorter = model.logits(np.append(ids[1, :15], ids[1, 30])[None])
    assert relative_difference(found[::2], expected[::2, 30:]) < 1e-4
    assert relative_difference(found[1, 0], shorter[0, -1]) < 1e-4


def test_layers_that_differ_in_the_scale_of_rotation_alone_are_kept_apart(tiny, tmp_path):
    model = tiny("gemma3").model
    config = model.backbone.config
    layers = tuple(dataclasses.replace(layer, rope_theta=100.0) for layer in config.layers)
    assert {layer.rope_scale for layer in layers} == {1, 8}
    config = dataclasses.replace(config, layers=layers)
    backbone = GemmaBackbone(config, dtype="float32", kernel_initializer="zeros")
    backbone.load_weight_source(model.backbone.weight_source())
    alike = GemmaCausalLM(backbone, model.preprocessor)
    out = alike.export(tmp_path / "out", format="onnx", recipe="fp32", verify=False).path
    ids = random_ids()
    assert relative_difference(engine_logits(Bundle.open(out), ids), alike.logits(ids)) < 1e-4


def test_the_small_models_have_what_can_go_wrong(tiny):
    """Query scales that are no function of head_dim (as in 27B), caps, windows, scaled rotation."""
    configs = {generation: tiny(generation).model.backbone.config for generation in GENERATIONS}
    for generation in ("gemma2", "gemma3"):
        config = configs[generation]
        scales = {layer.query_scale for layer in config.layers}
        widths = {layer.head_dim for layer in config.layers}
        widths |= {config.hidden_dim // layer.num_heads for layer in config.layers}
        assert not scales & {width**-0.5 for width in widths}
        assert {layer.sliding_window for layer in config.layers} == {None, WINDOW}
    assert configs["gemma2"].final_soft_cap
    assert all(layer.attention_soft_cap for layer in configs["gemma2"].layers)
    ropes = {(layer.rope_theta, layer.rope_scale) for layer in configs["gemma3"].layers}
    assert len(ropes) == 2
    for config in configs.values():
        assert all(1 < layer.num_kv_heads < layer.num_heads for layer in config.layers)


# --- int8: near, and exactly what was stored -----------------------------------------------------


@pytest.mark.spread
@each_generation
@tied_or_not
def test_int8_stays_near_the_keras_model(tiny, exported, generation, tied, record_property):
    ids = random_ids()
    reference = tiny(generation, tied).model.logits(ids)
    divergence = mean_kl(reference, engine_logits(exported(generation, "int8", tied), ids))
    record_property(f"{generation} int8 bundle, mean KL", f"{divergence:.4f}")
    # small random models magnify what rounding does; gemma2's caps hold it back
    assert divergence < (0.01 if generation == "gemma2" else 0.05)


def initializers(path):
    """Name to array of an ONNX file, those in the weights file too."""
    model = onnx.load(path, load_external_data=False)
    return {t.name: numpy_helper.to_array(t, str(path.parent)) for t in model.graph.initializer}


def stored_weights(bundle, config):
    """What an int8 bundle holds, as canonical weights in float32."""
    stored, weights = initializers(bundle.path / "model.onnx"), {}
    for i in range(len(config.layers)):  # what is stored together
        for first, second in (("attention.key", "attention.value"), ("mlp.gate", "mlp.up")):
            whole = f"layers.{i}.{first}+{second.rpartition('.')[2]}"
            for part in ("quantized", "scales"):
                halves = np.split(stored[f"{whole}.{part}"], 2)
                for name, rows in zip((first, second), halves, strict=True):
                    stored[f"layers.{i}.{name}.{part}"] = rows
    for name, spec in weight_specs(config).items():
        if spec.kind == "norm":
            weights[name] = stored[name] - 1
            continue
        fmt = Format(**bundle.manifest["plan"][name])
        scales = stored[f"{name}.scales"][..., None]
        if fmt.planes == 1:
            values = (stored[f"{name}.quantized"].astype("float32") - 128) * scales
        else:
            planes = {}
            for plane in ("high", "low"):
                # an embedding that is not the head too is there as rows only
                packed = stored.get(f"{name}.{plane}", stored.get(f"{name}.{plane}.rows"))
                packed = packed.reshape(*scales.shape[:2], -1)
                planes[plane] = unpack_bits(packed, 4, fmt.block_size).astype("float32")
            zero_points = unpack_bits(stored[f"{name}.zero_points"], 4, scales.shape[1])
            values = (planes["high"] - 8) * scales * 16
            values += (planes["low"] - zero_points[..., None].astype("float32")) * scales
        values = values.reshape(len(scales), -1)
        width = spec.shape[0] if spec.kind == "matrix" else spec.shape[1]
        weights[name] = values[:, :width].T if spec.kind == "matrix" else values[:, :width]
    return weights


def with_exact_activations(bundle):
    """The bundle with an engine graph that does not round activations to 8 bits."""
    model = onnx.load(bundle.path / "engine.onnx", load_external_data=False)
    levels = [
        attribute
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    assert (
        len(levels) == 5 * len(bundle.manifest["model"]["config"]["layers"]) + 2
    )  # the head's planes
    assert {attribute.i for attribute in levels} == {4}
    for attribute in levels:
        attribute.i = 0
    onnx.save(model, bundle.path / "exact.onnx")
    return dataclasses.replace(bundle, engine=dataclasses.replace(bundle.engine, file="exact.onnx"))


@pytest.fixture(scope="module")
def rounded(tiny, exported):
    """Generation to the Keras model with the weights that its int8 bundle holds."""
    made = {}

    def get(generation, tied=True):
        if (generation, tied) not in made:
            config = tiny(generation, tied).model.backbone.config
            backbone = GemmaBackbone(config, dtype="float32", kernel_initializer="zeros")
            backbone.load_weight_source(stored_weights(exported(generation, "int8", tied), config))
            made[generation, tied] = GemmaCausalLM(backbone)
        return made[generation, tied]

    return get


@pytest.mark.spread
@each_generation
@tied_or_not
def test_int8_graph_computes_with_the_weights_that_are_stored(exported, rounded, generation, tied):
    """But for the rounding of activations: packing, scales, padding and layout, by value."""
    ids = random_ids()
    bundle = with_exact_activations(exported(generation, "int8", tied))
    found = engine_logits(bundle, ids)
    assert relative_difference(found, rounded(generation, tied).logits(ids)) < 1e-4


@pytest.mark.spread
@each_generation
def test_prompts_in_float32_leave_what_exact_activations_leave(exported, generation, monkeypatch):
    """But for the last token, which is run as those that follow are."""
    bundle = exported(generation, "int8")
    ids = random_ids()[0].tolist()
    left = {}
    for asked, what in (("1", bundle), ("0", bundle), ("0", with_exact_activations(bundle))):
        monkeypatch.setenv(float_prompts.VARIABLE, asked)
        engine = engine_of(what)
        engine.prefill(ids)
        left[asked, what.engine.file] = engine.snapshot().filled
    expected = left["0", "exact.onnx"]
    differences = [
        max(
            relative_difference(found[name][:, :, :-1], array[:, :, :-1])
            for name, array in expected.items()
        )
        for found in (left["1", "engine.onnx"], left["0", "engine.onnx"])
    ]
    assert differences[0] < 1e-4
    if platform.machine() == "x86_64":  # ARM without dot products does not round either
        assert differences[1] > 1e-3


@pytest.mark.spread
@each_generation
@tied_or_not
def test_the_stored_int8_weights_are_those_of_the_model(
    tiny, rounded, generation, tied, record_property
):
    """Balanced, so other numbers, but the same function as far as 8 bits reach."""
    ids = random_ids()
    reference = tiny(generation, tied).model.logits(ids)
    divergence = mean_kl(reference, rounded(generation, tied).logits(ids))
    record_property(f"{generation} int8 weights, mean KL", f"{divergence:.4f}")
    assert divergence < 0.03


@pytest.mark.spread
@each_generation
def test_int8_table_is_the_embedding_to_half_a_step(tiny, exported, generation):
    model = tiny(generation).model
    found = stored_weights(exported(generation, "int8"), model.backbone.config)["token_embedding"]
    expected = model.backbone.weight_source()["token_embedding"]
    blocks = np.abs(expected).reshape(len(expected), -1, 32).max(axis=-1, keepdims=True)
    error = np.abs(found - expected).reshape(len(expected), -1, 32)
    assert (error <= 0.5001 / 127 * blocks).all()


# --- the files -----------------------------------------------------------------------------------


@pytest.mark.spread
@each_generation
def test_fp32_initializers_are_the_weights_bit_for_bit(tiny, exported, generation):
    bundle = exported(generation, "fp32", tied=False)
    weights = open_checkpoint(tiny(generation, tied=False).folder).weights
    for file in GRAPHS:
        stored = initializers(bundle.path / file)
        for name, spec in weight_specs(tiny(generation, False).model.backbone.config).items():
            if file == "engine.onnx" and name == "token_embedding":
                assert name not in stored  # the device reads its rows
                continue
            expected = weights[name] + np.float32(spec.kind == "norm")
            np.testing.assert_array_equal(stored[name], expected, err_msg=name)


@pytest.mark.spread
@each_generation
def test_every_block_of_the_int8_initializers_uses_its_whole_range(exported, generation):
    """An all-zero or constant weight passes every check of shape and type."""
    stored = initializers(exported(generation, "int8").path / "engine.onnx")
    matrices = [array for name, array in stored.items() if name.endswith(".quantized")]
    tables = [array for name, array in stored.items() if name.endswith(".high")]
    assert matrices and tables
    for array in matrices:
        assert np.isin(array, (1, 255)).any(axis=-1).all()
    for array in tables:
        assert np.isin(unpack_bits(array, 4, 32), (0, 15)).any(axis=-1).all()
    for name, array in stored.items():
        if name.endswith((".scales", "norm")):
            assert (array != 0).all(), name


@pytest.mark.spread
@each_generation
@each_recipe
@pytest.mark.parametrize("file", GRAPHS)
def test_graph_keeps_its_contract(tiny, exported, generation, recipe, file):
    bundle = exported(generation, recipe)
    config = tiny(generation).model.backbone.config
    onnx.checker.check_model(str(bundle.path / file), full_check=False)
    if file == "engine.onnx":
        contract = engine_contract(config, windows(config, bundle.context_length))
    else:
        contract = interchange_contract(config)
    assert contract.file == file
    role = "engine" if file == "engine.onnx" else "interchange"
    as_json = json.loads(json.dumps(dataclasses.asdict(contract)))
    assert bundle.manifest["graphs"][role] == as_json

    model = onnx.load(bundle.path / file, load_external_data=False)
    for found, expected in (
        (model.graph.input, contract.inputs),
        (model.graph.output, contract.outputs),
    ):
        assert [described(value) for value in found] == [dataclasses.astuple(s) for s in expected]


def described(value):
    """Name, dtype and shape of a graph's input or output, as a `TensorSpec` has them."""
    tensor = value.type.tensor_type
    dims = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, dims


@pytest.mark.spread
@each_generation
@each_recipe
@pytest.mark.parametrize("file", GRAPHS)
def test_onnxruntime_loads_the_graph_without_a_warning(exported, generation, recipe, file, capfd):
    path = exported(generation, recipe).path / file
    capfd.readouterr()
    ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert capfd.readouterr() == ("", "")


@each_recipe
@tied_or_not
def test_both_graphs_share_one_weights_file(tiny, exported, recipe, tied):
    bundle = exported("gemma3", recipe, tied)
    places = [external_places(bundle.path / file) for file in GRAPHS]
    rows_alone = places[0].keys() - places[1].keys()
    assert {name: places[0][name] for name in places[0].keys() - rows_alone} == places[1]
    assert all(name.startswith("token_embedding") for name in rows_alone)
    assert {location for location, *_ in places[0].values()} == {WEIGHTS_FILE}
    assert {path.name for path in bundle.path.iterdir()} >= {WEIGHTS_FILE, *GRAPHS}

    config = tiny("gemma3", tied).model.backbone.config
    stored = {place[1:] for place in places[0].values()}
    size = (bundle.path / WEIGHTS_FILE).stat().st_size
    needed = plan_bytes(plan_for_recipe(recipe, config), config)
    assert sum(length for _, length in stored) == needed
    assert needed <= size < needed + 4096 * len(stored)


def external_places(path):
    """Initializer name to file, offset and length, for those outside the ONNX file."""
    places = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = {entry.key: entry.value for entry in tensor.external_data}
            places[tensor.name] = info["location"], int(info["offset"]), int(info["length"])
        else:
            assert len(tensor.raw_data) < 1024, f"{tensor.name} is stored in {path.name}"
    return places


def test_a_tied_table_is_stored_once(exported):
    int8 = external_places(exported("gemma3", "int8").path / "model.onnx")
    for plane in ("high", "low"):
        assert int8[f"token_embedding.{plane}.rows"] == int8[f"token_embedding.{plane}"]
    assert not any(name.startswith("head") for name in int8)
    for file, expected in (
        ("model.onnx", ["Gather", "FusedMatMul"]),
        ("engine.onnx", ["FusedMatMul"]),
    ):
        model = onnx.load(exported("gemma3", "fp32").path / file, load_external_data=False)
        users = [node.op_type for node in model.graph.node if "token_embedding" in node.input]
        assert users == expected


@pytest.mark.spread
@each_generation
@each_recipe
@tied_or_not
def test_the_manifest_says_where_the_rows_of_the_embedding_are(
    tiny, exported, generation, recipe, tied
):
    bundle = exported(generation, recipe, tied)
    config = tiny(generation, tied).model.backbone.config
    table = EmbeddingTable(bundle.path / WEIGHTS_FILE, bundle.embedding)
    if recipe == "int8":
        weights = stored_weights(bundle, config)
    else:
        weights = initializers(bundle.path / "model.onnx")
    scaled = weights["token_embedding"] * np.float32(config.embedding_scale)
    np.testing.assert_array_equal(table.rows(range(300)), scaled)
    places = external_places(bundle.path / "model.onnx")
    names = {"rows": "", "high": ".high.rows", "low": ".low.rows"}
    for part, place in bundle.embedding.parts.items():
        assert places["token_embedding" + names.get(part, f".{part}")][1] == place.offset


# --- from a Keras model --------------------------------------------------------------------------


@pytest.mark.spread
@each_generation
@each_recipe
@tied_or_not
def test_export_of_the_keras_model_writes_the_same_weights(
    tiny, exported, generation, recipe, tied, tmp_path
):
    result = tiny(generation, tied).model.export(
        tmp_path / "out", format="onnx", recipe=recipe, verify=False
    )
    expected = exported(generation, recipe, tied)
    assert (result.path, result.recipe) == (tmp_path / "out", recipe)
    for file in (WEIGHTS_FILE, *GRAPHS, "tokenizer.model"):
        assert (result.path / file).read_bytes() == (expected.path / file).read_bytes(), file


@each_recipe
def test_a_lora_model_is_exported_with_its_weights_merged(tiny, recipe, tmp_path):
    model = GemmaCausalLM.from_preset(tiny("gemma3").folder, dtype="float32")
    ids = random_ids()
    before = model.logits(ids)
    model.backbone.enable_lora(4)
    rng = np.random.default_rng(0)
    for variable in model.backbone.trainable_variables:
        variable.assign(0.1 * rng.normal(size=variable.shape))
    expected = model.logits(ids)
    assert mean_kl(expected, before) > 0.5
    result = model.export(tmp_path / "out", format="onnx", recipe=recipe, verify=False)
    found = engine_logits(Bundle.open(result.path), ids)
    if recipe == "fp32":
        assert relative_difference(found, expected) < 1e-4
    else:
        assert mean_kl(expected, found) < 0.05
    np.testing.assert_array_equal(ops.convert_to_numpy(model.logits(ids)), expected)


def test_another_format_is_left_to_keras(tiny, tmp_path):
    with pytest.raises(ValueError, match="format"):
        tiny("gemma3").model.export(tmp_path / "out", format="papyrus")


# --- the attention of a single token, in bundles for a target ------------------------------------


def test_verification_decodes_tokens_one_by_one_for_a_target(tiny, tmp_path, monkeypatch):
    """A mistake that only single tokens meet is found before a bundle is written."""
    attention = one_token._one_token

    def wrong(graph, layer, *rest):
        return attention(graph, dataclasses.replace(layer, query_scale=30.0), *rest)

    folder = tiny("gemma3").folder
    export_onnx(folder, tmp_path / "good", "fp32", target="armv8.2")
    monkeypatch.setattr(one_token, "_one_token", wrong)
    with pytest.raises(ExportError, match="differs from the Keras model"):
        export_onnx(folder, tmp_path / "bad", "fp32", target="armv8.2")
    assert not (tmp_path / "bad").exists()


def test_integer_keys_of_float_weights_pass_the_verification(tiny, tmp_path):
    found = export_onnx(tiny("gemma3").folder, tmp_path / "out", "fp32", kv_cache_dtype="int8")
    assert found.quality is not None and found.quality.mean_kl < 0.01


def test_windows_have_the_attention_of_a_single_token_but_where_they_are_moved(
    tmp_path, monkeypatch
):
    """Found by a mistake in it: it shows in each token but the one that moves a window."""
    attention, places = one_token._one_token, 64 + 255

    def wrong(graph, layer, given, *rest):
        scale = 30.0 if given.windowed else layer.query_scale
        return attention(graph, dataclasses.replace(layer, query_scale=scale), given, *rest)

    write_tiny_hf(tmp_path / "wide", "gemma3", **WIDE)
    options = {"target": "armv8.2", "verify": False}
    export_onnx(tmp_path / "wide", tmp_path / "good", "fp32", **options)
    monkeypatch.setattr(one_token, "_one_token", wrong)
    export_onnx(tmp_path / "wide", tmp_path / "bad", "fp32", **options)
    good, bad = (Engine(Bundle.open(tmp_path / name), threads=1) for name in ("good", "bad"))
    ids = random_ids(length=2 * places)[0].tolist()
    shown = {}
    for held in (0, 1, 63, 64, places - 1, places, places + 1, places + 255, places + 256):
        for engine in (good, bad):
            engine.rewind(0)
            engine.hold(ids[:held])
        found = [engine.decode(ids[held]).copy() for engine in (good, bad)]
        shown[held] = relative_difference(*found) > 1e-3
    # a first token sees itself alone, whatever the scale
    assert [held for held, seen in shown.items() if not seen] == [0, places, places + 256]
