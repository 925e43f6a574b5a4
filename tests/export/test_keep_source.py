"""What the source holds as small integers is stored as it is: by value, in numpy and onnxruntime."""

from __future__ import annotations

import json

import gguf
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from export import export_onnx
from export.formats.formats import Format, plan_to_json
from export.formats.keep_source import best_format, keep, keep_or_round, kept_weights
from export.formats.packing import Quantized, split_planes, stored_tensors
from export.formats.recipes import INT4, INT8
from export.formats.round_to_nearest import round_to_nearest
from export.graph.store_weights import store_weights
from export.graph.weights_file import WeightsFile
from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.gguf.config import config_from_gguf
from gemma_keras.checkpoints.gguf.file import GGUFFile
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.checkpoints.quantized_grid import QuantizedGrid
from tests import gguf_files

TWO_PLANES = Format(8, 32, symmetric=False, planes=2)

Type = gguf.GGMLQuantizationType
SYMMETRIC = {
    Type.Q4_0: Format(4, 32),
    Type.Q5_0: Format(8, 32),
    Type.Q8_0: Format(8, 32),
    Type.Q6_K: Format(8, 16),
}
WITH_MINIMA = [Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K]


def by_name(kind):
    return kind.name


@pytest.fixture
def grid_of(tmp_path):
    """Raw blocks to what they are as a grid."""

    def read(kind, blocks):
        return GGUFFile(gguf_files.write_raw_blocks(tmp_path / "t.gguf", kind, blocks)).grid("t")

    return read


def of_levels(levels, scales, zero_points, bits, block_size):
    """A grid without offsets of `[rows, inputs]` levels."""
    levels, scales = np.asarray(levels, np.uint8), np.asarray(scales, np.float32)
    zeros = np.broadcast_to(np.asarray(zero_points, np.int16), scales.shape)
    return QuantizedGrid(levels, scales, zeros, None, bits, block_size)


def is_kept(grid: QuantizedGrid, fmt: Format) -> Quantized:
    """Assert that a format keeps every value, in valid levels; what it keeps."""
    kept = keep(grid, fmt)
    assert kept is not None
    np.testing.assert_array_equal(kept.values(fmt, grid.num_inputs), grid.values())
    assert (kept.levels < 1 << fmt.bits).all()
    assert (kept.zero_points is None) == fmt.symmetric
    flat = kept.levels.reshape(len(kept.levels), -1)
    zero = fmt.middle if kept.zero_points is None else kept.zero_points[:, -1:]
    assert (flat[:, grid.num_inputs :] == zero).all()  # padding stands for 0
    return kept


# --- GGUF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SYMMETRIC, ids=by_name)
@pytest.mark.parametrize("seed", range(5))
def test_symmetric_types_are_kept_in_the_smallest_format(kind, seed, grid_of):
    grid = grid_of(kind, gguf_files.random_blocks(kind, 5, 3, seed))
    assert best_format(grid) == SYMMETRIC[kind]
    is_kept(grid, SYMMETRIC[kind])
    fewer = best_format(grid, most_bits=4)
    assert fewer == (SYMMETRIC[kind] if kind == Type.Q4_0 else None)


def test_levels_and_scales_of_q4_0_are_stored_as_they_are(grid_of):
    blocks = gguf_files.random_blocks(Type.Q4_0, 4, 2)
    kept = is_kept(grid_of(Type.Q4_0, blocks), Format(4, 32))
    raw = blocks.reshape(4, 2, 18)
    scales = raw[..., :2].copy().view("<f2")[..., 0].astype(np.float32)
    np.testing.assert_array_equal(np.abs(kept.scales), np.abs(scales))
    same = kept.scales == scales
    np.testing.assert_array_equal(kept.levels[same][:, :16], raw[same][:, 2:] & 15)
    np.testing.assert_array_equal(kept.levels[same][:, 16:], raw[same][:, 2:] >> 4)


@pytest.mark.parametrize("kind", WITH_MINIMA, ids=by_name)
def test_minima_that_are_no_multiple_of_the_scale_fit_no_format(kind, grid_of):
    grid = grid_of(kind, gguf_files.random_blocks(kind, 3, 2))
    assert best_format(grid) is None
    for fmt in (Format(4, 32, symmetric=False), Format(8, 32, symmetric=False), Format(8, 16)):
        assert keep(grid, fmt) is None


