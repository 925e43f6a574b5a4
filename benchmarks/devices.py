"""What lies on each device, and that the loss is the same, for several meshes of the same devices.

    python benchmarks/devices.py --virtual 8
    python benchmarks/devices.py --size gemma3_270m --layers 2 --virtual 8

A random model is trained for two steps on each mesh, with Adam. The table has the loss of each
step, and what the weights and Adam's moments take on a device; `--each` prints every device. With
`--virtual` the devices are parts of the processor, which shows where things lie, but not how fast
several devices are; without it they are the machine's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

from gemma_keras.checkpoints.hf.config import named_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", help="a published size; by default a tiny one")
    parser.add_argument("--layers", type=int, help="take so many layers of it only")
    parser.add_argument("--virtual", type=int, help="make so many devices of the processor")
    parser.add_argument("--each", action="store_true", help="print every device's bytes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    os.environ["KERAS_BACKEND"] = "jax"
    if arguments.virtual:
        flag = f"--xla_force_host_platform_device_count={arguments.virtual}"
        os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}

    config = configuration(arguments.size, arguments.layers)
    found = {name: measure(config, mesh) for name, mesh in meshes().items()}
    print(json.dumps(found) if arguments.json else table(found, arguments.each))


def configuration(size: str | None, layers: int | None):
    """A published size, or a tiny Gemma whose sizes divide by 8; some layers of it."""
    from gemma_keras import GemmaConfig, LayerSpec

    if size is None:
        layer = LayerSpec(8, 8, 16, 192, 0.25, qk_norm=True, post_norms=True)
        config = GemmaConfig(1024, 128, (layer,) * 2, 128**0.5)
    else:
        config = named_config(size)
    return dataclasses.replace(config, layers=config.layers[:layers])


def meshes() -> dict[str, dict | None]:
    """Arguments of `gemma_keras.model.distribute.distribution`, by what they are called here."""
    import keras

    count = len(keras.distribution.list_devices())
    names: dict[str, dict | None] = {"one device": None, f"data {count}": {"data": count}}
    if count % 2 == 0 and count > 2:
        names[f"data 2, model {count // 2}"] = {"data": 2, "model": count // 2}
        names[f"data 2, model {count // 2}, parameters over both"] = {
            "data": 2,
            "model": count // 2,
            "shard_parameters_over_data": True,
        }
    names[f"model {count}"] = {"model": count}
    names[f"data {count}, parameters over it"] = {"data": count, "shard_parameters_over_data": True}
    return names


def measure(config, mesh: dict | None) -> dict:
    """Losses of two steps, and the bytes on each device afterwards."""
    import keras
    import numpy as np

    from gemma_keras import GemmaBackbone, GemmaCausalLM
    from gemma_keras.model import distribute

    made = None if mesh is None else distribute.distribution(config=config, **mesh)
    keras.distribution.set_distribution(made)
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM(GemmaBackbone(config, dtype="float32"))
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3, epsilon=1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    batch = len(keras.distribution.list_devices())
    ids = np.random.default_rng(0).integers(1, config.vocabulary_size, (batch, 33)).astype("int32")
    inputs = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, 1:])}
    losses = [
        float(model.train_on_batch(inputs, ids[:, 1:], return_dict=True)["loss"]) for _ in range(2)
    ]
    return {
        "losses": losses,
        "weights": distribute.bytes_by_device(model),
        "adam": distribute.bytes_by_device(model.optimizer),
    }


def table(found: dict[str, dict], each: bool) -> str:
    """A Markdown table, then each device if that is wanted."""
    lines = ["| mesh | losses | weights, MB a device | Adam, MB a device |", "|---|---|---|---|"]
    for name, result in found.items():
        losses = ", ".join(f"{loss:.5f}" for loss in result["losses"])
        lines.append(
            f"| {name} | {losses} | {spread(result['weights'])} | {spread(result['adam'])} |"
        )
    if each:
        for name, result in found.items():
            held = ", ".join(f"{device} {size:,}" for device, size in result["weights"].items())
            lines.append(f"\n{name}: {held} bytes of weights")
    return "\n".join(lines)


def spread(held: dict[str, int]) -> str:
    """Megabytes on a device, or on the emptiest and the fullest."""
    least, most = (f"{size / 1e6:.3f}" for size in (min(held.values()), max(held.values())))
    return least if least == most else f"{least} to {most}"


if __name__ == "__main__":
    main()
