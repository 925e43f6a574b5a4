"""Formats and rounding to them, against slow arithmetic and onnxruntime's operators."""

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

from export.formats.formats import BITS, BLOCK_SIZES, Format
from export.formats.packing import (
    Quantized,
    pack_bits,
    split_planes,
    stored_tensors,
    unpack_bits,
)
from export.formats.round_to_nearest import round_to_nearest, search_scales

ORT_BLOCKS = (16, 32, 64)  # sizes that onnxruntime's operators take
TWO_PLANES = Format(8, 32, symmetric=False, planes=2)
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


def quantize_rows(rows, fmt):
    """Rounded to nearest: stored levels and scales."""
    quantized = round_to_nearest(rows, fmt)
    return quantized.levels, quantized.scales


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


# --- all formats ---------------------------------------------------------------------------------


@st.composite
def formats(draw, blocks=BLOCK_SIZES):
    bits = draw(st.sampled_from(BITS))
    planes = draw(st.sampled_from([1, 2])) if bits == 8 else 1
    symmetric = planes == 1 and draw(st.booleans())
    return Format(bits, draw(st.sampled_from(blocks)), symmetric, planes)


def values_slowly(quantized, fmt, num_inputs):
    """`(level - zero point) * scale`, one value at a time, in float32."""
    out = np.zeros((len(quantized.levels), num_inputs), np.float32)
    for r in range(len(out)):
        for i in range(num_inputs):
            block, within = divmod(i, fmt.block_size)
            zero = 1 << (fmt.bits - 1)
            if quantized.zero_points is not None:
                zero = int(quantized.zero_points[r, block])
            level = int(quantized.levels[r, block, within])
            out[r, i] = np.float32(level - zero) * quantized.scales[r, block]
    return out


def pack_slowly(levels, bits):
    """Bit i of the stream of levels, the first level lowest, is bit `i % 8` of byte `i // 8`."""
    stream = [(int(level) >> bit) & 1 for level in levels for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [
        sum(bit << i for i, bit in enumerate(stream[n : n + 8])) for n in range(0, len(stream), 8)
    ]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(BITS), st.data())
def test_packing_is_the_stream_of_bits_and_unpacking_its_inverse(bits, data):
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 40)))
    top = (1 << bits) - 1
    levels = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, top)))
    packed = pack_bits(levels, bits)
    assert packed.dtype == np.uint8
    for index in np.ndindex(*shape[:2]):
        assert packed[index].tolist() == pack_slowly(levels[index], bits)
    np.testing.assert_array_equal(unpack_bits(packed, bits, shape[-1]), levels)


@settings(max_examples=200, deadline=None)
@given(formats(), st.data())
def test_levels_are_in_range_and_errors_at_most_half_a_step(fmt, data):
    rows, _ = data.draw(matrices(values=everyday))
    num_inputs = rows.shape[1]
    quantized = round_to_nearest(rows, fmt)
    assert quantized.levels.max(initial=0) <= (1 << fmt.bits) - 1
    values = quantized.values(fmt, num_inputs)
    np.testing.assert_array_equal(values, values_slowly(quantized, fmt, num_inputs))
    steps = np.abs(np.repeat(quantized.scales, fmt.block_size, axis=1)[:, :num_inputs])
    errors = np.abs(values - rows)
    # Reaching both ends: half a step. A symmetric grid of 2 or 4 bits reaches -8 .. 7, so the
    # end that is not the greatest magnitude may be cut by a step.
    most = 0.5 if fmt.bits == 8 or not fmt.symmetric else 1.0
    if not fmt.symmetric:
        most = 1.0  # the zero point is a whole number of steps
    assert (errors <= steps * most * (1 + 1e-5) + 1e-6).all()
    padding = quantized.levels.reshape(len(rows), -1)[:, num_inputs:].astype(int)
    zero = fmt.middle if quantized.zero_points is None else None
    if zero is not None:
        assert (padding == zero).all()


@settings(max_examples=100, deadline=None)
@given(formats(), st.data())
def test_zero_is_kept_exactly(fmt, data):
    rows, _ = data.draw(matrices(values=everyday))
    values = round_to_nearest(rows, fmt).values(fmt, rows.shape[1])
    assert (values[rows == 0] == 0).all()


@settings(max_examples=100, deadline=None)
@given(formats(), st.integers(0, 2**32 - 1))
def test_searching_scales_never_loses_more_than_rounding_to_nearest(fmt, seed):
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(5, 150)) * np.exp(rng.normal(size=150))).astype(np.float32)
    importance = np.exp(2 * rng.normal(size=150)).astype(np.float32)

    def loss(quantized):
        error = quantized.values(fmt, 150) - rows
        return float((importance * error.astype(np.float64) ** 2).sum())

    searched = loss(search_scales(rows, fmt, importance))
    assert searched <= loss(round_to_nearest(rows, fmt)) * (1 + 1e-5)


