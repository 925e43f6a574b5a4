"""Weights read as the integers that a GGUF file holds, against the `gguf` package's floats."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.gguf import file as reader
from gemma_keras.checkpoints.gguf.file import GGUFFile
from gemma_keras.checkpoints.opening.sample import sample_path
from gemma_keras.checkpoints.quantized_grid import GGUF_TYPES, GridSource
from gemma_keras.errors import CheckpointError
from tests import gguf_files
from tests.models import write_tiny_hf

Type = gguf.GGMLQuantizationType
TYPES = [getattr(Type, name) for name in GGUF_TYPES]
each_type = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)


def equal_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit, except that one NaN is as good as another."""
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(found.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])


@each_type
@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 7),
    per_row=st.integers(1, 4),
    finite=st.booleans(),
    stretch=st.sampled_from([1, 700, 1 << 20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_values_are_those_of_the_package_to_the_bit(
    kind, num_rows, per_row, finite, stretch, seed, tmp_path_factory
):
    blocks = gguf_files.random_blocks(kind, num_rows, per_row, seed)
    if not finite:  # any bytes: scales that are infinite or NaN too
        blocks = np.random.default_rng(seed).integers(0, 256, blocks.shape, dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks, kind)
    path = gguf_files.write_raw_blocks(tmp_path_factory.mktemp("t") / "t.gguf", kind, blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_DEQUANTIZE_BYTES", stretch)
        grid = GGUFFile(path).grid("t")
    with np.errstate(all="ignore"):
        equal_bits(grid.values(), expected)
    known = GGUF_TYPES[kind.name]
    assert (grid.bits, grid.block_size) == (known.bits, known.block_size)
    assert grid.levels.dtype == np.uint8
    assert grid.levels.max() < 1 << known.bits
    assert grid.scales.shape == (num_rows, expected.shape[1] // known.block_size)


def test_some_rows_are_the_same_grid(tmp_path):
    blocks = gguf_files.random_blocks(Type.Q5_K, 9, 2)
    grid = GGUFFile(gguf_files.write_raw_blocks(tmp_path / "t", Type.Q5_K, blocks)).grid("t")
    np.testing.assert_array_equal(grid.rows(slice(3, 5)).values(), grid.values()[3:5])


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q3_K, Type.IQ4_NL])
def test_other_types_have_no_grid(kind, tmp_path):
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.zeros((2, 4 * block_bytes), np.uint8)
    if kind == Type.F32:
        blocks = blocks.view(np.float32)
    file = GGUFFile(gguf_files.write_raw_blocks(tmp_path / "t.gguf", kind, blocks))
    assert file.grid("t") is None
    assert file.stored_as("t") == (kind.name if kind in (Type.Q3_K, Type.IQ4_NL) else None)


# --- by canonical name ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q5_1, Type.Q8_0], ids=lambda kind: kind.name)
def test_rows_are_outputs_of_a_matrix_and_tokens_of_a_table(kind, tmp_path):
    meta = gguf_files.metadata("gemma3", 1)
    arrays = gguf_files.tensors(meta, tied=False)
    path = gguf_files.write_gguf(tmp_path / "m.gguf", meta, arrays, kind)
    weights = open_checkpoint(path).weights
    assert isinstance(weights, GridSource)
    for name, spec in weights.specs.items():
        grid = weights.grid(name)
        if spec.kind == "norm":
            assert grid is None
            assert weights.stored_as(name) is None
            continue
        assert weights.stored_as(name) == kind.name
        values = grid.values()
        equal_bits(values.T if spec.kind == "matrix" else values, weights[name])


def test_floats_have_no_grid(tmp_path):
    write_tiny_hf(tmp_path, "gemma")
    weights = open_checkpoint(tmp_path).weights
    assert {weights.stored_as(name) for name in weights} == {None}
    assert {weights.grid(name) for name in weights} == {None}


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("kind", "at"), [(Type.Q4_0, 0), (Type.Q4_1, 0), (Type.Q4_1, 2)])
def test_a_scale_that_is_no_number_is_refused_by_name(kind, at, bad, tmp_path):
    meta = gguf_files.metadata("gemma", 1)
    path = gguf_files.write_gguf(tmp_path / "m.gguf", meta, gguf_files.tensors(meta), kind)
    start = GGUFFile(path).tensors["blk.0.ffn_up.weight"].start
    with path.open("r+b") as file:
        file.seek(start + 3 * gguf.GGML_QUANT_SIZES[kind][1] + at)
        file.write(np.float16(bad).tobytes())
    weights = open_checkpoint(path).weights
    for read in (weights.grid, weights.__getitem__):
        with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight holds values that are"):
            read("layers.0.mlp.up")


@pytest.mark.sample
def test_a_tensor_of_each_type_of_the_sample_keeps_its_values():
    file = GGUFFile(sample_path())
    for name, kind in {
        "blk.3.attn_k.weight": "Q5_0",
        "blk.0.ffn_down.weight": "Q6_K",
        "blk.17.attn_v.weight": "Q8_0",
        "blk.9.attn_output.weight": "Q4_K",
    }.items():
        assert file.stored_as(name) == kind
        equal_bits(file.grid(name).values(), file.read(name))
