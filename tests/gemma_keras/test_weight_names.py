"""The table of weights: all of them, and the same weight in every file format."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_keras.checkpoints.hf.config import config_from_hf
from gemma_keras.checkpoints.names import WeightSpec, parameter_count, weight_specs
from tests.models import GENERATIONS, hf_config, tiny_hf


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_table_has_every_weight_of_transformers_and_no_other(generation, tied):
    theirs = {n: tuple(p.shape) for n, p in tiny_hf(generation, tied=tied).named_parameters()}
    config = config_from_hf(hf_config(generation, tied).to_dict())
    specs = weight_specs(config).values()
    assert {spec.hf: spec.file_shape for spec in specs} == theirs
    assert parameter_count(config) == sum(int(np.prod(shape)) for shape in theirs.values())


@pytest.mark.parametrize("file_format", ["hf", "gguf"])
@pytest.mark.parametrize("kind", ["matrix", "norm", "table"])
def test_to_file_undoes_from_file(kind, file_format):
    shape = (4,) if kind == "norm" else (4, 6)
    spec = WeightSpec("name", shape, kind, "hf.name", "gguf.name")
    assert spec.file_name(file_format) == f"{file_format}.name"
    in_file = np.arange(np.prod(shape), dtype=np.float32).reshape(spec.file_shape)
    canonical = spec.from_file(in_file, file_format)
    assert canonical.shape == shape
    np.testing.assert_array_equal(spec.to_file(canonical, file_format), in_file)


def test_files_store_matrices_turned_and_gguf_norms_plus_one():
    matrix = WeightSpec("m", (2, 3), "matrix", "m", "m")
    assert matrix.from_file(np.arange(6).reshape(3, 2), "hf").tolist() == [[0, 2, 4], [1, 3, 5]]
    norm = WeightSpec("n", (2,), "norm", "n", "n")
    assert norm.from_file(np.array([1.5, 1.0]), "gguf").tolist() == [0.5, 0.0]
    assert norm.from_file(np.array([1.5, 1.0]), "hf").tolist() == [1.5, 1.0]
