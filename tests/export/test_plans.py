"""Recipes, targets, plans, and the weights file that they decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import ExportRequestError
from export.formats.formats import Format, plan_bytes, rows_and_inputs
from export.formats.fused_matrices import fused_matrices
from export.formats.packing import stored_tensors
from export.formats.recipes import RECIPES, plan_for_recipe, plan_from_json
from export.formats.round_to_nearest import round_to_nearest, search_scales
from export.formats.targets import check_plan, recipe_for
from export.graph.store_weights import store_weights
from export.graph.weights_file import WeightsFile
from gemma_keras.checkpoints.names import head_table, weight_specs
from gemma_keras.config import GemmaConfig, LayerSpec


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
    config = config_of(tied=False)
    _, plan, file = store(tmp_path / "weights", config, recipe)
    joined = fused_matrices(config, plan)
    assert len(joined) == (2 * len(config.layers) if plan["head"].quantized else 0)
    parts = {
        t.offset: t.num_bytes
        for name, t in file.tensors.items()
        if not any(name.rpartition(".")[0] in members for members in joined.values())
    }
    end = 0
    for offset, size in sorted(parts.items()):
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
        columns = np.ones(1, np.float32)
        if spec.kind == "table" and plan[name].by_rows:
            columns = read(f"{name}.columns", np.float32)
            scaled = weights[name] / columns
            np.testing.assert_allclose(np.abs(scaled).max(axis=0), np.abs(scaled).max(), rtol=1e-5)
        if spec.kind == "norm":
            factors = 1 + weights[name]
            if name == "final_norm" and plan[head_table(config)].by_rows:
                factors = factors * read(f"{head_table(config)}.columns", np.float32)
            np.testing.assert_array_equal(read(name, np.float32), factors)
        elif not (fmt := plan[name]).quantized:
            dtype = np.float16 if fmt.bits == 16 else np.float32
            np.testing.assert_array_equal(read(name, dtype), weights[name].astype(dtype))
        else:
            num_rows, num_inputs = rows_and_inputs(spec)
            rows = weights[name].T if spec.kind == "matrix" else weights[name] / columns
            rounding = search_scales if fmt.by_rows else round_to_nearest
            expected = stored_tensors(rounding(rows, fmt), fmt)
            for part, array in expected.items():
                np.testing.assert_array_equal(read(f"{name}.{part}", array.dtype), array)
            kept = round_to_nearest(rows, fmt).values(fmt, num_inputs)
            steps = 2 * np.abs(rows).max() / ((1 << fmt.bits) - 1)
            assert np.abs(kept - rows).max() <= 1.1 * steps
            if spec.kind == "table" and not fmt.by_rows:
                views = {"rows": "quantized"}
                if fmt.planes == 2:
                    views = {"high.rows": "high", "low.rows": "low"}
                for view, part in views.items():
                    found = read(f"{name}.{view}", np.uint8)
                    np.testing.assert_array_equal(found, expected[part].reshape(num_rows, -1))


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
        with pytest.raises(ValueError, match="a is already stored"):
            file.add("a", np.zeros(1, np.float32))
        with pytest.raises(ValueError, match="have different sizes"):
            file.add_view("b", "a", (7,))


def test_an_unknown_recipe_is_refused_with_those_there_are():
    with pytest.raises(
        ExportRequestError, match=r"'int3'; choose one of int4, int8, int8-rows, int8-wide, "
    ):
        plan_for_recipe("int3", config_of())


def test_a_target_has_a_recipe_in_place_of_another():
    assert recipe_for("int8", "any") == "int8"
    assert recipe_for("int8", "armv8.0") == recipe_for("int8-rows", "armv8.0") == "int8-rows"
    assert recipe_for("int8", "armv8.2") == "int8-wide"
    assert recipe_for("int4", "armv8.2") == "int4"
    with pytest.raises(
        ExportRequestError, match=r"int8-rows is slow on armv8.2; use --recipe int8"
    ):
        recipe_for("int8-rows", "armv8.2")
    for recipe in ("int4", "fp32", "int8-wide"):
        with pytest.raises(
            ExportRequestError, match=rf"{recipe} is slow on armv8.0.*recipe int8 there$"
        ):
            recipe_for(recipe, "armv8.0")
    with pytest.raises(ExportRequestError, match="no recipe 'int3'"):
        recipe_for("int3", "armv8.0")


def test_a_plan_in_blocks_is_refused_where_blocks_are_slow():
    config = config_of()
    rows, blocks = (plan_for_recipe(recipe, config) for recipe in ("int8-rows", "int8"))
    for plan, target in ((rows, "armv8.0"), (blocks, "armv8.2"), (blocks, "any")):
        check_plan(plan, target)
    with pytest.raises(
        ExportRequestError, match=r"layers\.0\.mlp\.up as int8 block 32, which is slow"
    ):
        check_plan(rows | {"layers.0.mlp.up": Format(8, 32)}, "armv8.0")


def test_a_plan_by_rows_has_whole_rows():
    config = config_of()
    width = config.hidden_dim
    entry = {"bits": 8, "block_size": width, "terms": 1}
    assert plan_from_json({"token_embedding": entry}, config)["token_embedding"].by_rows
    with pytest.raises(ExportRequestError, match=rf"block of 16 by rows; a row has {width}"):
        plan_from_json({"token_embedding": entry | {"block_size": 16}}, config)


@pytest.mark.parametrize(
    "recipe, hidden_dim, block",
    [("int8", 64, 32), ("int8", 80, 16), ("int4", 640, 128), ("int4", 192, 64), ("int4", 48, 16)],
)
def test_the_tables_blocks_are_the_largest_that_divide_the_width(recipe, hidden_dim, block):
    plan = plan_for_recipe(recipe, config_of(hidden_dim=hidden_dim))
    assert plan["token_embedding"].block_size == block
    matrices = 128 if recipe == "int4" else 32
    assert plan["layers.0.mlp.up"].block_size == matrices  # a matrix may be padded


@pytest.mark.parametrize("hidden_dim", [24, 97])
@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_a_width_that_no_block_divides_is_refused(recipe, hidden_dim):
    config = config_of(hidden_dim=hidden_dim)
    with pytest.raises(ExportRequestError, match=rf"blocks of \d+.*hidden_dim \({hidden_dim}\)"):
        plan_for_recipe(recipe, config)
    assert plan_for_recipe("fp32", config)
