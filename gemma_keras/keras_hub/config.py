"""Converts the arguments of KerasHub's backbones to a `GemmaConfig`, and back.

`gemma_keras.keras_hub.convert` describes how KerasHub 0.32 interprets its arguments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from gemma_keras.config import GemmaConfig, LayerSpec, layer_kinds
from gemma_keras.errors import ConfigError

_EPSILON = 1e-6  # of the norms in KerasHub's blocks, independent of the argument
_LOCAL_THETA, _GLOBAL_THETA = 10_000.0, 1_000_000.0
_GLOBAL_EVERY = {False: 2, True: 6}  # by whether it is a Gemma3Backbone


def config_from_keras_hub(backbone: Any, context_length: int | None) -> GemmaConfig:
    """The architecture of a live backbone; its last norm's epsilon counts.

    Raises:
        ConfigError: a `GemmaConfig` cannot describe its computation.
    """
    if getattr(backbone, "is_embedding_model", False):
        raise ConfigError(
            f"the KerasHub model {backbone.name} embeds texts (is_embedding_model) and does "
            "not predict tokens. To load EmbeddingGemma, open its Hugging Face folder with "
            "gemma_keras.GemmaTextEmbedder"
        )
    layers = tuple(_layer_spec(block) for block in backbone.transformer_layers)
    if context_length is None:
        gemma3 = type(backbone).__name__ == "Gemma3Backbone"
        scaled = any(layer.rope_scale != 1 for layer in layers)
        context_length = 8192 if not gemma3 else 131_072 if scaled else 32_768
    config = GemmaConfig(
        vocabulary_size=int(backbone.vocabulary_size),
        hidden_dim=int(backbone.hidden_dim),
        layers=layers,
        embedding_scale=backbone.hidden_dim**0.5,
        final_soft_cap=_soft_cap(backbone.token_embedding.logit_soft_cap),
        norm_epsilon=float(backbone.layer_norm.epsilon),
        context_length=context_length,
    )
    return config


def _layer_spec(block: Any) -> LayerSpec:
    attention, rope = block.attention, block.attention.rope_layer
    if block.use_post_attention_norm != block.use_post_ffw_norm:
        raise ConfigError(
            f"{block.name} of the KerasHub model has "
            f"use_post_attention_norm={block.use_post_attention_norm} and "
            f"use_post_ffw_norm={block.use_post_ffw_norm}; Gemma has both norms or neither"
        )
    if getattr(block, "use_bidirectional_attention", False):
        raise ConfigError(
            f"{block.name} of the KerasHub model has bidirectional attention "
            "(use_bidirectional_attention), which is not supported here. To load "
            "EmbeddingGemma, open its Hugging Face folder with "
            "gemma_keras.GemmaTextEmbedder"
        )
    if rope.rope_type != "linear":
        raise ConfigError(
            f"{block.name} of the KerasHub model has RoPE of type {rope.rope_type!r}; Gemma "
            "uses 'linear'"
        )
    # The first is the argument, the second what attention does: see the top of this module.
    by_head_dim = block.query_head_dim_normalize and attention.query_head_dim_normalize
    # A block of a Gemma 1 or 2 always halves, and has no such attribute.
    ffw_dim = block.intermediate_dim // getattr(block, "gate_dim_reduction", 2)
    window = attention.sliding_window_size if attention.use_sliding_window_attention else None
    return LayerSpec(
        num_heads=int(attention.num_query_heads),
        num_kv_heads=int(attention.num_key_value_heads),
        head_dim=int(attention.head_dim),
        ffw_dim=int(ffw_dim),
        query_scale=_query_scale(
            bool(by_head_dim), attention.head_dim, block.hidden_dim, attention.num_query_heads
        ),
        sliding_window=None if window is None else int(window),
        rope_theta=float(rope.max_wavelength),
        rope_scale=float(rope.scaling_factor),
        qk_norm=bool(getattr(attention, "use_query_key_norm", False)),
        post_norms=bool(block.use_post_ffw_norm),
        attention_soft_cap=_soft_cap(attention.logit_soft_cap),
    )


def _query_scale(by_head_dim: bool, head_dim: int, hidden_dim: int, num_heads: int) -> float:
    return float(head_dim if by_head_dim else hidden_dim // num_heads) ** -0.5


def _soft_cap(value: Any) -> float | None:
    return None if value is None else float(value)


def needs_gemma3(config: GemmaConfig) -> bool:
    """Whether only KerasHub's `Gemma3Backbone` can have these layers."""
    return any(
        layer.qk_norm or layer.rope_scale != 1 or layer.rope_theta == _GLOBAL_THETA
        for layer in config.layers
    )


