"""LoRA in a backbone's matrices: W + alpha / rank * (A @ B) (Hu et al., 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from keras import ops

from gemma_keras.checkpoints.low_rank import Adapter, Pair, Shape
from gemma_keras.checkpoints.names import WeightSpec, weight_specs
from gemma_keras.config import GemmaConfig
from gemma_keras.model.dense import GemmaDense

Targets = str | Sequence[str] | None
ALL_LINEAR = "all-linear"
_DEFAULT = ("query", "value")
_LAYER_NAMES = {"output": "attention_output"}  # where a layer's name is not the weight's


def matrices(config: GemmaConfig) -> dict[str, WeightSpec]:
    """The matrices that LoRA may stand beside, by canonical name."""
    return {name: spec for name, spec in weight_specs(config).items() if spec.kind == "matrix"}


def chosen(config: GemmaConfig, targets: Targets) -> list[str]:
    """Canonical names of the matrices that targets name.

    Args:
        config: of the model.
        targets: `"all-linear"`, or one or more names: of layers here (`query`), of modules in PEFT
            (`q_proj`), or of one matrix (`layers.3.mlp.up`, `model.layers.3.mlp.up_proj`). `None`
            stands for `query` and `value`.

    Raises:
        ValueError: a name is that of no matrix.
    """
    specs = matrices(config)
    if targets == ALL_LINEAR:
        return list(specs)
    names = (
        [targets] if isinstance(targets, str) else list(_DEFAULT if targets is None else targets)
    )
    called = {name: _names_of(spec) for name, spec in specs.items()}
    unknown = [name for name in names if not any(name in of for of in called.values())]
    if unknown or not names:
        short = sorted({spec.name.rsplit(".", 1)[-1] for spec in specs.values()})
        raise ValueError(
            f"LoRA has no target {', '.join(map(repr, unknown)) or 'at all'}; choose of "
            f"{', '.join(short)}, or {ALL_LINEAR!r}"
        )
    return [name for name, of in called.items() if not of.isdisjoint(names)]


def _names_of(spec: WeightSpec) -> set[str]:
    """What a matrix may be called."""
    short, module = spec.name.rsplit(".", 1)[-1], spec.hf.removesuffix(".weight")
    names = {spec.name, short, _LAYER_NAMES.get(short, short), module}
    return names | {module.rsplit(".", 1)[-1]}


def shape_of(rank: int, alpha: float | None, rslora: bool = False) -> Shape:
    """A rank and alpha as people give them; without alpha the scale is 1.

    rsLoRA divides alpha by the rank's square root (Kalajdzievski, 2023, arXiv:2312.03732).

    Raises:
        ValueError: the rank is no positive integer, or alpha no number.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}; it must be a positive integer")
    if alpha is None:
        return Shape(rank, float(rank))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha!r}; it must be a number")
    return Shape(rank, alpha * math.sqrt(rank) if rslora else float(alpha))


# --- in the layers -------------------------------------------------------------------------------


def layers_of(backbone) -> dict[str, GemmaDense]:
    """The layers of `matrices`, by canonical name."""
    return {name: _layer(backbone, name) for name in matrices(backbone.config)}


def _layer(backbone, name: str) -> GemmaDense:
    _, index, within = name.split(".", 2)
    return backbone.transformer_layers[int(index)].sublayer(within)


def enable(backbone, shapes: Mapping[str, Shape], dropout: float = 0.0) -> None:
    """Put new LoRA matrices beside some matrices, and freeze everything else."""
    layers = layers_of(backbone)
    backbone.trainable = True
    for layer in backbone._flatten_layers(include_self=False):
        layer.trainable = False
    for name, shape in shapes.items():
        layers[name].trainable = True
        layers[name].enable_lora(shape.rank, lora_alpha=shape.alpha, dropout=dropout)
    note_lora(backbone)


def disable(backbone) -> None:
    """Remove all of LoRA. Everything is trainable again."""
    for layer in layers_of(backbone).values():
        if layer.has_lora:
            layer.disable_lora()
    for layer in backbone._flatten_layers(include_self=False):
        layer.trainable = True
    note_lora(backbone)


def switch(backbone, on: bool) -> None:
    """Leave LoRA out of what the model computes, or put it back; its matrices stay."""
    for layer in layers_of(backbone).values():
        if layer.has_lora:
            layer.lora_enabled = on


def values_of(backbone, rslora: bool = False) -> Adapter:
    """The LoRA that is in the layers, copied."""
    pairs, dropout = {}, 0.0
    for name, layer in layers_of(backbone).items():
        if layer.has_lora:
            a, b = (
                np.array(ops.convert_to_numpy(matrix), np.float32)
                for matrix in (layer.lora_kernel_a, layer.lora_kernel_b)
            )
            pairs[name], dropout = Pair(a, b, float(layer.lora_alpha)), layer.lora_dropout
    return Adapter(pairs, dropout, rslora)


def put(backbone, adapter: Adapter) -> None:
    """Make a LoRA that of the layers, in place of the one that they have."""
    layers = layers_of(backbone)
    now = {n: Shape(one.lora_rank, one.lora_alpha) for n, one in layers.items() if one.has_lora}
    wanted = {name: pair.shape for name, pair in adapter.pairs.items()}
    dropouts = {one.lora_dropout for one in layers.values() if one.has_lora}
    if now != wanted or dropouts != {adapter.dropout}:
        if now:
            disable(backbone)
        enable(backbone, wanted, adapter.dropout)
    for name, pair in adapter.pairs.items():
        layers[name].lora_kernel_a.assign(pair.a)
        layers[name].lora_kernel_b.assign(pair.b)
    switch(backbone, True)


def add_to_kernels(backbone, sign: int) -> None:
    """Add the product of LoRA's matrices to the matrices, or subtract it.

    Raises:
        ValueError: a matrix is quantized.
    """
    layers = [layer for layer in layers_of(backbone).values() if layer.has_lora]
    if any(layer.quantization_mode is not None for layer in layers):
        raise ValueError(
            "LoRA cannot be merged into quantized weights, which would round it away; export the "
            "model, which merges in float"
        )
    for layer in layers:
        scale = sign * layer.lora_alpha / layer.lora_rank
        update = ops.matmul(layer.lora_kernel_a, layer.lora_kernel_b) * scale
        kernel = layer._kernel
        kernel.assign(ops.cast(ops.cast(kernel, "float32") + update, kernel.dtype))


def note_lora(backbone) -> None:
    """Note LoRA as `keras_hub.models.Backbone.enable_lora` does, for `save_lora_weights`."""
    layers = [layer for layer in backbone._flatten_layers(include_self=False) if layer.weights]
    adapted = [
        i
        for i, layer in enumerate(layers)
        if getattr(layer, "has_lora", getattr(layer, "lora_enabled", False))
    ]
    backbone._lora_enabled_layers = adapted
    if adapted:
        backbone._lora_rank = layers[adapted[0]].lora_rank
