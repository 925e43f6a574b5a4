"""GGUF metadata read as a `GemmaConfig` and written from one, by llama.cpp's conventions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_keras.config import GemmaConfig, LayerSpec, layer_kinds, require_positive_int
from gemma_keras.errors import ConfigError

# Layers of the two 27B models, whose query scale is (hidden / heads) ** -0.5 rather than
# head_dim ** -0.5. GGUF has no key for it; llama.cpp tells them by the number of layers too.
_GGUF_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def config_from_gguf(metadata: Mapping[str, Any], *, tied_head: bool) -> GemmaConfig:
    """As `GemmaConfig.from_gguf`."""
    kind = metadata.get("general.architecture")
    if kind not in ("gemma", "gemma2", "gemma3"):
        raise ConfigError(f"the GGUF holds a {kind!r} model, not a gemma, gemma2 or gemma3")

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{key}", default)
        if value is None:
            raise ConfigError(f"the GGUF metadata lacks {kind}.{key}")
        return value

    if not metadata.get(f"{kind}.attention.causal", True):
        raise ConfigError(
            f"the GGUF holds a {kind} that looks both ways ({kind}.attention.causal is false); "
            "for EmbeddingGemma load its Hugging Face folder with gemma_keras.GemmaTextEmbedder"
        )
    num_layers, hidden_dim = get("block_count"), get("embedding_length")
    require_positive_int("block_count", num_layers)
    require_positive_int("embedding_length", hidden_dim)
    num_heads = get("attention.head_count")
    kv_heads = get("attention.head_count_kv", num_heads)
    kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * num_layers
    ffw = get("feed_forward_length")
    ffw = ffw if isinstance(ffw, list) else [ffw] * num_layers
    if len(kv_heads) != num_layers or len(ffw) != num_layers:
        raise ConfigError(f"per-layer metadata does not describe {num_layers} layers")
    require_positive_int("attention.head_count", num_heads)
    head_dim = get("attention.key_length", hidden_dim // num_heads)
    if get("attention.value_length", head_dim) != head_dim:
        raise ConfigError("key_length and value_length differ; no Gemma this project knows does so")
    if num_layers == _GGUF_27B_LAYERS.get(kind):
        query_scale = (hidden_dim / num_heads) ** -0.5
    else:
        query_scale = float(head_dim) ** -0.5

    window = 0 if kind == "gemma" else get("attention.sliding_window", 4096)
    global_every = {"gemma": 1, "gemma2": 2, "gemma3": 6}[kind]
    theta = _decimal(get("rope.freq_base", 1_000_000.0 if kind == "gemma3" else 10_000.0))
    # The file has the global base only; the local layers of Gemma 3 rotate with 10 000, unscaled.
    local_theta = _decimal(get("rope.freq_base_swa", 10_000.0 if kind == "gemma3" else theta))
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ConfigError(f"RoPE scaling {scaling!r} is not one Gemma uses")
    scale = _decimal(get("rope.scaling.factor", 1.0)) if scaling == "linear" else 1.0
    attention_cap = metadata.get("gemma2.attn_logit_softcapping", 50.0 if kind == "gemma2" else 0)
    final_cap = metadata.get(f"{kind}.final_logit_softcapping", 30.0 if kind == "gemma2" else 0)

    layers = []
    for i, layer_kind in enumerate(layer_kinds(num_layers, global_every)):
        local = layer_kind == "sliding_attention"
        layers.append(
            LayerSpec(
                num_heads=num_heads,
                num_kv_heads=kv_heads[i],
                head_dim=head_dim,
                ffw_dim=ffw[i],
                query_scale=query_scale,
                sliding_window=window if local else None,
                rope_theta=local_theta if local else theta,
                rope_scale=1.0 if local and kind == "gemma3" else scale,
                qk_norm=kind == "gemma3",
                post_norms=kind != "gemma",
                attention_soft_cap=_decimal(attention_cap) if attention_cap else None,
            )
        )
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    if vocabulary is None:
        raise ConfigError("the GGUF metadata lacks tokenizer.ggml.tokens")
    return GemmaConfig(
        vocabulary_size=len(vocabulary),
        hidden_dim=hidden_dim,
        layers=tuple(layers),
        embedding_scale=hidden_dim**0.5,
        final_soft_cap=_decimal(final_cap) if final_cap else None,
        norm_epsilon=_decimal(get("attention.layer_norm_rms_epsilon")),
        tied_head=tied_head,
        context_length=get("context_length"),
    )


def config_to_gguf(config: GemmaConfig) -> dict[str, Any]:
    """GGUF metadata that `config_from_gguf` reads as this configuration, but for the vocabulary.

    Whether the head is tied is said by the tensors, and the vocabulary's size by the tokens.

    Raises:
        ConfigError: GGUF, or llama.cpp that reads it, has no way to say it.
    """
    config.require_causal("GGUF of architecture gemma, gemma2 or gemma3")
    first = config.layers[0]
    kind = "gemma3" if first.qk_norm else "gemma2" if first.post_norms else "gemma"
    local = next((s for s in config.layers if s.sliding_window is not None), None)
    full = next((s for s in config.layers if s.sliding_window is None), first)
    values: dict[str, Any] = {
        "context_length": config.context_length,
        "embedding_length": config.hidden_dim,
        "block_count": len(config.layers),
        "feed_forward_length": first.ffw_dim,
        "attention.head_count": first.num_heads,
        "attention.head_count_kv": first.num_kv_heads,
        "attention.key_length": first.head_dim,
        "attention.value_length": first.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.freq_base": full.rope_theta,
    }
    if local is not None:
        values["attention.sliding_window"] = local.sliding_window
    if kind == "gemma3" and local is not None:
        values["rope.freq_base_swa"] = local.rope_theta
    if full.rope_scale != 1:
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": full.rope_scale}
    if kind == "gemma2":
        values["attn_logit_softcapping"] = first.attention_soft_cap
    if kind != "gemma":
        values["final_logit_softcapping"] = config.final_soft_cap
    metadata: dict[str, Any] = {"general.architecture": kind}
    metadata |= {f"{kind}.{key}": _stored(v) for key, v in values.items() if v is not None}
    # What that leaves out or cannot say shows when it is read again.
    vocabulary = {"tokenizer.ggml.tokens": range(config.vocabulary_size)}
    if config_from_gguf(metadata | vocabulary, tied_head=config.tied_head) != config:
        raise ConfigError(
            f"this architecture cannot be written as GGUF of type {kind}: its query scale, for "
            "which GGUF has no key, is not a published Gemma's, its layers differ in more than "
            "their window or come in another order, or it caps or scales something else"
        )
    if kind != "gemma3" and not config.tied_head:
        raise ConfigError(f"GGUF has no head of its own for a {kind}; it is the embedding's table")
    return metadata


def _stored(value: Any) -> Any:
    """What a file gives back: its numbers with a point are float32."""
    return float(np.float32(value)) if isinstance(value, float) else value


def _decimal(value: Any) -> Any:
    """The shortest decimal of the float32 that a file holds, as a configuration was written; what
    is no number as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    with np.errstate(over="ignore"):  # infinity is refused where it is used
        return float(str(np.float32(value)))