@settings(max_examples=60, deadline=None)
@given(matrices(values=any_value))
def test_two_planes_hold_what_eight_bits_hold(case):
    rows, _ = case
    width, blocks = rows.shape[1], TWO_PLANES.num_blocks(rows.shape[1])
    quantized = round_to_nearest(rows, TWO_PLANES)
    parts = stored_tensors(quantized, TWO_PLANES)
    assert set(parts) == {"high", "low", "scales", "zero_points"}
    zero_points = unpack_bits(parts["zero_points"], 4, blocks).astype(np.float32)
    high = unpack_bits(parts["high"], 4, 32).astype(np.float32) - 8
    low = unpack_bits(parts["low"], 4, 32).astype(np.float32) - zero_points[..., None]
    together = ((16 * high + low) * quantized.scales[..., None]).reshape(len(rows), -1)
    np.testing.assert_array_equal(together[:, :width], quantized.values(TWO_PLANES, width))
    one = Format(8, 32)
    np.testing.assert_array_equal(
        together[:, :width], round_to_nearest(rows, one).values(one, width)
    )


def test_the_high_plane_is_the_nearest_4_bit_table_but_for_blocks_that_reach_both_ends():
    rows = np.random.default_rng(0).normal(size=(200, 640)).astype(np.float32)
    quantized = round_to_nearest(rows, TWO_PLANES)
    high = stored_tensors(quantized, TWO_PLANES)["high"]
    nearest = np.rint(rows.reshape(200, 20, 32) / (16 * quantized.scales[..., None]))
    far = np.abs(unpack_bits(high, 4, 32).astype(np.float32) - 8 - nearest)
    middle = quantized.zero_points == 136
    assert 0.8 < middle.mean() < 1
    assert (far[middle] > 0).mean() < 0.04  # of the 16 levels one is as far from the next
    assert (far[~middle] > 0).mean() > 0.1
    assert far.max() == 1


@pytest.mark.parametrize(
    "arguments",
    [(3, 32), (4, 0), (16, 32), (32, 16), (4, 32, False, 2), (8, 32, True, 2), (8, 32, False, 3)],
)
def test_a_format_that_there_is_not_cannot_be_made(arguments):
    with pytest.raises(ValueError, match="not supported"):
        Format(*arguments)


@pytest.mark.parametrize("terms", [1, 2])
def test_a_row_of_integers_is_what_the_format_says(terms):
    rows = np.random.default_rng(0).normal(size=(5, 48)).astype(np.float32)
    fmt = Format(8, 48, terms=terms)
    quantized = search_scales(rows, fmt)
    parts = stored_tensors(quantized, fmt)
    assert parts["quantized"].dtype == np.int8 and parts["scales"].shape == (5,)
    values = parts["quantized"].astype(np.float32) * parts["scales"][:, None]
    np.testing.assert_array_equal(values, quantized.values(fmt, 48))
    assert np.abs(values - rows).max() < np.abs(rows).max() / 127


@pytest.mark.parametrize("fields", [{"bits": 4}, {"symmetric": False}, {"planes": 2}, {"terms": 3}])
def test_only_8_bits_around_0_are_stored_by_rows(fields):
    with pytest.raises(ValueError, match="not supported"):
        Format(**{"bits": 8, "block_size": 64, "terms": 1} | fields)


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


@settings(max_examples=60, deadline=None)
@given(formats(), st.data())
def test_onnxruntime_multiplies_by_the_dequantized_matrix(fmt, data):
    rows, _ = data.draw(matrices(values=st.one_of(everyday, st.just(0.0))))
    quantized = round_to_nearest(rows, fmt)
    parts = stored_tensors(quantized, fmt)
    num_rows, num_inputs = rows.shape
    expected = {"quantized": quantized.values(fmt, num_inputs)}
    formats_of = {"quantized": fmt}
    if fmt.planes == 2:  # each is a table of its own; their sum would round a second time
        formats_of = {"high": fmt.high_plane, "low": fmt.low_plane}
        high, low, zero_points = split_planes(quantized.levels, quantized.zero_points)
        expected = {
            "high": Quantized(high, quantized.scales).values(fmt.high_plane, num_inputs),
            "low": Quantized(low, quantized.scales, zero_points).values(fmt.low_plane, num_inputs),
        }
    for part, values in expected.items():
        stored = formats_of[part]
        initializers = {"packed": parts[part], "scales": parts["scales"]}
        if not stored.symmetric:
            initializers["zeros"] = parts["zero_points"]
        node = helper.make_node(
            "MatMulNBits",
            ["identity", *initializers],
            ["out"],
            domain="com.microsoft",
            N=num_rows,
            K=num_inputs,
            bits=stored.bits,
            block_size=fmt.block_size,
            accuracy_level=0,
        )
        found = run_node(node, {"identity": np.eye(num_inputs, dtype=np.float32)}, initializers)
        np.testing.assert_array_equal(found.T, values)


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
