"""Rounding to 8 bits and the weights file, against slow arithmetic and onnxruntime's operators."""

from __future__ import annotations

import gguf
import hypothesis.extra.numpy as hnp
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from export.errors import ExportRequestError
from export.quantize.formats import (
    RECIPES,
    Format,
    plan_bytes,
    plan_for_recipe,
    quantize_rows,
    rows_and_inputs,
)
from export.store import store_weights
from export.weights_file import WeightsFile
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig, LayerSpec

ORT_BLOCKS = (16, 32, 64)  # sizes that onnxruntime's operators take
ANY_BLOCK = st.integers(1, 40)
# Below this a block's scale is a denormal number, and the block is stored as zeros.
TINY = 1.3e-35

BOUND = 2.0**127  # float32 ends at twice that
everyday = st.floats(-4, 4, width=32)
any_value = st.one_of(
    everyday,
    st.just(0.0),
    st.floats(-BOUND, BOUND, width=32),
    st.floats(-(2.0**-120), 2.0**-120, width=32),  # denormals too
    st.sampled_from([BOUND, -BOUND, 2.0**-149, -(2.0**-133), 127.0, 63.5]),
)


@st.composite
def matrices(draw, blocks=ANY_BLOCK, values=any_value, max_rows=6, max_inputs=90):
    """Rows float32 `[outputs, inputs]` and a block size, seldom one that divides the inputs."""
    shape = draw(st.integers(1, max_rows)), draw(st.integers(1, max_inputs))
    fill = st.one_of(st.just(0.0), values)
    return draw(hnp.arrays(np.float32, shape, elements=values, fill=fill)), draw(blocks)


def dequantize(packed, scales, num_inputs):
    """What onnxruntime documents: `(stored - 128) * scale`; padding cut off."""
    values = (packed.astype(np.float32) - 128) * scales[..., None]
    return values.reshape(len(packed), -1)[:, :num_inputs]


def quantize_slowly(rows, block_size):
    """One value at a time in float64: scales, and for each value the exact, unrounded level."""
    num_blocks = -(-rows.shape[1] // block_size)
    scales = np.zeros((len(rows), num_blocks), np.float32)
    levels = np.zeros((len(rows), num_blocks, block_size))
    for r, row in enumerate(rows):
        for b in range(num_blocks):
            block = row[b * block_size : (b + 1) * block_size]
            scales[r, b] = max(abs(float(v)) for v in block) / 127
            for i, value in enumerate(block):
                if max(abs(float(v)) for v in block) > TINY:
                    levels[r, b, i] = float(value) / float(scales[r, b])
    return scales, levels


# --- quantize_rows -------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(matrices())
def test_levels_are_the_nearest_and_scales_the_greatest_magnitude_over_127(case):
    rows, block_size = case
    packed, scales = quantize_rows(rows, Format(8, block_size))
    expected_scales, exact_levels = quantize_slowly(rows, block_size)
    assert packed.dtype == np.uint8
    assert packed.shape == exact_levels.shape
    np.testing.assert_allclose(scales, expected_scales, rtol=2e-7, atol=2e-45)
    # half a level, and what float32 loses in two operations on numbers up to 127
    assert np.abs(packed.astype(float) - 128 - exact_levels).max() <= 0.5 + 127 * 2.5e-7


@settings(max_examples=300, deadline=None)
@given(matrices())
def test_round_trip_errs_by_half_a_step_at_most(case):
    rows, block_size = case
    packed, scales = quantize_rows(rows, Format(8, block_size))
    error = np.abs(dequantize(packed, scales, rows.shape[1]).astype(float) - rows)
    steps = np.repeat(scales, block_size, axis=1)[:, : rows.shape[1]].astype(float)
    assert (error <= np.where(steps > 1.1e-37, 0.5001 * steps, TINY)).all()


@settings(max_examples=150, deadline=None)
@given(matrices())
def test_the_greatest_value_of_a_block_is_kept_and_padding_is_zero(case):
    rows, block_size = case
    packed, scales = quantize_rows(rows, Format(8, block_size))
    levels = packed.astype(int) - 128
    greatest = np.abs(levels).max(axis=-1)
    assert (greatest[scales > 1.1e-37] == 127).all()
    assert (greatest[scales == 0] == 0).all()
    assert (levels.reshape(len(rows), -1)[:, rows.shape[1] :] == 0).all()


@settings(max_examples=150, deadline=None)
@given(matrices(blocks=st.just(1)))
def test_blocks_of_one_value_keep_it(case):
    rows, _ = case
    packed, scales = quantize_rows(rows, Format(8, 1))
    kept = dequantize(packed, scales, rows.shape[1])
    np.testing.assert_allclose(kept, rows, rtol=2e-7, atol=TINY)


def test_many_rows_are_rounded_in_pieces_like_few():
    rows = np.random.default_rng(0).normal(size=(70_000, 64)).astype(np.float32)  # 18 MB
    packed, scales = quantize_rows(rows, Format(8, 32))
    for first in (0, 32_767, 32_768, 69_999):
        alone = quantize_rows(rows[first : first + 1], Format(8, 32))
        np.testing.assert_array_equal(packed[first : first + 1], alone[0])
        np.testing.assert_array_equal(scales[first : first + 1], alone[1])


@settings(max_examples=150, deadline=None)
@given(matrices(), st.sampled_from(["transposed", "strided", "reversed", "float64"]))
def test_views_give_what_contiguous_rows_give(case, kind):
    rows, block_size = case
    match kind:
        case "transposed":
            view = np.ascontiguousarray(rows.T).T
        case "strided":
            wide = np.full((2 * len(rows), 3 * rows.shape[1]), np.float32(9))
            view = wide[::2, 1::3]
            view[:] = rows
        case "reversed":
            view = np.ascontiguousarray(rows[::-1, ::-1])[::-1, ::-1]
        case "float64":
            view = rows.astype(np.float64)
    np.testing.assert_array_equal(view, rows)
    fmt = Format(8, block_size)
    for found, expected in zip(quantize_rows(view, fmt), quantize_rows(rows, fmt), strict=True):
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_q8_0_tensor_keeps_its_values_bit_for_bit(num_rows, num_blocks, seed):
    rng = np.random.default_rng(seed)
    # sizes down to where float16 scales are denormal, then 0
    sizes = 10 ** rng.uniform(-7, 4, (num_rows, num_blocks, 1))
    rows = rng.normal(size=(num_rows, num_blocks, 32)) * sizes
    rows[rng.random(rows.shape) < 0.1] = 0
    rows = rows.reshape(num_rows, -1).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quantize(rows, kind)
    source = gguf.dequantize(blocks, kind).reshape(rows.shape)
    packed, scales = quantize_rows(source, Format(8, 32))
    np.testing.assert_array_equal(dequantize(packed, scales, rows.shape[1]), source)
    # and so are scales and integers: 2 bytes of float16 scale, then 32 of int8, a block
    raw = blocks.reshape(*scales.shape, 34)
    stored_scales = raw[..., :2].copy().view(np.float16)[..., 0]
    in_use = (source.reshape(packed.shape) != 0).any(axis=-1)
    np.testing.assert_array_equal(scales[in_use], stored_scales[in_use].astype(np.float32))
    levels = packed.astype(np.int16) - 128
    np.testing.assert_array_equal(levels[in_use], raw[in_use][:, 2:].view(np.int8))


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="8 bits, not 4"):
        quantize_rows(np.zeros((1, 32), np.float32), Format(4, 32))