@pytest.mark.parametrize("zero_point", [0, 3, 15])
def test_minima_that_are_zero_points_are_kept(zero_point, grid_of):
    rng = np.random.default_rng(zero_point)
    raw = gguf_files.random_blocks(Type.Q4_1, 3, 2).reshape(-1, 20)
    raw[:, 4:] = rng.integers(0, 256, (6, 16))
    raw[:, 4] = 0xF0  # a level 0 and a level 15
    scales = rng.uniform(0.1, 1, 6).astype("<f2").view("<u2") & 0xFFF0  # times 15 still a float16
    scales = scales.view("<f2")
    raw[:, :2] = scales[:, None].view(np.uint8)
    raw[:, 2:4] = (scales * np.float16(-zero_point))[:, None].view(np.uint8)
    grid = grid_of(Type.Q4_1, raw.reshape(3, -1))
    assert best_format(grid) == Format(4, 32, symmetric=False)
    kept = is_kept(grid, Format(4, 32, symmetric=False))
    assert (kept.zero_points == zero_point).all()


def test_q4_k_is_kept_where_its_minima_are_zero_points(grid_of):
    raw = gguf_files.random_blocks(Type.Q4_K, 2, 2).reshape(-1, 144)
    raw[:, 2:4] = raw[:, :2]  # the factors of scales and minima are multiples of one number
    raw[:, 4:8] = 1  # scales are once that
    raw[:, 8:12] = 6  # minima 6 times
    raw[:, 12:16] = 6 << 4 | 1
    grid = grid_of(Type.Q4_K, raw.reshape(2, -1))
    kept = is_kept(grid, Format(4, 32, symmetric=False))
    assert (kept.zero_points == 6).all()


# --- any grid ---------------------------------------------------------------------------------


