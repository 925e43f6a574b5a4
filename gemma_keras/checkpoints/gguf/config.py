"""Reads GGUF metadata as a `GemmaConfig` and writes it from one, by llama.cpp's conventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_keras.checkpoints.gguf.keys import refuse_unknown
from gemma_keras.config import (
    GemmaConfig,
    LayerSpec,
    layer_kinds,
    not_a_gemma,
    require_layer_count,
    require_positive_int,
)
from gemma_keras.errors import ConfigError, quoted

# Layers of the two 27B models, whose query scale is (hidden / heads) ** -0.5 rather than
# head_dim ** -0.5. GGUF has no key for it; llama.cpp tells them by the number of layers too.
_GGUF_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_GEMMA3_1B_LAYERS = 26
_SCALED_LAYERS = (34, 48, 62)  # of the Gemma 3 whose global positions are divided by 8
_HEAD_DIM_TOO = (
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "rope.dimension_count",
    "rope.dimension_count_swa",
)
# Advice for files that are often given by mistake.
_OTHERS = {
    "clip": "this file holds the image encoder of a model (mmproj); give the file of the text "
    "model",
    "gemma-embedding": "to load EmbeddingGemma, open its Hugging Face folder with "
    "gemma_keras.GemmaTextEmbedder",
}


def config_from_gguf(metadata: Mapping[str, Any], *, tied_head: bool) -> GemmaConfig:
    """Build from GGUF metadata of architecture `gemma`, `gemma2` or `gemma3`.

    Args:
        metadata: key to value; `tokenizer.ggml.tokens` gives the vocabulary size.
        tied_head: whether the file has no `output.weight` of its own.

    Raises:
        ConfigError: another architecture, a missing key or a value out of range.
    """
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ("gemma", "gemma2", "gemma3"):
        hint = f"; {_OTHERS[kind]}" if isinstance(kind, str) and kind in _OTHERS else ""
        raise ConfigError(not_a_gemma(f"the GGUF holds a {quoted(kind)} model") + hint)
    rest = {
        key.removeprefix(f"{kind}."): value
        for key, value in metadata.items()
        if key.startswith(f"{kind}.")
    }
    _as_ollama_means(kind, rest)

    def take(key: str, default: Any = None) -> Any:
        value = rest.pop(key, default)
        if value is None:
            raise ConfigError(f"the GGUF metadata lacks {kind}.{key}")
        return value

    if not take("attention.causal", True):
        raise ConfigError(
            f"the GGUF holds a {kind} with bidirectional attention ({kind}.attention.causal "
            "is false); to load EmbeddingGemma, open its Hugging Face folder with "
            "gemma_keras.GemmaTextEmbedder"
        )
    num_layers, hidden_dim = take("block_count"), take("embedding_length")
    require_layer_count("block_count", num_layers)
    require_positive_int("embedding_length", hidden_dim)
    heads = _per_layer("attention.head_count", take("attention.head_count"), num_layers)
    kv_heads = take("attention.head_count_kv", heads)
    kv_heads = _per_layer("attention.head_count_kv", kv_heads, num_layers)
    ffw = _per_layer("feed_forward_length", take("feed_forward_length"), num_layers)
    for num_heads in heads:
        require_positive_int("attention.head_count", num_heads)
    head_dim = take("attention.key_length", hidden_dim // heads[0])
    for key in _HEAD_DIM_TOO:
        if take(key, head_dim) != head_dim:
            raise ConfigError(
                f"key_length and {kind}.{key} differ; in every supported Gemma they are equal"
            )
    require_positive_int("attention.key_length", head_dim)
    if num_layers == _GGUF_27B_LAYERS.get(kind):
        query_scale = (hidden_dim / heads[0]) ** -0.5
    else:
        query_scale = float(head_dim) ** -0.5

    window = _window(kind, rest)
    kinds = _layer_kinds(kind, num_layers, rest.pop("attention.sliding_window_pattern", None))
    if window is None:
        kinds = ["full_attention"] * num_layers
    theta = _decimal(take("rope.freq_base", 1_000_000.0 if kind == "gemma3" else 10_000.0))
    # The local layers of Gemma 3 always use the base 10 000, unscaled.
    local_theta = _decimal(take("rope.freq_base_swa", 10_000.0 if kind == "gemma3" else theta))
    scale = _rope_scale(rest)
    attention_cap = take("attn_logit_softcapping", 50.0 if kind == "gemma2" else 0)
    final_cap = take("final_logit_softcapping", 30.0 if kind == "gemma2" else 0)
    for key, cap, has_one in (
        ("attn_logit_softcapping", attention_cap, kind == "gemma2"),
        ("final_logit_softcapping", final_cap, kind != "gemma"),
    ):
        if cap and not has_one:
            raise ConfigError(
                f"the GGUF metadata has {kind}.{key} = {quoted(cap)}, but llama.cpp applies "
                f"no such cap in a {kind} model"
            )
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(vocabulary, Sequence):
        raise ConfigError("the GGUF metadata lacks tokenizer.ggml.tokens, the list of tokens")
    for key, own in (("vocab_size", len(vocabulary)), ("embedding_length_out", hidden_dim)):
        if rest.pop(key, own) not in (own, 0):
            raise ConfigError(f"{kind}.{key} in the GGUF metadata must be {own:,} or missing")

    layers = []
    for i, layer_kind in enumerate(kinds):
        local = layer_kind == "sliding_attention"
        layers.append(
            LayerSpec(
                num_heads=heads[i],
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
    config = GemmaConfig(
        vocabulary_size=len(vocabulary),
        hidden_dim=hidden_dim,
        layers=tuple(layers),
        embedding_scale=hidden_dim**0.5,
        final_soft_cap=_decimal(final_cap) if final_cap else None,
        norm_epsilon=_decimal(take("attention.layer_norm_rms_epsilon")),
        tied_head=tied_head,
        context_length=take("context_length"),
    )
    refuse_unknown(rest, kind)
    return config


def _as_ollama_means(kind: str, rest: dict[str, Any]) -> None:
    """Rename in place the keys of a Gemma 3 that Ollama converted to llama.cpp's keys.

    Ollama has its own keys for the rotary bases. Its published files omit the scaling of positions,
    which is 8 in the 4B, 12B and 27B. They give the 1B a soft cap of the logits that it does not
    have. Ollama corrects both by the number of layers (its `gemma3/model_text.go`).
    """
    own = {key: rest.pop(key, None) for key in ("rope.global.freq_base", "rope.local.freq_base")}
    has_images = any(key.startswith(("vision.", "mm.")) for key in rest)
    if kind != "gemma3" or not (has_images or any(own.values())):
        rest |= {key: value for key, value in own.items() if value is not None}
        return
    for theirs, ours in zip(own.values(), ("rope.freq_base", "rope.freq_base_swa"), strict=True):
        if theirs is not None:
            rest.setdefault(ours, theirs)
    rest.setdefault("attention.layer_norm_rms_epsilon", 1e-6)
    rest.setdefault("attention.key_length", 256)
    num_layers = rest.get("block_count")
    if num_layers in _SCALED_LAYERS and "rope.scaling.type" not in rest:
        rest |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    if num_layers == _GEMMA3_1B_LAYERS:
        rest.pop("final_logit_softcapping", None)


def _per_layer(name: str, value: Any, num_layers: int) -> list[Any]:
    values = value if isinstance(value, list) else [value] * num_layers
    if len(values) != num_layers:
        raise ConfigError(
            f"{name} has {len(values)} entries, but the model has {num_layers} layers"
        )
    return values


def _window(kind: str, rest: dict[str, Any]) -> int | None:
    """The window of local layers; `None` where all layers see the whole context."""
    value = rest.pop("attention.sliding_window", 4096 if kind == "gemma2" else 0)
    if value == 0 and isinstance(value, int) and kind != "gemma2":
        return None  # llama.cpp, too, makes all layers of a Gemma 3 global then
    require_positive_int(f"{kind}.attention.sliding_window", value)
    if kind == "gemma":
        raise ConfigError(
            f"the GGUF metadata has gemma.attention.sliding_window = {value}; Gemma 1 has "
            "no sliding window"
        )
    return value


def _layer_kinds(kind: str, num_layers: int, pattern: Any) -> list[str]:
    """Returns `full_attention` or `sliding_attention` for each layer, from the file or by
    default."""
    if not isinstance(pattern, list):
        usual = {"gemma": 1, "gemma2": 2, "gemma3": 6}[kind]
        return layer_kinds(num_layers, usual if pattern is None else pattern)
    if len(pattern) != num_layers or not all(isinstance(local, bool) for local in pattern):
        raise ConfigError(
            f"{kind}.attention.sliding_window_pattern must say for each of {num_layers} "
            "layers whether it has a sliding window"
        )
    return ["sliding_attention" if local else "full_attention" for local in pattern]


def _rope_scale(rest: dict[str, Any]) -> float:
    """Returns the divisor of positions; a factor without a type is linear, as in llama.cpp."""
    scaling = rest.pop("rope.scaling.type", "linear")
    old = rest.pop("rope.scale_linear", 0)
    factor = rest.pop("rope.scaling.factor", old) or 1.0
    if scaling not in ("none", "linear"):
        raise ConfigError(
            f"RoPE scaling {quoted(scaling)} is not supported; Gemma's RoPE scaling is "
            "linear or none"
        )
    return _decimal(factor) if scaling == "linear" else 1.0


def architecture_of(config: GemmaConfig) -> str:
    """GGUF's name of a causal Gemma's architecture: `gemma`, `gemma2` or `gemma3`."""
    first = config.layers[0]
    return "gemma3" if first.qk_norm else "gemma2" if first.post_norms else "gemma"


def config_to_gguf(config: GemmaConfig) -> dict[str, Any]:
    """GGUF metadata that `config_from_gguf` reads as this configuration, but for the vocabulary.

    The tensors show whether the head is tied, and the tokens give the vocabulary's size.

    Raises:
        ConfigError: GGUF, or llama.cpp that reads it, has no way to say it.
    """
    config.require_causal("GGUF of architecture gemma, gemma2 or gemma3")
    first = config.layers[0]
    kind = architecture_of(config)
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
            f"this architecture cannot be written as GGUF of type {kind}: GGUF has no keys "
            "for its query scale, layer pattern, soft caps or scaling factors"
        )
    if kind != "gemma3" and not config.tied_head:
        raise ConfigError(
            f"GGUF cannot store a separate head for a {kind}: its head is the embedding table"
        )
    return metadata


def _stored(value: Any) -> Any:
    """Returns the values as a file stores them: floats are float32."""
    return float(np.float32(value)) if isinstance(value, float) else value


def _decimal(value: Any) -> Any:
    """Returns the shortest decimal of a float32 in a file, as in the original configuration; other
    values unchanged."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    with np.errstate(over="ignore"):  # infinity raises an error where it is used
        return float(str(np.float32(value)))