# --- onnxruntime reads the same values -----------------------------------------------------------


def run_node(node, inputs, initializers):
    """The one output of a graph of one node."""
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in inputs.items()
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(a, n) for n, a in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@settings(max_examples=25, deadline=None)
@given(matrices(blocks=st.sampled_from(ORT_BLOCKS), values=st.one_of(everyday, st.just(0.0))))
def test_onnxruntime_multiplies_by_the_dequantized_matrix(case):
    rows, block_size = case
    packed, scales = quantize_rows(rows, Format(8, block_size))
    num_rows, num_inputs = rows.shape
    node = helper.make_node(
        "MatMulNBits",
        ["identity", "packed", "scales"],
        ["out"],
        domain="com.microsoft",
        N=num_rows,
        K=num_inputs,
        bits=8,
        block_size=block_size,
        accuracy_level=0,
    )
    found = run_node(
        node,
        {"identity": np.eye(num_inputs, dtype=np.float32)},
        {"packed": packed, "scales": scales},
    )
    np.testing.assert_array_equal(found.T, dequantize(packed, scales, num_inputs))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from(ORT_BLOCKS), st.integers(0, 99))
def test_onnxruntime_gathers_the_dequantized_rows(num_rows, num_blocks, block_size, seed):
    shape = num_rows, num_blocks * block_size
    rows = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    packed, scales = quantize_rows(rows, Format(8, block_size))
    node = helper.make_node(
        "GatherBlockQuantized",
        ["rows", "ids", "scales"],
        ["out"],
        domain="com.microsoft",
        bits=8,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    ids = np.arange(num_rows)[::-1].copy()
    found = run_node(node, {"ids": ids}, {"rows": packed.reshape(shape), "scales": scales})
    np.testing.assert_array_equal(found, dequantize(packed, scales, shape[1])[::-1])


# --- plans and the weights file ------------------------------------------------------------------


def config_of(hidden_dim=64, ffw_dim=40, vocabulary_size=50, num_layers=2, tied=True, **layer):
    layer = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "query_scale": 0.3} | layer
    return GemmaConfig(
        vocabulary_size=vocabulary_size,
        hidden_dim=hidden_dim,
        layers=(LayerSpec(ffw_dim=ffw_dim, **layer),) * num_layers,
        embedding_scale=8.0,
        tied_head=tied,
    )