@st.composite
def grids(draw, bits=(2, 3, 4, 8)):
    """Any levels, scales and zero points, with blocks that seldom divide the row."""
    bits, num_inputs = draw(st.sampled_from(bits)), draw(st.integers(1, 150))
    block_size = draw(st.sampled_from([16, 32, 48, 64, 128, 512]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = 3, -(-num_inputs // block_size)
    highest = (1 << bits) - 1
    zeros = rng.integers(0, highest + 1, shape) if draw(st.booleans()) else 1 << (bits - 1)
    scales = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3, shape)
    levels = rng.integers(0, highest + 1, (3, num_inputs))
    return of_levels(levels, scales, zeros, bits, block_size)


@settings(max_examples=200, deadline=None)
@given(grids())
def test_integer_zero_points_in_range_always_find_a_format(grid):
    fmt = best_format(grid)
    assert fmt is not None
    assert fmt.bits == {2: 2, 3: 4, 4: 4, 8: 8}[grid.bits]
    assert grid.block_size % fmt.block_size == 0 or grid.block_size >= grid.num_inputs
    is_kept(grid, fmt)


@settings(max_examples=150, deadline=None)
@given(grids(), st.sampled_from([INT4, INT8, TWO_PLANES, Format(4, 16), Format(2, 64)]))
def test_what_a_format_cannot_hold_is_rounded_as_always(grid, fmt):
    found, again = keep_or_round(grid, fmt)
    rounded = round_to_nearest(grid.values(), fmt)
    values = grid.values()
    kept = np.pad(found.values(fmt, grid.num_inputs) == values, ((0, 0), (0, fmt.block_size)))
    assert (keep(grid, fmt) is not None) == (again == 0)
    assert 0 <= again <= 1
    for row, block in np.ndindex(found.scales.shape):
        inputs = slice(block * fmt.block_size, min((block + 1) * fmt.block_size, values.shape[1]))
        if not kept[row, inputs].all():
            np.testing.assert_array_equal(found.levels[row, block], rounded.levels[row, block])
            assert found.scales[row, block] == rounded.scales[row, block]


def test_zero_points_beyond_four_bits_take_eight():
    # What Keras's GPTQ makes of a group without a positive value.
    grid = of_levels(np.arange(32)[None] % 16, [[0.25]], 150, 4, 32)
    assert best_format(grid, most_bits=4) is None
    assert best_format(grid) == Format(8, 32, symmetric=False)
    is_kept(grid, Format(8, 32, symmetric=False))


def test_blocks_of_several_scales_cannot_be_kept():
    grid = of_levels(np.full((1, 64), 9), [[1, 2, 3, 4]], 8, 4, 16)
    assert keep(grid, Format(8, 32)) is None
    assert keep_or_round(grid, Format(8, 32))[1] == 1
    assert best_format(grid) == Format(4, 16)
    assert best_format(of_levels(np.full((1, 48), 9), np.ones((1, 6)), 8, 4, 8)) is None


# --- two planes ----------------------------------------------------------------------------------


def in_planes(levels):
    """One block of 32 about 128, in two planes: what is stored, and the share rounded again."""
    block = np.full((1, 32), 128)
    block[0, : len(levels)] = np.asarray(levels) + 128
    grid = of_levels(block, [[0.5]], 128, 8, 32)
    return grid, *keep_or_round(grid, TWO_PLANES)


@pytest.mark.parametrize(
    ("levels", "negated", "zero_point"),
    [
        ([119, -128], False, 136),
        ([119, -127], False, 136),
        ([120, -119], True, 136),
        ([127, 0], True, 136),
        ([120, -120], False, 135),
        ([125, -121], True, 134),
        ([127, -127], False, 128),
        ([127, -128], False, 128),
    ],
)
def test_all_that_8_bits_hold_is_kept_in_two_planes(levels, negated, zero_point):
    grid, kept, again = in_planes(levels)
    assert again == 0
    np.testing.assert_array_equal(kept.values(TWO_PLANES, 32), grid.values())
    assert (kept.scales < 0) == negated
    assert kept.zero_points == zero_point
    split_planes(kept.levels, kept.zero_points)


@pytest.mark.parametrize(
    ("levels", "gain"), [([7, -8], 16), ([59, 1], 2), ([60, -60], 2), ([65, 1], 1)]
)
def test_small_levels_are_stretched_for_the_high_plane(levels, gain):
    grid, kept, again = in_planes(levels)
    assert again == 0
    assert np.abs(kept.scales) == 0.5 / gain
    np.testing.assert_array_equal(kept.values(TWO_PLANES, 32), grid.values())


def test_the_high_plane_of_a_q4_0_table_is_the_table(grid_of):
    grid = grid_of(Type.Q4_0, gguf_files.random_blocks(Type.Q4_0, 6, 3))
    kept = is_kept(grid, TWO_PLANES)
    high, low, zero_points = split_planes(kept.levels, kept.zero_points)
    assert (low == zero_points[..., None]).all()
    assert np.unique(high).size > 8


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_q8_0_table_in_two_planes_is_what_rounding_makes_of_it(seed):
    """So a table may go through floats: its blocks reach 127, and rounding finds their scales."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(4, 96)) * 10 ** rng.uniform(-5, 3, (4, 1))
    blocks = gguf.quantize(rows.astype(np.float32), Type.Q8_0).reshape(4, 3, 34)
    scales = blocks[..., :2].copy().view("<f2")[..., 0]
    levels = (blocks[..., 2:] ^ np.uint8(128)).reshape(4, 96)
    grid = of_levels(levels, scales, 128, 8, 32)
    # not scales so small that float16 rounds them much
    assume((np.abs(levels.reshape(4, 3, 32).astype(int) - 128).max(axis=-1) == 127).all())
    kept = is_kept(grid, TWO_PLANES)
    rounded = round_to_nearest(grid.values(), TWO_PLANES)
    np.testing.assert_array_equal(kept.levels, rounded.levels)
    np.testing.assert_array_equal(kept.zero_points, rounded.zero_points)
    np.testing.assert_array_equal(kept.scales, rounded.scales)


# --- onnxruntime reads the same values -----------------------------------------------------------


def multiplied(quantized: Quantized, fmt: Format, num_inputs: int) -> np.ndarray:
    """What `MatMulNBits` with float activations makes of the identity: the matrix, transposed."""
    parts = stored_tensors(quantized, fmt)
    names = [name for name in ("quantized", "scales", "zero_points") if name in parts]
    node = helper.make_node(
        "MatMulNBits",
        ["x", *names],
        ["out"],
        domain="com.microsoft",
        N=len(quantized.levels),
        K=num_inputs,
        bits=fmt.bits,
        block_size=fmt.block_size,
        accuracy_level=0,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [num_inputs, num_inputs])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(parts[name], name) for name in names],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(num_inputs, dtype=np.float32)})[0].T


@pytest.mark.parametrize("kind", SYMMETRIC, ids=by_name)
def test_onnxruntime_multiplies_by_what_the_source_holds(kind, grid_of):
    grid = grid_of(kind, gguf_files.random_blocks(kind, 6, 3))
    fmt = SYMMETRIC[kind]
    found = multiplied(is_kept(grid, fmt), fmt, grid.num_inputs)
    np.testing.assert_array_equal(found, grid.values())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("block_size", "num_inputs"), [(32, 96), (128, 160), (64, 40)])
def test_onnxruntime_reads_zero_points_as_the_source_means_them(bits, block_size, num_inputs):
    rng = np.random.default_rng(bits)
    shape = 6, -(-num_inputs // block_size)
    grid = of_levels(
        rng.integers(0, 1 << bits, (6, num_inputs)),
        rng.normal(size=shape),
        rng.integers(0, 1 << bits, shape),
        bits,
        block_size,
    )
    fmt = best_format(grid)
    assert not fmt.symmetric
    found = multiplied(is_kept(grid, fmt), fmt, num_inputs)
    np.testing.assert_array_equal(found, grid.values())


# --- a whole model -------------------------------------------------------------------------------


def write(path, matrix_type):
    meta = gguf_files.metadata("gemma3", 2)
    arrays = gguf_files.tensors(meta)
    return open_checkpoint(gguf_files.write_gguf(path / "m.gguf", meta, arrays, matrix_type))


def test_a_q4_0_model_is_stored_as_it_is(tmp_path):
    """As Google's QAT checkpoints come: the levels that training made are those that are stored."""
    checkpoint = write(tmp_path, Type.Q4_0)
    config, weights = checkpoint.config, checkpoint.weights
    kept = kept_weights(config, weights)
    matrices = [spec.name for spec in weight_specs(config).values() if spec.kind == "matrix"]
    assert list(kept.formats) == matrices
    assert set(kept.formats.values()) == {Format(4, 32)}
    assert kept.sentence == "14 Q4_0 matrices of the source are stored unchanged"

    plan = {**kept.formats, "token_embedding": TWO_PLANES}
    with WeightsFile(tmp_path / "weights") as file:
        store_weights(config, weights, plan, file, lambda *_: None, kept.rounded)
    assert kept.tables_rounded_again == {"token_embedding": 0}
    data = (tmp_path / "weights").read_bytes()

    def read(name, dtype):
        tensor = file.tensors[name]
        count = int(np.prod(tensor.shape))
        return np.frombuffer(data, dtype, count, tensor.offset).reshape(tensor.shape)

    for name in matrices:
        packed, scales = read(f"{name}.quantized", np.uint8), read(f"{name}.scales", np.float32)
        levels = np.stack([packed & 15, packed >> 4], -1).reshape(*scales.shape, 32)
        values = (levels.astype(np.float32) - 8) * scales[..., None]
        np.testing.assert_array_equal(values.reshape(len(packed), -1).T, weights[name])


@pytest.mark.keras
def test_a_q4_0_file_is_exported_without_rounding_it_twice(tmp_path):
    write(tmp_path, Type.Q4_0)
    result = export_onnx(tmp_path / "m.gguf", tmp_path / "out", "int4")
    plan = json.loads((result.path / "bundle.json").read_text())["plan"]
    matrices = {name: entry for name, entry in plan.items() if name.startswith("layers.")}
    assert len(matrices) == 14
    assert matrices == plan_to_json(dict.fromkeys(matrices, Format(4, 32)))
    assert result.rounding["source"] == "14 Q4_0 matrices of the source are stored unchanged"
    assert result.rounding["losses"] == {}
    # What is left is the activations' rounding; the weights rounded again would be ten times that.
    assert result.quality.max_logit_difference < 0.06 * result.quality.logit_spread


def test_people_are_told_what_is_rounded_again(tmp_path):
    def types(name):
        return Type.Q4_0 if "ffn_up" in name else Type.Q5_0 if "ffn" in name else Type.F16

    checkpoint = write(tmp_path, types)
    kept = kept_weights(checkpoint.config, checkpoint.weights)
    assert set(kept.formats) == {"layers.0.mlp.up", "layers.1.mlp.up"}
    assert kept.sentence == (
        "2 Q4_0 matrices of the source are stored unchanged; "
        "4 Q5_0 matrices of the source are rounded again"
    )
    assert kept.rounded("layers.0.mlp.up", INT4) is None
    assert kept.rounded("layers.0.mlp.gate", Format(4, 32)) is None
    assert kept.rounded("token_embedding", TWO_PLANES) is None
    nothing = kept_weights(checkpoint.config, checkpoint.weights, most_bits=0)
    assert nothing.formats == {}
    assert nothing.sentence.startswith("4 Q5_0, 2 Q4_0 matrices of the source are rounded again")


def test_floats_are_nothing_to_keep():
    config = config_from_gguf(gguf_files.metadata("gemma", 1), tied_head=True)
    kept = kept_weights(config, {"layers.0.mlp.up": np.zeros((4, 4), np.float32)})
    assert (kept.formats, kept.sentence) == ({}, "")
    assert kept.rounded("layers.0.mlp.up", INT4) is None


@pytest.mark.sample
def test_the_sample_is_rounded_again_and_says_so():
    checkpoint = open_checkpoint("sample")
    kept = kept_weights(checkpoint.config, checkpoint.weights)
    assert kept.formats == {}
    assert "81 Q5_0, 27 Q4_K" in kept.sentence
