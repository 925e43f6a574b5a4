"""More than one device gives what one gives, and each device holds its part only.

Eight virtual devices of the processor, in processes of their own: see `distributed_run.py`.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from gemma_keras import GemmaBackbone, GemmaConfig
from gemma_keras.checkpoints.hf.config import config_from_hf, named_config
from gemma_keras.errors import ConfigError
from gemma_keras.model import distribute
from gemma_keras.sizes import SIZES
from tests.models import shallow, write_tiny_hf

pytestmark = pytest.mark.keras

on_jax = pytest.mark.backends("jax")

ROOT = Path(__file__).parents[2]
DEVICES = [f"cpu:{i}" for i in range(8)]
SHARDED = ("data 8", "model 8", "data 2, model 4", "data 2, model 4, over data")
OVER_DATA = "data 2, model 4, over data"
# Sums over devices are taken in another order than on one: some units of float32's last place.
WEIGHTS, LOGITS, LOSS = 1e-6, 2e-4, 1e-5

ADAM = 2  # moments of each weight


def start(what: str, folder: Path, devices: int, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.gemma_keras.distributed_run", what, str(folder)],
        cwd=ROOT,
        env=os.environ
        | {
            "KERAS_BACKEND": "jax",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    write_tiny_hf(folder, "gemma", **shallow("gemma"))
    return result(start("one-process", folder, 8))


# --- the same as on one device -------------------------------------------------------------------


@on_jax
@pytest.mark.parametrize("mesh", SHARDED)
def test_training_gives_the_losses_and_weights_of_one_device(run, mesh, record_property):
    one, found = run["training"]["one"], run["training"][mesh]
    record_property(mesh, f"losses {found['losses']}, weights off by {found['weights_off']:.1e}")
    assert one["losses"][1] < one["losses"][0] - 0.1
    assert found["weights_moved"] > 1e4 * WEIGHTS
    assert found["losses"] == pytest.approx(one["losses"], rel=LOSS)
    assert found["weights_off"] < WEIGHTS


@on_jax
@pytest.mark.parametrize("mesh", ["data 2, model 4", OVER_DATA])
@pytest.mark.parametrize("rows", ["8", "3"])
def test_generation_gives_the_tokens_of_one_device(run, mesh, rows):
    """Three rows do not divide by the two parts that a batch has."""
    tokens = run["training"][mesh]["tokens"][rows]
    assert np.shape(tokens) == (int(rows), 12)
    assert tokens == run["training"]["one"]["tokens"][rows]


@on_jax
@pytest.mark.parametrize("mesh", ["data 2, model 4", OVER_DATA])
def test_logits_outside_of_compiled_functions(run, mesh):
    found, one = (np.array(run["training"][m]["logits"]) for m in (mesh, "one"))
    assert np.abs(found - one).max() < LOGITS


@on_jax
@pytest.mark.parametrize("mesh", [OVER_DATA, "one"])
def test_weights_saved_on_one_mesh_load_on_another_and_on_one_device(run, mesh):
    off = run["loading"][mesh]
    assert off["before"] > 1e3 * LOGITS
    assert off["loaded"] < LOGITS


@on_jax
def test_a_hugging_face_folder_loads_on_a_mesh(run):
    assert run["checkpoints"]["tuned"][OVER_DATA]["loaded_off"] < LOGITS


@on_jax
@pytest.mark.parametrize("mesh", ["one", "data 8"])
def test_a_preset_saved_on_a_mesh_loads_elsewhere(run, mesh):
    assert run["checkpoints"]["preset_off"][mesh] < LOGITS


@on_jax
def test_lora_gives_the_losses_of_one_device(run):
    tuned = run["checkpoints"]["tuned"]
    assert tuned["one"]["losses"][1] < tuned["one"]["losses"][0] - 0.1
    assert tuned[OVER_DATA]["losses"] == pytest.approx(tuned["one"]["losses"], rel=LOSS)


# --- in parts ------------------------------------------------------------------------------------


@on_jax
@pytest.mark.parametrize(
    ("mesh", "parts"), list(zip(SHARDED, ((1, 1), (8, 8), (4, 1), (8, 8)), strict=True))
)
def test_every_device_holds_its_part_of_the_matrices(run, mesh, parts, record_property):
    """`parts`: of every matrix, and of keys and values."""
    found = run["training"][mesh]
    record_property(mesh, f"bytes {found['model_bytes']}, Adam {found['optimizer_bytes']}")
    expected = sum(
        4
        * math.prod(shape)
        // (1 if len(shape) < 2 else parts["/key/" in path or "/value/" in path])
        for path, (shape, _) in found["shards"].items()
    )
    assert found["model_bytes"] == dict.fromkeys(DEVICES, expected)
    counters = 8  # of steps and the learning rate
    assert found["optimizer_bytes"] == dict.fromkeys(DEVICES, ADAM * expected + counters)


@on_jax
def test_one_device_holds_everything(run):
    assert run["training"]["one"]["model_bytes"] == {"cpu:0": 379_392}


EXPECTED = {  # on 2 by 4 devices: the shape, and that of a piece, without and with data
    "token_embedding/embeddings": ([256, 64], [64, 64], [64, 32]),
    "decoder_block_1/attention/query/kernel": ([64, 128], [64, 32], [32, 32]),
    "decoder_block_1/attention/key/kernel": ([64, 32], [64, 32], [32, 8]),
    "decoder_block_1/attention/value/kernel": ([64, 32], [64, 32], [32, 8]),
    "decoder_block_1/attention/attention_output/kernel": ([128, 64], [32, 64], [32, 32]),
    "decoder_block_1/mlp/gate/kernel": ([64, 96], [64, 24], [32, 24]),
    "decoder_block_1/mlp/up/kernel": ([64, 96], [64, 24], [32, 24]),
    "decoder_block_1/mlp/down/kernel": ([96, 64], [24, 64], [24, 32]),
    "decoder_block_1/attention/query_norm/scale": ([16], [16], [16]),
    "final_norm/scale": ([64], [64], [64]),
}


@on_jax
@pytest.mark.parametrize("path", EXPECTED)
def test_weights_and_what_adam_keeps_of_them_are_cut_along_the_right_axes(run, path):
    """The first of the two meshes was told the configuration: it leaves keys and values whole."""
    shape, without, over_data = EXPECTED[path]
    for mesh, piece in (("data 2, model 4", without), (OVER_DATA, over_data)):
        found = run["training"][mesh]
        moments = [
            shapes
            for name, shapes in found["optimizer_shards"].items()
            if name.split("/", 1)[1].startswith(path.replace("/", "_"))
        ]
        assert found["shards"][path] == [shape, piece]
        assert moments == [[shape, piece]] * ADAM


@on_jax
@pytest.mark.parametrize(
    ("path", "pieces"),
    [
        ("query/lora_kernel_a", [[96, 4], [48, 4]]),
        ("query/lora_kernel_b", [[4, 128], [4, 32]]),
        ("value/lora_kernel_b", [[4, 64], [4, 16]]),
        ("attention_output/lora_kernel_a", [[128, 4], [32, 4]]),
        ("attention_output/lora_kernel_b", [[4, 96], [4, 48]]),
    ],
)
def test_lora_matrices_are_cut_as_the_kernel_beside_them(run, path, pieces):
    found = run["checkpoints"]["tuned"][OVER_DATA]
    assert found["shards"][f"decoder_block_0/attention/{path}"] == pieces
    name = f"decoder_block_0/attention/{path}".replace("/", "_")
    moments = [s for key, s in found["optimizer_shards"].items() if name in key]
    assert moments == [pieces] * ADAM


@on_jax
def test_activations_stay_split_by_batches_where_parameters_are_split_over_them(run):
    found = run["activations"]
    assert found["over data"] < 2 * found["whole"]


# --- two processes, four devices each ------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        start(
            "process",
            folder,
            4,
            KERAS_DISTRIBUTION_JOB_ADDRESSES=address,
            KERAS_DISTRIBUTION_NUM_PROCESSES="2",
            KERAS_DISTRIBUTION_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]
    try:
        return folder, [result(process) for process in started]
    finally:
        for process in started:
            process.kill()


@on_jax
def test_two_processes_train_as_one_device_does(run, processes):
    one = run["training"]["one"]
    for found in processes[1]:
        assert found["devices"] == 8
        assert found["losses"] == pytest.approx(one["losses"], rel=LOSS)


@on_jax
def test_each_process_can_bring_its_own_rows(run, processes):
    for found in processes[1]:
        assert found["evaluated"] == pytest.approx(run["training"]["one"]["evaluated"], rel=LOSS)


@on_jax
def test_each_process_counts_its_own_devices(run, processes):
    held = [set(found["bytes"].values()) for found in processes[1]]
    assert held == [set(run["training"]["data 2, model 4"]["model_bytes"].values())] * 2
    assert [len(found["bytes"]) for found in processes[1]] == [4, 4]


@on_jax
def test_each_process_saves_the_same_whole_model(processes):
    import h5py

    def arrays(path):
        found = {}
        with h5py.File(path) as file:
            file.visititems(lambda n, x: found.update({n: x[()]} if hasattr(x, "shape") else {}))
        return found

    one, two = (arrays(processes[0] / f"process{i}.weights.h5") for i in range(2))
    assert one.keys() == two.keys()
    assert any(array.shape == (256, 64) for array in one.values())
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.backends("tensorflow", "torch")
def test_other_backends_are_refused():
    with pytest.raises(RuntimeError, match=r"the Keras backend is \w+, but only JAX"):
        distribute.distribution(model=8, devices=DEVICES)


def distribution(**kwargs):
    """On eight devices that need not be there, since nothing is made on them."""
    return distribute.distribution(devices=DEVICES, **kwargs)


def config(**changes) -> GemmaConfig:
    return config_from_hf({**SIZES["gemma3_270m"].hf, **changes})


@on_jax
def test_a_vocabulary_that_does_not_divide_is_refused_before_anything_is_made():
    with pytest.raises(
        ConfigError, match=r"axis 0 of token_embedding \(262145, 640\) .* 8 devices"
    ):
        distribution(model=8, config=config(vocab_size=262_145))


@on_jax
def test_a_width_that_does_not_divide_is_refused_where_data_splits_it():
    narrow = config(hidden_size=636)
    assert distribution(data=8, config=narrow)
    with pytest.raises(ConfigError, match=r"axis 1 of token_embedding \(262144, 636\) .* 'data'"):
        distribution(data=8, shard_parameters_over_data=True, config=narrow)


@on_jax
def test_without_a_configuration_the_variable_is_told(run):
    assert "token_embedding/embeddings (300, 96) does not divide by the 8 devices" in run["refusal"]


@on_jax
@pytest.mark.parametrize(
    "mesh", [{"data": 3, "model": 2}, {"model": 3}, {"model": 0}, {"data": 16}]
)
def test_a_mesh_of_another_size_than_the_devices_is_refused(mesh):
    with pytest.raises(ValueError, match=r"there are 8 devices"):
        distribution(**mesh)


@on_jax
def test_a_mesh_without_the_axes_is_refused():
    mesh = keras.distribution.DeviceMesh((8,), ["batch"], DEVICES)
    with pytest.raises(ValueError, match="the mesh has axes batch, expected one called model"):
        distribute.layout_map(mesh)


@on_jax
def test_batches_take_the_devices_that_are_left():
    assert distribution(model=2).device_mesh.shape == (4, 2)
    assert isinstance(distribution(), keras.distribution.DataParallel)


@on_jax
@pytest.mark.parametrize("size", [s.name for s in SIZES.values() if not s.alias_of])
@pytest.mark.parametrize("model", [2, 4, 8])
def test_every_published_size_fits_on_eight_devices(size, model):
    for over_data in (False, True):
        made = distribution(
            model=model, shard_parameters_over_data=over_data, config=named_config(size)
        )
        assert made.device_mesh.shape == (8 // model, model)


@on_jax
@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_is_in_the_map_and_nothing_else(tied):
    """The paths are those that a model really has, one without a mesh."""
    from tests.gemma_keras.distributed_run import CONFIG

    made = GemmaConfig.from_dict(CONFIG.to_dict() | {"tied_head": tied})
    backbone = GemmaBackbone(made, dtype="float32")
    backbone.enable_lora(2, ["token_embedding", "key", "up", "down"])
    layouts = distribution(model=4, shard_parameters_over_data=True)
    for variable in backbone.variables:
        axes = layouts.get_variable_layout(variable).axes
        assert len(axes) == len(variable.shape)
        rank = "lora" in variable.path
        assert sum(axis is not None for axis in axes) == len(axes) - rank - (len(axes) == 1)
    if not tied:
        head = backbone.token_embedding.reverse_embeddings
        assert layouts.get_variable_layout(head).axes == ("data", "model")