@st.composite
def configs(draw):
    return config_of(
        hidden_dim=32 * draw(st.integers(1, 3)),
        ffw_dim=draw(st.integers(1, 90)),
        vocabulary_size=draw(st.integers(1, 200)),
        num_layers=draw(st.integers(1, 3)),
        tied=draw(st.booleans()),
        head_dim=2 * draw(st.integers(1, 20)),
        qk_norm=draw(st.booleans()),
        post_norms=draw(st.booleans()),
    )


def random_weights(config, seed=0):
    rng = np.random.default_rng(seed)
    specs = weight_specs(config).values()
    return {spec.name: rng.normal(size=spec.shape).astype(np.float32) for spec in specs}


def store(path, config, recipe):
    """Store random weights; the weights, the plan, and what the file says it holds."""
    weights, plan = random_weights(config), plan_for_recipe(recipe, config)
    with WeightsFile(path) as file:
        store_weights(config, weights, plan, file, lambda done, total: None)
    return weights, plan, file


@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=30, deadline=None)
@given(config=configs())
def test_plan_bytes_is_the_size_of_what_is_stored(recipe, config, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "weights"
    _, plan, file = store(path, config, recipe)
    stored = {t.offset: t.num_bytes for t in file.tensors.values()}
    assert sum(stored.values()) == plan_bytes(plan, config)
    assert plan_bytes(plan, config) <= path.stat().st_size
    assert path.stat().st_size <= plan_bytes(plan, config) + 4096 * len(stored)


@pytest.mark.parametrize("recipe", RECIPES)
def test_stored_tensors_lie_aligned_one_after_the_other(recipe, tmp_path):
    _, _, file = store(tmp_path / "weights", config_of(tied=False), recipe)
    end = 0
    for offset, size in sorted({t.offset: t.num_bytes for t in file.tensors.values()}.items()):
        alignment = 4096 if size >= 4096 else 64
        assert offset == -(-end // alignment) * alignment
        end = offset + size
    assert (tmp_path / "weights").stat().st_size == end


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tied", [True, False])
def test_stored_bytes_are_the_weights(recipe, tied, tmp_path):
    config = config_of(tied=tied, qk_norm=True, post_norms=True)
    weights, plan, file = store(tmp_path / "weights", config, recipe)
    data = (tmp_path / "weights").read_bytes()

    def read(name, dtype):
        tensor = file.tensors[name]
        flat = np.frombuffer(data, dtype, offset=tensor.offset, count=int(np.prod(tensor.shape)))
        assert tensor.dtype.numpy() == dtype
        assert flat.nbytes == tensor.num_bytes
        return flat.reshape(tensor.shape)

    for name, spec in weight_specs(config).items():
        if spec.kind == "norm":
            np.testing.assert_array_equal(read(name, np.float32), 1 + weights[name])
        elif not plan[name].quantized:
            np.testing.assert_array_equal(read(name, np.float32), weights[name])
        else:
            num_rows, num_inputs = rows_and_inputs(spec)
            packed, scales = read(f"{name}.quantized", np.uint8), read(f"{name}.scales", np.float32)
            assert len(packed) == num_rows
            kept = dequantize(packed, scales, num_inputs)
            kept = kept.T if spec.kind == "matrix" else kept
            steps = np.abs(weights[name]).max() / 127
            assert np.abs(kept - weights[name]).max() <= 0.5001 * steps
            if spec.kind == "table":
                rows = read(f"{name}.rows", np.uint8)
                np.testing.assert_array_equal(rows, packed.reshape(spec.shape))


def test_progress_counts_every_parameter_once(tmp_path):
    config, told = config_of(), []
    with WeightsFile(tmp_path / "weights") as file:
        plan = plan_for_recipe("fp32", config)
        store_weights(config, random_weights(config), plan, file, lambda *args: told.append(args))
    total = sum(int(np.prod(spec.shape)) for spec in weight_specs(config).values())
    assert told == sorted(told)
    assert told[-1] == (total, total)


def test_a_name_is_stored_once_and_a_view_covers_its_tensor(tmp_path):
    with WeightsFile(tmp_path / "weights") as file:
        file.add("a", np.zeros((2, 3), np.float32))
        with pytest.raises(ValueError, match="a is stored already"):
            file.add("a", np.zeros(1, np.float32))
        with pytest.raises(ValueError, match="differ in size"):
            file.add_view("b", "a", (7,))


def test_an_unknown_recipe_is_refused_with_those_there_are():
    with pytest.raises(ExportRequestError, match=r"'int3'; choose one of fp32, int8"):
        plan_for_recipe("int3", config_of())


@pytest.mark.parametrize("hidden_dim", [16, 80, 97])
def test_int8_refuses_a_width_that_its_blocks_do_not_divide(hidden_dim):
    config = config_of(hidden_dim=hidden_dim)
    with pytest.raises(ExportRequestError, match=rf"blocks of 32.*hidden_dim \({hidden_dim}\)"):
        plan_for_recipe("int8", config)
    assert plan_for_recipe("fp32", config)
