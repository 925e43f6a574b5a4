"""Converts KerasHub's Gemma models in memory to a `Checkpoint`, and makes them from one.

Supported are `GemmaBackbone` (Gemma 1 and 2) and `Gemma3Backbone`, alone or inside a task such as
`GemmaCausalLM`. The computation of the layers counts. In KerasHub 0.32:

* `intermediate_dim` of a Gemma 1 or 2 is twice the width of the MLP, of a Gemma 3 the width;
* the rotary bases are constants: 10 000, and 1 000 000 in the global layers of a Gemma 3; without a
  sliding window all layers are global;
* Gemma 1 and 2 interleave the halves of rotated queries and keys alike, so scores are the same;
* `layer_norm_epsilon` only applies to the last norm; the blocks always have 1e-6. A `GemmaConfig`
  has one epsilon: a model with two is rejected;
* `query_head_dim_normalize=False`, the 27B sizes, is not passed on to attention either, so KerasHub
  scales their queries by `head_dim ** -0.5`. Here the configuration counts, not the layers. Gemma 2
  27B and Gemma 3 27B were trained with `(hidden_dim // num_query_heads) ** -0.5`, as in the
  authors' code and every other runtime. Models made here set the scale in their attention layers;
* `use_bidirectional_attention` with a window of W sees W // 2 tokens ahead and W - 1 - W // 2 back.
  If W is even, as EmbeddingGemma's 512, that is one fewer than transformers: such models are
  rejected.

Dropout is ignored, because it only affects training. Source: keras_hub/src/models/gemma and gemma3.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gemma_keras.checkpoints.chat_templates import turns_of
from gemma_keras.checkpoints.names import parameter_count, weight_specs
from gemma_keras.checkpoints.source import Checkpoint, NamedWeights, finite
from gemma_keras.checkpoints.special_pieces import with_control_pieces
from gemma_keras.config import GemmaConfig, LayerSpec
from gemma_keras.errors import CheckpointError, ConfigError
from gemma_keras.keras_hub.config import (
    close,
    config_from_keras_hub,
    config_to_keras_hub,
    needs_gemma3,
)

# Class and its package, so that nothing is imported to tell a KerasHub model from another.
_BACKBONES = {
    ("GemmaBackbone", "keras_hub.src.models.gemma"),
    ("Gemma3Backbone", "keras_hub.src.models.gemma3"),
}


def read_keras_hub(
    model: Any, *, instruction_tuned: bool = False, context_length: int | None = None
) -> Checkpoint:
    """Read a KerasHub Gemma of any generation from memory.

    Args:
        model: a `keras_hub.models.GemmaBackbone` or `Gemma3Backbone`, or a task that has one, such
            as `GemmaCausalLM`. Of a Gemma 3 with a vision encoder the text part is read.
        instruction_tuned: whether it was tuned to follow the turns that its tokenizer has tokens
            for; KerasHub's models do not say.
        context_length: in tokens; KerasHub's models do not say. By default what the published sizes
            have: 8,192, of a Gemma 3 32,768, or 131,072 if its positions are scaled.

    Returns:
        Its weights are read from the model on demand, with LoRA merged.

    Raises:
        ConfigError: it is not such a model, or a `GemmaConfig` cannot describe its computation.
        CheckpointError: it has been quantized, or has weights that a Gemma does not have.
    """
    backbone = _backbone_of(model)
    _refuse_quantized(backbone)
    config = config_from_keras_hub(backbone, context_length)
    _check_epsilons(backbone, config)
    num_parameters = sum(math.prod(variable.shape) for variable in _text_weights(backbone))
    if num_parameters != parameter_count(config):
        raise CheckpointError(
            f"the KerasHub model {backbone.name} has {num_parameters:,} parameters; a Gemma "
            f"with its configuration has {parameter_count(config):,}, so one of its parts "
            "is not supported"
        )
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    proto = getattr(tokenizer, "proto", None)
    return Checkpoint(
        config=config,
        weights=_KerasHubWeights(backbone, config),
        tokenizer_model=None if proto is None else with_control_pieces(proto),
        instruction_tuned=instruction_tuned,
        turns=turns_of(None, proto)[0],
        provenance={"format": "keras_hub", "name": model.name, "license": "gemma"},
    )


def write_keras_hub(checkpoint: Checkpoint, dtype: Any = None) -> Any:
    """Make the KerasHub model that computes what a checkpoint describes.

    The context length is not written: KerasHub's models have none. A 27B size saved by KerasHub
    itself loses its query scale when KerasHub loads it again; see the top of this module.

    Args:
        checkpoint: configuration, weights, and the tokenizer if there is one.
        dtype: Keras dtype policy of the model; `None` is Keras's default.

    Returns:
        A `keras_hub.models.GemmaCausalLM` or `Gemma3CausalLM`; its preprocessor is `None` where
        the checkpoint has no tokenizer.

    Raises:
        ConfigError: KerasHub cannot build this architecture; the message names what it lacks.
        CheckpointError: a weight is missing or has another shape, or KerasHub cannot load the
            tokenizer.
    """
    import keras_hub

    config = checkpoint.config
    gemma3 = needs_gemma3(config)
    models = keras_hub.models
    backbone_class = models.Gemma3Backbone if gemma3 else models.GemmaBackbone
    arguments = config_to_keras_hub(config)  # before anything is allocated
    preprocessor = _preprocessor(checkpoint, gemma3)
    backbone = backbone_class(**arguments, dtype=dtype)
    for block in backbone.transformer_layers:
        block.attention.query_head_dim_normalize = arguments["query_head_dim_normalize"]
    _assign(backbone, config, checkpoint.weights)
    task_class = models.Gemma3CausalLM if gemma3 else models.GemmaCausalLM
    return task_class(backbone=backbone, preprocessor=preprocessor)


# --- one table of names --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Transform:
    """Converts a weight from and to KerasHub's layout.

    Attributes:
        read: KerasHub's array as the canonical one.
        write: the canonical array as KerasHub's, which has the given shape.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


