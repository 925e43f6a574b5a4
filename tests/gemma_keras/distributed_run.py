"""What `test_distribute.py` runs in processes of their own: JAX asks how many devices there are once.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 KERAS_BACKEND=jax \\
        python -m tests.gemma_keras.distributed_run one-process FOLDER

`FOLDER` holds a small model as `tests.models` writes it, and takes what is saved here. The last
line that is printed is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import keras
import numpy as np

from gemma_keras import GemmaBackbone, GemmaCausalLM, GemmaConfig, LayerSpec
from gemma_keras.errors import ConfigError
from gemma_keras.model import distribute, token_loss
from tests.models import TEXT

_LAYER = {
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ffw_dim": 96,
    "query_scale": 0.25,
    "qk_norm": True,
    "post_norms": True,
}
# Every size divides by 8; the key-value heads do not, whose columns do.
CONFIG = GemmaConfig(
    vocabulary_size=256,
    hidden_dim=64,
    layers=(LayerSpec(**_LAYER, sliding_window=5), LayerSpec(**_LAYER)),
    embedding_scale=8.0,
)
MESHES = {
    "one": None,
    "data 8": {"data": 8},
    "model 8": {"model": 8},
    "data 2, model 4": {"data": 2, "model": 4, "config": CONFIG},
    "data 2, model 4, over data": {"data": 2, "model": 4, "shard_parameters_over_data": True},
}
OVER_DATA = "data 2, model 4, over data"
_IDS = np.random.default_rng(0).integers(1, 256, (16, 17)).astype("int32")
_INPUTS = {"token_ids": _IDS[:, :-1], "padding_mask": np.ones((16, 16), "int32")}
_PROMPTS = {
    "token_ids": np.pad(_IDS[:8, :6], ((0, 0), (0, 6))),
    "padding_mask": np.pad(np.ones((8, 6), "int32"), ((0, 0), (0, 6))),
}
_LINES = TEXT.splitlines()


# --- what is observed ----------------------------------------------------------------------------


def use(mesh):
    """Let models that are made from now on lie on a mesh, one of `MESHES`' values."""
    made = None if mesh is None else distribute.distribution(**mesh)
    keras.distribution.set_distribution(made)


def compiled(model):
    # An epsilon so large that Adam does not make a step of a gradient that is nothing but rounding.
    model.compile(optimizer=keras.optimizers.Adam(1e-2, epsilon=1e-3))
    return model


def random_model(config=CONFIG):
    keras.utils.set_random_seed(0)
    return compiled(GemmaCausalLM(GemmaBackbone(config, dtype="float32")))


def loaded_model(folder):
    keras.utils.set_random_seed(0)
    return compiled(GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=80))


def evaluated(model, rows) -> float:
    inputs = {key: value[rows] for key, value in _INPUTS.items()}
    return model.evaluate(
        inputs, _IDS[rows, 1:], batch_size=len(rows) // 2, verbose=0, return_dict=True
    )["loss"]


def continued(model, rows: int) -> list:
    prompts = {key: value[:rows] for key, value in _PROMPTS.items()}
    return model.generate(prompts, stop_token_ids=None)["token_ids"].tolist()


def weights_of(model) -> list[np.ndarray]:
    return [np.array(variable.value) for variable in model.trainable_variables]


def predicted(model) -> np.ndarray:
    inputs = {key: value[:8] for key, value in _INPUTS.items()}
    return compiled(GemmaCausalLM(model.backbone)).predict(inputs, verbose=0)


def furthest(found, expected) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def shards(variables) -> dict[str, list]:
    """Path to the variable's shape and that of its piece on the first device."""
    return {
        v.path: [list(v.shape), list(v.value.addressable_shards[0].data.shape)] for v in variables
    }


# --- one process, eight devices ------------------------------------------------------------------


def training(folder: Path) -> dict:
    """Two epochs of two steps on each mesh, compared with one device."""
    found, reference = {}, None
    for name, mesh in MESHES.items():
        use(mesh)
        model = random_model()
        before = weights_of(model)
        losses = model.fit(
            _INPUTS, _IDS[:, 1:], batch_size=8, epochs=2, shuffle=False, verbose=0
        ).history["loss"]
        after = weights_of(model)
        reference = reference or after
        found[name] = {
            "losses": losses,
            "weights_moved": furthest(after, before),
            "weights_off": furthest(after, reference),
            "model_bytes": distribute.bytes_by_device(model),
            "optimizer_bytes": distribute.bytes_by_device(model.optimizer),
            "shards": shards(model.variables),
            "optimizer_shards": shards(model.optimizer.variables),
        }
        if name == "one":
            found[name]["evaluated"] = evaluated(model, np.arange(16))
        if name == "model 8":
            model.save_weights(str(folder / "sharded.weights.h5"))
            np.save(folder / "sharded.npy", predicted(model))
        if name in ("one", "data 2, model 4", OVER_DATA):
            # Three rows do not divide by 2; the logits of a mesh are nearly, not exactly, the same.
            found[name]["tokens"] = {rows: continued(model, rows) for rows in (8, 3)}
            found[name]["logits"] = model.logits(_IDS[:3, :6]).tolist()
    return found