def config_to_keras_hub(config: GemmaConfig) -> dict[str, Any]:
    """Returns the arguments of KerasHub's backbone, a `Gemma3Backbone` if it `needs_gemma3`.

    Raises:
        ConfigError: that is another architecture; the message names what KerasHub lacks.
    """
    config.require_causal("a KerasHub CausalLM")
    gemma3 = needs_gemma3(config)
    nearest, by_head_dim = _nearest(config, gemma3)
    name = "Gemma3Backbone" if gemma3 else "GemmaBackbone"
    for path, found, built in _differences(config, nearest):
        raise ConfigError(
            f"KerasHub cannot express this architecture: {path} is {found!r}, but its "
            f"{name} has {built!r} there"
        )
    first = config.layers[0]
    window, local_scale, global_scale = _windows(config)
    arguments: dict[str, Any] = {
        "vocabulary_size": config.vocabulary_size,
        "num_layers": len(config.layers),
        "num_query_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "hidden_dim": config.hidden_dim,
        "intermediate_dim": first.ffw_dim * (1 if gemma3 else 2),
        "head_dim": first.head_dim,
        "query_head_dim_normalize": by_head_dim,
        "use_post_ffw_norm": first.post_norms,
        "use_post_attention_norm": first.post_norms,
        "attention_logit_soft_cap": first.attention_soft_cap,
        "final_logit_soft_cap": config.final_soft_cap,
        "use_sliding_window_attention": window is not None,
        "layer_norm_epsilon": _EPSILON,
    }
    if window is not None:
        arguments["sliding_window_size"] = window
    if gemma3:
        arguments |= {
            "image_size": None,
            "use_query_key_norm": first.qk_norm,
            "local_rope_scaling_factor": local_scale,
            "global_rope_scaling_factor": global_scale,
        }
    return arguments


def _nearest(config: GemmaConfig, gemma3: bool) -> tuple[GemmaConfig, bool]:
    """The architecture nearest to this that KerasHub builds, and whether its queries are scaled by
    the head's width."""
    first = config.layers[0]
    scales = {
        by_head_dim: _query_scale(by_head_dim, first.head_dim, config.hidden_dim, first.num_heads)
        for by_head_dim in (True, False)
        if by_head_dim or config.hidden_dim >= first.num_heads
    }
    by_head_dim = next((k for k, v in scales.items() if close(first.query_scale, v)), True)
    window, local_scale, global_scale = _windows(config)
    layers = []
    for kind in layer_kinds(len(config.layers), _GLOBAL_EVERY[gemma3]):
        local = kind == "sliding_attention" and window is not None
        layers.append(
            dataclasses.replace(
                first,
                query_scale=scales[by_head_dim],
                sliding_window=window if local else None,
                rope_theta=_GLOBAL_THETA if gemma3 and not local else _LOCAL_THETA,
                rope_scale=(local_scale if local else global_scale) if gemma3 else 1.0,
            )
        )
    nearest = dataclasses.replace(
        config,
        layers=tuple(layers),
        embedding_scale=config.hidden_dim**0.5,
        norm_epsilon=_EPSILON,
        tied_head=True,
    )
    return nearest, by_head_dim


def _windows(config: GemmaConfig) -> tuple[int | None, float, float]:
    """The window, and the scale of positions in the first layer with and without one."""
    local = next((s for s in config.layers if s.sliding_window is not None), None)
    full = next((s for s in config.layers if s.sliding_window is None), None)
    return (
        local.sliding_window if local else None,
        local.rope_scale if local else 1.0,
        full.rope_scale if full else 1.0,
    )


def _differences(config: GemmaConfig, other: GemmaConfig) -> Iterator[tuple[str, Any, Any]]:
    """Where two configurations with equally many layers differ: the field, and both values."""
    pairs = [("", config, other)] + [
        (f"layers.{i}.", *layers)
        for i, layers in enumerate(zip(config.layers, other.layers, strict=True))
    ]
    for prefix, one, two in pairs:
        for field in dataclasses.fields(one):
            found, built = getattr(one, field.name), getattr(two, field.name)
            if field.name != "layers" and not close(found, built):
                yield f"{prefix}{field.name}", found, built


def close(found: Any, built: Any) -> bool:
    """Equal, floats within float32's rounding: files may carry `1 / 16` or `256 ** -0.5`."""
    if isinstance(found, float) and isinstance(built, float):
        return math.isclose(found, built, rel_tol=1e-7)
    return found == built