_AS_IS = _Transform(lambda array: array, lambda array, shape: array)
# [heads, in, head_dim] there, [in, heads * head_dim] here
_HEADS_OUT = _Transform(
    lambda array: array.transpose(1, 0, 2).reshape(array.shape[1], -1),
    lambda array, shape: array.reshape(shape[1], shape[0], shape[2]).transpose(1, 0, 2),
)
# [heads, head_dim, out] there, [heads * head_dim, out] here
_HEADS_IN = _Transform(
    lambda array: array.reshape(-1, array.shape[2]),
    lambda array, shape: array.reshape(shape),
)

# Canonical name to layer and variable in KerasHub, and the transform.
_MODEL_ROWS = {
    "token_embedding": ("token_embedding", "embeddings", _AS_IS),
    "final_norm": ("layer_norm", "scale", _AS_IS),
}
_BLOCK_ROWS = {
    "pre_attention_norm": ("pre_attention_norm", "scale", _AS_IS),
    "attention.query": ("attention.query_dense", "kernel", _HEADS_OUT),
    "attention.key": ("attention.key_dense", "kernel", _HEADS_OUT),
    "attention.value": ("attention.value_dense", "kernel", _HEADS_OUT),
    "attention.query_norm": ("attention.query_norm", "scale", _AS_IS),
    "attention.key_norm": ("attention.key_norm", "scale", _AS_IS),
    "attention.output": ("attention.output_dense", "kernel", _HEADS_IN),
    "post_attention_norm": ("post_attention_norm", "scale", _AS_IS),
    "pre_ffw_norm": ("pre_ffw_norm", "scale", _AS_IS),
    "mlp.gate": ("gating_ffw", "kernel", _AS_IS),
    "mlp.up": ("gating_ffw_2", "kernel", _AS_IS),
    "mlp.down": ("ffw_linear", "kernel", _AS_IS),
    "post_ffw_norm": ("post_ffw_norm", "scale", _AS_IS),
}


def _find(backbone: Any, name: str) -> tuple[Any, _Transform]:
    """The variable of a canonical name, of a LoRA layer the merged one, and its transform."""
    owner, rows = backbone, _MODEL_ROWS
    if name.startswith("layers."):
        _, index, name = name.split(".", 2)
        owner, rows = backbone.transformer_layers[int(index)], _BLOCK_ROWS
    layer, variable, transform = rows[name]
    return operator.attrgetter(f"{layer}.{variable}")(owner), transform