def loading(folder: Path) -> dict:
    """How far logits are off when weights saved on `model 8` are loaded elsewhere, and before."""
    expected, off = np.load(folder / "sharded.npy"), {}
    for name in (OVER_DATA, "one"):
        use(MESHES[name])
        model = random_model()
        before = furthest(predicted(model), expected)
        model.load_weights(str(folder / "sharded.weights.h5"))
        off[name] = {"before": before, "loaded": furthest(predicted(model), expected)}
    return off


def checkpoints(folder: Path) -> dict:
    """A Hugging Face folder loaded, tuned by LoRA, saved as a preset and loaded again."""
    found = {}
    for name in ("one", OVER_DATA):
        use(MESHES[name])
        model = loaded_model(folder)
        loaded = predicted(model)
        if name == "one":
            reference = loaded
        else:
            model.save_to_preset(str(folder / "preset"))
        model.backbone.enable_lora(4, ["query", "value", "attention_output"])
        compiled(model)
        found[name] = {
            "loaded_off": furthest(loaded, reference),
            "losses": model.fit(_LINES, batch_size=4, epochs=2, shuffle=False, verbose=0).history[
                "loss"
            ],
            "shards": shards(model.variables),
            "optimizer_shards": shards(model.optimizer.variables),
        }
    for name in ("one", "data 8"):
        use(MESHES[name])
        model = compiled(GemmaCausalLM.from_preset(str(folder / "preset"), dtype="float32"))
        found[name, "preset"] = furthest(predicted(model), reference)
    return {
        "tuned": {name: found[name] for name in ("one", OVER_DATA)},
        "preset_off": {name: found[name, "preset"] for name in ("one", "data 8")},
    }


def activations() -> dict[str, int]:
    """Bytes of temporary arrays on one device, of a loss and its gradients, by mesh."""

    def loss(trainable, frozen, inputs):
        logits, _ = model.stateless_call(trainable, frozen, inputs)
        return jax.nn.logsumexp(logits, axis=-1).mean() - logits[..., 0].mean()

    found = {}
    for over_data in (False, True):
        use({"data": 8, "shard_parameters_over_data": over_data})
        model = random_model()
        made = keras.distribution.distribution()
        inputs = {
            key: keras.distribution.distribute_tensor(array, made.get_data_layout(array.shape))
            for key, array in _INPUTS.items()
        }
        variables = [
            [v.value for v in group]
            for group in (model.trainable_variables, model.non_trainable_variables)
        ]
        step = jax.jit(jax.value_and_grad(loss)).lower(*variables, inputs).compile()
        found["over data" if over_data else "whole"] = step.memory_analysis().temp_size_in_bytes
    return found


def refusal(folder: Path) -> str:
    """What a vocabulary of 300 tokens says to 8 parts, when nobody has told of it before."""
    use({"model": 8})
    try:
        loaded_model(folder)
    except ConfigError as error:
        return str(error)
    return "nothing was refused"


# --- one of two processes ------------------------------------------------------------------------


def multi_process(folder: Path) -> dict:
    """Train on every process's own rows, on a mesh over all of them; save from each."""
    import tensorflow as tf

    keras.distribution.initialize()  # reads KERAS_DISTRIBUTION_*
    use(MESHES["data 2, model 4"])
    made = keras.distribution.distribution()

    model = random_model()
    whole = tf.data.Dataset.from_tensor_slices((_INPUTS, _IDS[:, 1:]))
    whole = whole.batch(8, drop_remainder=True)  # Keras takes this process's part of every batch
    losses = model.fit(whole, epochs=2, verbose=0).history["loss"]

    made.auto_shard_dataset = False  # from here on this process brings its own rows
    own = np.arange(16).reshape(2, made.num_processes, -1)[:, made.data_shard_id].ravel()
    model.save_weights(str(folder / f"process{jax.process_index()}.weights.h5"))
    return {
        "devices": jax.device_count(),
        "losses": losses,
        "evaluated": evaluated(model, own),
        "bytes": distribute.bytes_by_device(model),
    }


def main(what: str, folder: Path) -> None:
    # Several chunks of each batch. Here, because a test imports this module for its configuration.
    token_loss._CHUNK_BYTES = 48 * 4 * CONFIG.vocabulary_size
    if what == "process":
        print(json.dumps(multi_process(folder)))
        return
    found = {
        "training": training(folder),
        "loading": loading(folder),
        "checkpoints": checkpoints(folder),
        "activations": activations(),
        "refusal": refusal(folder),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
