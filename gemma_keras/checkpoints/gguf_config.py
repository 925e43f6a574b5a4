"""GGUF metadata read as a `GemmaConfig`, by llama.cpp's conventions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    theta = float(get("rope.freq_base", 1_000_000.0 if kind == "gemma3" else 10_000.0))
    # The file has the global base only; the local layers of Gemma 3 rotate with 10 000, unscaled.
    local_theta = float(get("rope.freq_base_swa", 10_000.0 if kind == "gemma3" else theta))
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ConfigError(f"RoPE scaling {scaling!r} is not one Gemma uses")
    scale = float(get("rope.scaling.factor", 1.0)) if scaling == "linear" else 1.0
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
                attention_soft_cap=attention_cap or None,
            )
        )
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    if vocabulary is None:
        raise ConfigError("the GGUF metadata lacks tokenizer.ggml.tokens")
    epsilon = float(get("attention.layer_norm_rms_epsilon"))
    return GemmaConfig(
        vocabulary_size=len(vocabulary),
        hidden_dim=hidden_dim,
        layers=tuple(layers),
        embedding_scale=hidden_dim**0.5,
        final_soft_cap=final_cap or None,
        # float32 in the file; the shortest decimal that reads back as the same float32
        norm_epsilon=float(f"{epsilon:.7g}"),
        tied_head=tied_head,
        context_length=get("context_length"),
    )
