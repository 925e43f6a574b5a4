"""Tables that are read piece by piece: what a file gives so is what it gives at once."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from export.calibrate.balance import BalancedWeights
from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.source import TableSource, table_chunks
from gemma_keras.errors import CheckpointError
from tests import gguf_files
from tests.models import write_tiny_hf


@pytest.fixture(scope="module", params=["F32", "F16", "Q8_0", "safetensors"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    if request.param == "safetensors":
        write_tiny_hf(folder / "hf", "gemma3")
        return open_checkpoint(folder / "hf")
    meta = gguf_files.metadata("gemma3", 2)
    kind = getattr(gguf.GGMLQuantizationType, request.param)
    arrays = gguf_files.tensors(meta)
    path = gguf_files.write_gguf(folder / "m.gguf", meta, arrays, lambda name: kind)
    return open_checkpoint(path)


def joined(weights, width, step):
    read = list(table_chunks(weights, "token_embedding", 4 * width * step))
    assert [first for first, _ in read] == list(range(0, read[-1][0] + 1, step))
    return np.concatenate([rows for _, rows in read])


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_file_gives_piece_by_piece_what_it_gives_at_once(checkpoint, step):
    weights, width = checkpoint.weights, checkpoint.config.hidden_dim
    whole = weights["token_embedding"]
    assert isinstance(weights, TableSource)
    for source in (weights, BalancedWeights(checkpoint.config, weights), dict(weights)):
        np.testing.assert_array_equal(joined(source, width, step), whole)


def test_a_number_that_is_not_finite_is_found_in_its_piece(tmp_path):
    meta = gguf_files.metadata("gemma3", 2)
    arrays = gguf_files.tensors(meta)
    arrays["token_embd.weight"][-1, 3] = np.nan
    weights = open_checkpoint(gguf_files.write_gguf(tmp_path / "m.gguf", meta, arrays)).weights
    pieces = weights.table_chunks("token_embedding", 4 * 96 * 8)
    next(pieces)
    with pytest.raises(CheckpointError, match=r"token_embd.weight holds values that are not"):
        list(pieces)