class _KerasHubWeights(NamedWeights):
    """Canonical names to float32 arrays, each read on demand from the model in memory."""

    def __init__(self, backbone: Any, config: GemmaConfig) -> None:
        self._backbone = backbone
        self.specs = weight_specs(config)

    def __getitem__(self, name: str) -> np.ndarray:
        from keras import ops

        spec = self.specs[name]
        variable, transform = _find(self._backbone, name)
        array = transform.read(ops.convert_to_numpy(ops.cast(variable, "float32")))
        if array.shape != spec.shape:
            raise CheckpointError(f"{name} has shape {array.shape}, expected {spec.shape}")
        return finite(name, array)

    def table_chunks(self, name: str, chunk_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
        """As `gemma_keras.checkpoints.source.table_chunks`."""
        from gemma_keras.model.chunked import variable_chunks

        pieces = variable_chunks(_find(self._backbone, name)[0], chunk_bytes)
        return ((first, finite(name, array)) for first, array in pieces)


def _assign(backbone: Any, config: GemmaConfig, weights: Mapping[str, np.ndarray]) -> None:
    from gemma_keras.model.chunked import fill
    from gemma_keras.model.loading import weight_chunks

    for name, spec in weight_specs(config).items():
        if name not in weights:
            raise CheckpointError(f"the weights lack {name}")
        if spec.kind == "table":
            fill(_find(backbone, name)[0], weight_chunks(weights, spec))
            continue
        array = weights[name]
        if array.shape != spec.shape:
            raise CheckpointError(f"{name} has shape {array.shape}, expected {spec.shape}")
        variable, transform = _find(backbone, name)
        variable.assign(transform.write(array, tuple(variable.shape)))


# --- what a live model is ------------------------------------------------------------------------


def _backbone_of(model: Any) -> Any:
    backbone = getattr(model, "backbone", model)
    # The class itself, not one that inherits from it and may compute something else.
    kind = type(backbone)
    if (kind.__name__, kind.__module__.rpartition(".")[0]) not in _BACKBONES:
        raise ConfigError(
            f"a {kind.__module__}.{kind.__name__} is not supported; give a "
            "keras_hub.models.GemmaBackbone or Gemma3Backbone, or a task that has one"
        )
    return backbone


def _text_layers(backbone: Any) -> list[Any]:
    return [backbone.token_embedding, *backbone.transformer_layers, backbone.layer_norm]


def _text_weights(backbone: Any) -> list[Any]:
    """The variables of the text part, LoRA's left out."""
    return [
        variable
        for layer in _text_layers(backbone)
        for variable in layer.weights
        if not variable.name.startswith("lora_")
    ]


def _refuse_quantized(backbone: Any) -> None:
    for layer in _text_layers(backbone):
        for sublayer in layer._flatten_layers():
            if sublayer.quantization_mode is not None:
                raise CheckpointError(
                    f"{sublayer.path} of the KerasHub model has been quantized to "
                    f"{sublayer.quantization_mode}; convert the model before you call "
                    "quantize. The converted model has quantize, too"
                )


def _check_epsilons(backbone: Any, config: GemmaConfig) -> None:
    for path, epsilon in _epsilons(backbone, config.layers):
        if not close(epsilon, config.norm_epsilon):
            raise ConfigError(
                f"the norm {path} of the KerasHub model has the epsilon {epsilon}, but the "
                f"last norm has {config.norm_epsilon}. Here all norms share one epsilon, "
                "but KerasHub passes layer_norm_epsilon only to the last norm. Set the "
                "attribute epsilon of backbone.layer_norm or of all other norms, so that "
                "they agree"
            )


def _epsilons(backbone: Any, layers: tuple[LayerSpec, ...]) -> Iterator[tuple[str, float]]:
    """Path and epsilon of every norm in the blocks."""
    for block, spec in zip(backbone.transformer_layers, layers, strict=True):
        for name, (path, variable, _) in _BLOCK_ROWS.items():
            absent = (name.startswith("post_") and not spec.post_norms) or (
                name.startswith("attention.") and not spec.qk_norm
            )
            if variable == "scale" and not absent:
                yield f"{block.name}.{path}", float(operator.attrgetter(path)(block).epsilon)


def _preprocessor(checkpoint: Checkpoint, gemma3: bool) -> Any:
    """KerasHub's preprocessor; its `generate` stops at two ids, the second of which it does not
    save."""
    if checkpoint.tokenizer_model is None:
        return None
    preprocessor = _make_preprocessor(checkpoint.tokenizer_model, gemma3)
    end = preprocessor.tokenizer.end_token_id
    # The end of a turn, if it is tuned to turns, is the last.
    more = [index for index in checkpoint.stop_ids() if index != end]
    if more:
        preprocessor.tokenizer.end_token2_id = more[-1]
    return preprocessor


def _make_preprocessor(tokenizer_model: bytes, gemma3: bool) -> Any:
    import keras_hub

    models = keras_hub.models
    try:
        if gemma3:
            # Only the text part, because KerasHub's image tokens are not in every vocabulary.
            tokenizer = models.Gemma3Tokenizer(proto=tokenizer_model, has_vision_tokens=False)
            return models.Gemma3CausalLMPreprocessor(tokenizer)
        return models.GemmaCausalLMPreprocessor(models.GemmaTokenizer(proto=tokenizer_model))
    except ValueError as error:
        raise CheckpointError(f"KerasHub cannot load the tokenizer: {error}") from error
