"""Weights into variables: by value, refused, and never twice in memory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaBackbone, GemmaCausalLM, open_checkpoint
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.errors import CheckpointError
from gemma_keras.keras_hub.convert import read_keras_hub
from gemma_keras.model import loading
from gemma_keras.model.loading import FromWeights

pytestmark = pytest.mark.keras
once = pytest.mark.backends("torch")  # what is refused, no backend changes

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of some rows, that no size here divides by."""
    monkeypatch.setattr(loading, "_CHUNK_BYTES", 4 * 96 * 7)


def values(backbone, name):
    array = ops.convert_to_numpy(backbone.variable(name))
    return array.T if name == "head" else array


def assert_holds(backbone, weights, dtype):
    for name in weight_specs(backbone.config):
        found = values(backbone, name)
        assert found.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(found, weights[name].astype(DTYPES[dtype]), err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_is_made_of_the_weights_in_its_dtype(sources, dtype):
    checkpoint = open_checkpoint(sources("gemma3", "float32", False))
    backbone = GemmaBackbone(
        checkpoint.config, dtype=dtype, kernel_initializer=FromWeights(checkpoint.weights)
    )
    assert_holds(backbone, checkpoint.weights, dtype)


def test_a_model_made_of_weights_is_like_one_that_is_not(sources):
    checkpoint = open_checkpoint(sources("gemma2", "float32", False))
    made = GemmaBackbone(checkpoint.config, kernel_initializer=FromWeights(checkpoint.weights))
    plain = GemmaBackbone(checkpoint.config, kernel_initializer="zeros")
    assert [v.path for v in made.variables] == [v.path for v in plain.variables]
    assert [v.trainable for v in made.variables] == [v.trainable for v in plain.variables]
    for one, other in zip(made._flatten_layers(), plain._flatten_layers(), strict=True):
        if isinstance(one, keras.layers.Dense):
            assert one.get_config() == other.get_config()  # which would hold the checkpoint


@pytest.mark.parametrize("kind", ["file", "live", "keras_hub", "arrays"])
def test_weights_are_assigned_from_any_source(sources, kind):
    checkpoint = open_checkpoint(sources("gemma", "float32", kind == "keras_hub"))
    if kind == "keras_hub":  # which has no head of its own, and constants for these
        layers = tuple(dataclasses.replace(s, rope_theta=1e4) for s in checkpoint.config.layers)
        config = dataclasses.replace(checkpoint.config, norm_epsilon=1e-6, layers=layers)
        checkpoint = dataclasses.replace(checkpoint, config=config)
    live = GemmaCausalLM.from_checkpoint(checkpoint, dtype="float32")
    weights = {
        "file": lambda: checkpoint.weights,
        "live": lambda: live.backbone.weight_source(),
        "keras_hub": lambda: read_keras_hub(live.to_keras_hub()).weights,
        "arrays": lambda: dict(checkpoint.weights),
    }[kind]()
    backbone = GemmaBackbone(checkpoint.config, dtype="bfloat16")
    backbone.load_weight_source(weights)
    assert_holds(backbone, checkpoint.weights, "bfloat16")
    assert_holds(
        GemmaBackbone(checkpoint.config, dtype="float16", kernel_initializer=FromWeights(weights)),
        checkpoint.weights,
        "float16",
    )


def load_both_ways(config, weights):
    yield lambda: GemmaBackbone(config, kernel_initializer=FromWeights(weights))
    backbone = GemmaBackbone(config, kernel_initializer="zeros")
    yield lambda: backbone.load_weight_source(weights)


@once
@pytest.mark.parametrize(
    "name", ["token_embedding", "head", "layers.1.attention.key", "final_norm"]
)
def test_weights_that_do_not_fit_are_refused(sources, name):
    checkpoint = open_checkpoint(sources("gemma3", "float32", False))
    weights = dict(checkpoint.weights)
    array = weights.pop(name)
    for load in load_both_ways(checkpoint.config, weights):
        with pytest.raises(CheckpointError, match=f"^the weights lack {name}$"):
            load()
    for wrong in (array[:-1], np.concatenate([array, array]), array[..., None]):
        for load in load_both_ways(checkpoint.config, weights | {name: wrong}):
            with pytest.raises(CheckpointError, match=f"^{name} has shape .*, expected"):
                load()


class Pieces(dict):
    """Arrays whose tables come in pieces, as those of a file do."""

    def table_chunks(self, name, chunk_bytes):
        step = chunk_bytes // (4 * 96)
        for first in range(0, len(self[name]), step):
            yield first, self[name][first : first + step]


@once
def test_tables_in_pieces_that_do_not_fit_are_refused(sources):
    checkpoint = open_checkpoint(sources("gemma3", "float32", False))
    weights = Pieces(checkpoint.weights)
    backbone = GemmaBackbone(
        checkpoint.config, dtype="float32", kernel_initializer=FromWeights(weights)
    )
    assert_holds(backbone, checkpoint.weights, "float32")
    for table in ("token_embedding", "head"):
        array = weights[table]
        for wrong in (array[:-1], np.concatenate([array, array]), array[:, :-1]):
            for load in load_both_ways(checkpoint.config, Pieces({**weights, table: wrong})):
                with pytest.raises(CheckpointError, match=f"^{table} has shape .*, expected"):
                    load()


@once
@pytest.mark.parametrize("name", ["token_embedding", "layers.1.mlp.up", "final_norm"])
def test_what_is_not_finite_in_a_file_is_refused(sources, tmp_path, name):
    checkpoint = open_checkpoint(sources("gemma", "float32"))
    found = {weight: np.array(array) for weight, array in checkpoint.weights.items()}
    found[name][(-1,) * found[name].ndim] = np.nan
    file = tmp_path / "model.safetensors"
    folder = sources("gemma", "float32")
    for other in folder.iterdir():
        if other.name != file.name:
            (tmp_path / other.name).symlink_to(other)
    from safetensors.numpy import save_file

    specs = weight_specs(checkpoint.config)
    tensors = {
        spec.hf: np.ascontiguousarray(spec.to_file(found[n], "hf")) for n, spec in specs.items()
    }
    save_file(tensors, file)
    bad = open_checkpoint(tmp_path)
    for load in load_both_ways(bad.config, bad.weights):
        with pytest.raises(CheckpointError, match=f"{specs[name].hf} holds values that are not"):
            load()


def test_after_lora_or_quantize_nothing_is_assigned(sources):
    checkpoint = open_checkpoint(sources("gemma", "float32"))
    backbone = GemmaBackbone(checkpoint.config, kernel_initializer=FromWeights(checkpoint.weights))
    backbone.enable_lora(2)
    with pytest.raises(
        CheckpointError, match=r"query is no longer a variable.* load the weights first"
    ):
        backbone.load_weight_source(checkpoint.weights)
    with pytest.raises(CheckpointError, match="no float variable in this dtype; load the model in"):
        GemmaBackbone(
            checkpoint.config,
            dtype="int8_from_float32",
            kernel_initializer=FromWeights(checkpoint.weights),
        )


# Run in a process of its own: the peak of memory has to be that of loading.
SCRIPT = """
import keras
import numpy as np
from edge_demo.device.memory_limits import peak_rss_bytes
from gemma_keras import GemmaBackbone, GemmaConfig, named_config
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.model.loading import FromWeights

VOCABULARY, WIDTH = 1 << 19, 256

class Table(dict):
    def table_chunks(self, name, chunk_bytes):
        step = chunk_bytes // (4 * WIDTH)
        for first in range(0, self.rows, step):
            yield first, np.full((min(step, self.rows - first), WIDTH), first // step, np.float32)

def load(vocabulary):
    config = GemmaConfig.from_dict(small | {"vocabulary_size": vocabulary})
    weights = Table({n: np.ones(s.shape, np.float32) for n, s in weight_specs(config).items()
                     if s.kind != "table"})
    weights["token_embedding"] = None  # only ever in pieces
    weights.rows = vocabulary
    return GemmaBackbone(config, dtype="bfloat16", kernel_initializer=FromWeights(weights))

small = named_config("gemma3_270m").to_dict()
small |= {"hidden_dim": WIDTH, "layers": small["layers"][:2], "tied_head": True}
"""


def test_a_table_is_never_twice_in_memory(record_property):
    code = SCRIPT + (
        "load(VOCABULARY // 8)\n"  # what a first time costs: imports, a compiler's memory
        "before = peak_rss_bytes()\n"
        "model = load(VOCABULARY)\n"
        "print(peak_rss_bytes() - before, 2 * model.count_params())\n"
        "table = model.variable('token_embedding')\n"
        "print(float(table[0, 0]), float(table[VOCABULARY - 1, WIDTH - 1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (added, parameters), ends = (line.split() for line in done.stdout.splitlines())
    assert ends == ["0.0", "31.0"]
    # A piece of 16 MB, two or three times, is little beside this table of 268 MB.
    record_property("made of a table, bytes", f"{int(added):,} for {int(parameters):,}")
    assert int(added) < 1.5 * int(parameters)
