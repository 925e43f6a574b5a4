"""Distributes one model over several devices, with JAX and `keras.distribution`.

The table `_SPLITS` says which axis of which weight is split. The split of matrices is that of
Shoeybi et al. (2019, arXiv:1909.08053): a split by columns is followed by a split by rows. So a
block sums over devices twice, once after attention and once after the MLP.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import ConfigError

# Path of a variable: the mesh's axes that its axes are split over. "data" counts only where
# parameters are split over it too. What is not here, such as norms, is whole on every device.
#
# Tables are split by tokens, not by width: logits, the largest activation, then come split and need
# no sum. By width each device would make partial logits of all tokens, to be added up.
_SPLITS: dict[str, tuple[str | None, ...]] = {
    # by columns: heads, and channels of the MLP
    r"decoder_block_\d+/(attention/query|mlp/(gate|up))/kernel": ("data", "model"),
    r"decoder_block_\d+/(attention/query|mlp/(gate|up))/lora_kernel_a": ("data", None),
    r"decoder_block_\d+/(attention/query|mlp/(gate|up))/lora_kernel_b": (None, "model"),
    r"decoder_block_\d+/attention/(key|value)/kernel": ("data", "model"),
    r"decoder_block_\d+/attention/(key|value)/lora_kernel_a": ("data", None),
    r"decoder_block_\d+/attention/(key|value)/lora_kernel_b": (None, "model"),
    # by rows: what the columns before have made
    r"decoder_block_\d+/(attention/attention_output|mlp/down)/kernel": ("model", "data"),
    r"decoder_block_\d+/(attention/attention_output|mlp/down)/lora_kernel_a": ("model", None),
    r"decoder_block_\d+/(attention/attention_output|mlp/down)/lora_kernel_b": (None, "data"),
    # by tokens
    "token_embedding/embeddings": ("model", "data"),
    "token_embedding/reverse_embeddings": ("data", "model"),
    "token_embedding/lora_embeddings_a": ("model", None),
    "token_embedding/lora_embeddings_b": (None, "data"),
}

# If parameters are split over "data", activations, `(batch, length, hidden_dim)`, need an explicit
# layout, split by batches. Otherwise XLA computes every batch on every device.
_ACTIVATIONS = r"decoder_block_\d+/(pre_attention_norm|pre_ffw_norm)/output"


def layout_map(
    device_mesh: keras.distribution.DeviceMesh,
    model_dim: str = "model",
    data_dim: str = "data",
    shard_parameters_over_data: bool = False,
    config: GemmaConfig | None = None,
) -> keras.distribution.LayoutMap:
    """Returns the layout of a `GemmaBackbone`'s variables on a mesh.

    Queries, keys, values, gate and up are split by columns over `model_dim`. The attention's output
    and down are split by rows, tables by tokens, and LoRA's two matrices like their kernel. Norms,
    and the rank axis of a LoRA matrix, are not split. If `config` is given, keys and values whose
    heads do not divide by `model_dim` are whole on every device: they are small, and splitting a
    head causes more traffic than it saves. Results do not depend on this.

    Args:
        device_mesh: with axes `model_dim` and `data_dim`; one of them may have size 1.
        model_dim: the axis of the mesh over which parameters are split.
        data_dim: the axis over which batches are split.
        shard_parameters_over_data: whether to split the other axis of every matrix over `data_dim`,
            as ZeRO's third stage does (Rajbhandari et al., 2020, arXiv:1910.02054). Devices then
            gather a matrix when they need it: less memory, more traffic. The map then lays out
            activations too, for which a `ModelParallel` of your own needs batches that divide.
        config: of the model that is meant; its sizes are checked.

    Raises:
        ValueError: the mesh lacks an axis.
        ConfigError: a size of `config` does not divide by the devices it is to be split over.
    """
    for dim in (model_dim, data_dim):
        if dim not in device_mesh.axis_names:
            raise ValueError(
                f"the mesh has axes {', '.join(device_mesh.axis_names)}, expected one called {dim}"
            )
    sizes = dict(zip(device_mesh.axis_names, device_mesh.shape, strict=True))
    mesh_axis = {"model": model_dim, "data": data_dim if shard_parameters_over_data else None}
    whole_heads = config is not None and any(
        s.num_kv_heads % sizes[model_dim] for s in config.layers
    )
    layouts = keras.distribution.LayoutMap(device_mesh)
    for path, axes in _SPLITS.items():
        if whole_heads and "(key|value)" in path:
            axes = tuple(None if axis == "model" else axis for axis in axes)
        layouts[f"(.*/)?{path}"] = tuple(axis and mesh_axis[axis] for axis in axes)
    if shard_parameters_over_data:
        layouts[f"(.*/)?{_ACTIVATIONS}"] = (data_dim, None, None)
    if config is not None:
        for spec in weight_specs(config).values():
            shape = spec.shape[::-1] if spec.name == "head" else spec.shape
            _require_divisible(spec.name, shape, layouts[_variable_path(spec.name)])
    return layouts


def distribution(
    data: int | None = None,
    model: int = 1,
    devices: Sequence[str] | None = None,
    shard_parameters_over_data: bool = False,
    config: GemmaConfig | None = None,
) -> keras.distribution.DataParallel | keras.distribution.ModelParallel:
    """A distribution for `keras.distribution.set_distribution`, before the model is made.

    Args:
        data: parts that a batch is split into; by default, as many as there are devices for.
        model: parts that every matrix is split into.
        devices: names such as `gpu:0`, `data * model` of them; by default all that Keras lists, of
            all hosts. Those that follow each other hold the parts of one model.
        shard_parameters_over_data: see `layout_map`.
        config: see `layout_map`. Without it a size that does not divide is an error no sooner than
            when its variable is made.

    Returns:
        A `DataParallel` if only batches are split, else a `ModelParallel`, on axes `data` and
        `model`. In one process a batch that does not divide, such as one prompt, is not split.

    Raises:
        RuntimeError: the backend is not JAX.
        ValueError: there are not `data * model` devices.
        ConfigError: a size of `config` does not divide by the devices it is to be split over.
    """
    if keras.config.backend() != "jax":
        raise RuntimeError(
            f"the Keras backend is {keras.config.backend()}, but only JAX supports "
            "keras.distribution on several devices; set KERAS_BACKEND=jax"
        )
    devices = list(keras.distribution.list_devices() if devices is None else devices)
    if data is None:
        data = max(1, len(devices) // model) if model > 0 else 1
    if data < 1 or model < 1 or data * model != len(devices):
        raise ValueError(
            f"a mesh of data {data} by model {model} was requested, but there are "
            f"{len(devices)} devices ({', '.join(devices)}). Choose two numbers whose "
            "product is the number of devices, or pass fewer devices"
        )
    if model == 1 and not shard_parameters_over_data:
        mesh = keras.distribution.DeviceMesh((data,), ["data"], devices)
        return _DataParallel(device_mesh=mesh)
    mesh = keras.distribution.DeviceMesh((data, model), ["data", "model"], devices)
    layouts = layout_map(mesh, shard_parameters_over_data=shard_parameters_over_data, config=config)
    return _ModelParallel(layout_map=layouts, batch_dim_name="data")


def _data_layout(distribution, layout, data_shape):
    """Batches that do not divide by the devices, such as one prompt, are whole on every device."""
    # With several processes a layout also says which rows each of them brings.
    if distribution.num_processes > 1 or data_shape[0] % distribution.num_model_replicas == 0:
        return layout
    return keras.distribution.TensorLayout([None] * len(data_shape), distribution.device_mesh)


class _DataParallel(keras.distribution.DataParallel):
    def get_data_layout(self, data_shape):
        return _data_layout(self, super().get_data_layout(data_shape), data_shape)


class _ModelParallel(keras.distribution.ModelParallel):
    """Its error names the variable that cannot be split. It does not split activations outside of
    compiled functions, where they cannot be split unevenly."""

    def get_data_layout(self, data_shape):
        return _data_layout(self, super().get_data_layout(data_shape), data_shape)

    def get_variable_layout(self, variable):
        layout = super().get_variable_layout(variable)
        if isinstance(layout, keras.distribution.TensorLayout):
            _require_divisible(variable.path, variable.shape, layout)
        return layout

    def get_tensor_layout(self, path):
        import jax

        traced = isinstance(ops.zeros(()), jax.core.Tracer)
        return super().get_tensor_layout(path) if traced else None


def bytes_by_device(model: Any) -> dict[str, int]:
    """Returns the bytes of a model's variables on each device of this host, such as `{"cpu:0":
    4096}`.

    Args:
        model: a model, a layer or an optimizer; anything with `variables`.
    """
    held: Counter[str] = Counter()
    for variable in model.variables:
        for shard in variable.value.addressable_shards:
            held[f"{shard.device.platform}:{shard.device.id}"] += shard.data.nbytes
    return dict(sorted(held.items(), key=lambda item: int(item[0].split(":")[1])))


def _variable_path(name: str) -> str:
    """The path of the Keras variable of a canonical name."""
    if name == "token_embedding":
        return "token_embedding/embeddings"
    if name == "head":
        return "token_embedding/reverse_embeddings"
    name = re.sub(r"^layers\.(\d+)\.", r"decoder_block_\1/", name)
    if name.endswith("norm"):
        return f"{name.replace('.', '/')}/scale"
    return (
        f"{name.replace('attention.output', 'attention.attention_output').replace('.', '/')}/kernel"
    )


def _require_divisible(name: str, shape: Sequence[int], layout) -> None:
    """Raise `ConfigError` unless each axis divides by the devices that it is split over."""
    if layout is None:
        return
    mesh = layout.device_mesh
    sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    for axis, (length, dim) in enumerate(zip(shape, layout.axes, strict=True)):
        if dim is not None and length % sizes[dim]:
            raise ConfigError(
                f"axis {axis} of {name} {tuple(shape)} does not divide by the {sizes[dim]} devices"
                f" of the mesh's axis {dim!r}; choose a number of devices that divides {length}"
            )
