"""Reads Hugging Face's `config.json` as a `GemmaConfig` and writes it from one.

Published files omit values that equal the defaults of transformers' configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_keras.checkpoints.hf.keys import refuse_unknown, telling_keys
from gemma_keras.config import (
    GemmaConfig,
    LayerSpec,
    layer_kinds,
    not_a_gemma,
    require_bool,
    require_layer_count,
    require_positive,
    require_positive_int,
)
from gemma_keras.errors import ConfigError, listed, quoted
from gemma_keras.sizes import SIZES

_HF_COMMON = {
    "vocab_size": 256_000,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_HF_GEMMA2 = _HF_COMMON | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": _HF_COMMON
    | {
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "gemma2": _HF_GEMMA2,
    # transformers' class of it was made from Gemma 2's, sizes included
    "gemma3_text": _HF_GEMMA2
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
}

# Every n-th layer sees the whole context, the others a sliding window. The same for GGUF, which
# does not always carry it.
_GLOBAL_EVERY = {"gemma2": 2, "gemma3_text": 6}
_GEMMA3_THETA = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}

_TANH_GELU = ("gelu_pytorch_tanh",)


def named_config(name: str) -> GemmaConfig:
    """The configuration of a published size, such as `gemma_2b`.

    All are in `gemma_keras/sizes.py`.

    Raises:
        ConfigError: no size has that name; the message lists those that are known.
    """
    if name not in SIZES:
        known = ", ".join(sorted(SIZES))
        raise ConfigError(f"there is no Gemma size {name!r}; known: {known}")
    return config_from_hf(SIZES[name].hf)


def config_from_hf(data: Mapping[str, Any]) -> GemmaConfig:
    """Build from the content of a Hugging Face `config.json`.

    Reads model types `gemma`, `gemma2`, `gemma3_text` and the text part of `gemma3`. Keys
    that are absent take the defaults of transformers' configuration classes, because the
    published files leave out what equals them.

    Raises:
        ConfigError: the model type is not supported, a key is unknown, or a value describes a
            computation that Gemma does not have (another activation, biases, ...).
    """
    if data.get("model_type") == "gemma3":
        data = _text_part(data)
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in _HF_DEFAULTS:
        raise ConfigError(not_a_gemma(f"config.json has model_type {quoted(kind)}"))

    rest = telling_keys(data)
    defaults = _HF_DEFAULTS[kind]

    def take(key: str, default: Any = None) -> Any:
        return rest.pop(key, defaults.get(key, default))

    # Gemma 1 was published with hidden_act="gelu", by which the tanh approximation was meant.
    legacy = take("hidden_act", None)
    activation = take("hidden_activation", None) or (
        "gelu_pytorch_tanh" if kind == "gemma" and legacy in ("gelu", None) else legacy
    )
    if (activation or "gelu_pytorch_tanh") not in _TANH_GELU:
        raise ConfigError(f"the activation is {quoted(activation)}; Gemma's is gelu_pytorch_tanh")

    num_layers = take("num_hidden_layers")
    require_layer_count("num_hidden_layers", num_layers)
    head_dim = take("head_dim")
    kinds = take("layer_types")
    pattern = _pattern(kind, take("sliding_window_pattern", data.get("_sliding_window_pattern")))
    kinds = kinds or layer_kinds(num_layers, pattern)
    window = take("sliding_window")
    bidirectional = _bidirectional(kind, take("use_bidirectional_attention", False))
    if bidirectional and window is not None:
        window = _reach(window)
    if (
        not isinstance(kinds, (list, tuple))
        or len(kinds) != num_layers
        or any(k not in ("full_attention", "sliding_attention") for k in kinds)
    ):
        raise ConfigError(f"layer_types does not describe {num_layers} layers: {quoted(kinds)}")
    if "sliding_attention" in kinds and window is None:
        raise ConfigError("layer_types has sliding_attention but sliding_window is null")
    windows = take("use_sliding_window", None)
    if windows not in (None, "sliding_attention" in kinds):
        raise ConfigError(
            f"use_sliding_window is {quoted(windows)}, which contradicts layer_types or model_type"
        )
    ropes = _hf_ropes(kind, rest)
    hidden_dim = take("hidden_size")
    require_positive_int("hidden_size", hidden_dim)
    query_pre_attn_scalar = take("query_pre_attn_scalar", head_dim)
    require_positive("query_pre_attn_scalar", query_pre_attn_scalar)
    shared = {
        "num_heads": take("num_attention_heads"),
        "num_kv_heads": take("num_key_value_heads"),
        "head_dim": head_dim,
        "ffw_dim": take("intermediate_size"),
        "query_scale": query_pre_attn_scalar**-0.5,
        "qk_norm": kind == "gemma3_text",
        "post_norms": kind != "gemma",
        "attention_soft_cap": take("attn_logit_softcapping"),
        "bidirectional": bidirectional,
    }
    config = GemmaConfig(
        vocabulary_size=take("vocab_size"),
        hidden_dim=hidden_dim,
        layers=tuple(
            LayerSpec(
                sliding_window=window if k == "sliding_attention" else None,
                rope_theta=ropes[k][0],
                rope_scale=ropes[k][1],
                **shared,
            )
            for k in kinds
        ),
        embedding_scale=hidden_dim**0.5,
        final_soft_cap=take("final_logit_softcapping"),
        norm_epsilon=take("rms_norm_eps"),
        tied_head=True if (tied := take("tie_word_embeddings")) is None else tied,
        context_length=take("max_position_embeddings"),
    )
    refuse_unknown(rest)
    return config


def _text_part(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the text part of a multimodal `config.json`; the outer keys must not contradict
    it."""
    text = data.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError("a gemma3 config.json must have a text_config")
    text = {"model_type": "gemma3_text"} | dict(text)
    around = telling_keys({key: value for key, value in data.items() if key != "text_config"})
    # transformers 5 reads whether the head is tied out here, transformers 4 in there.
    tied = around.pop("tie_word_embeddings", None)
    if tied is not None:
        text["tie_word_embeddings"] = tied
    known = _HF_DEFAULTS["gemma3_text"] | text
    for key in around.keys() & known.keys():
        found = around.pop(key)
        if found is not None and found != known[key]:
            raise ConfigError(
                f"config.json has {key[:60]}={quoted(found)}, but its text_config has "
                f"{quoted(known[key])}"
            )
    refuse_unknown(around)
    return text


def config_to_hf(config: GemmaConfig) -> dict[str, Any]:
    """The content of a Hugging Face `config.json` that `config_from_hf` reads as a configuration.

    It uses the keys of the published files, which transformers 4 and 5 both read.

    Raises:
        ConfigError: no Hugging Face model type can describe it, for example if layers differ in
            more than their window.
    """
    first = config.layers[0]
    kind = "gemma3_text" if first.qk_norm else "gemma2" if first.post_norms else "gemma"
    local = next((s for s in config.layers if s.sliding_window is not None), None)
    full = next((s for s in config.layers if s.sliding_window is None), first)
    window = local.sliding_window if local else None
    data: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": first.ffw_dim,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": config.norm_epsilon,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": full.rope_theta,
    }
    if full.rope_scale != 1:
        data["rope_scaling"] = {"rope_type": "linear", "factor": full.rope_scale}
    if kind != "gemma":
        scalar = first.query_scale**-2
        data |= {
            # 256 comes back from 256 ** -0.5 with a rounding error
            "query_pre_attn_scalar": round(scalar) if _is_root(first, round(scalar)) else scalar,
            "sliding_window": window,
            "attn_logit_softcapping": first.attention_soft_cap,
            "final_logit_softcapping": config.final_soft_cap,
            "layer_types": [
                "full_attention" if s.sliding_window is None else "sliding_attention"
                for s in config.layers
            ],
        }
    if kind == "gemma3_text":
        data["rope_local_base_freq"] = local.rope_theta if local else 10_000.0
    if first.bidirectional:
        data["use_bidirectional_attention"] = True
        if window is not None:
            data["sliding_window"] = _window_of_reach(window)
    # Reading it back shows what it cannot describe.
    if config_from_hf(data) != config:
        raise ConfigError(
            "this architecture cannot be written as a Hugging Face config.json of type "
            f"{kind}: its layers or its scaling factors differ from every published Gemma"
        )
    return data


def _pattern(kind: str, value: Any) -> Any:
    """Every how many layers one sees the whole context, the file's if it is a Gemma 3's."""
    own = _GLOBAL_EVERY.get(kind, 1)
    if value not in (None, own) and kind != "gemma3_text":
        raise ConfigError(
            f"sliding_window_pattern is {quoted(value)}; every implementation of {kind} "
            f"uses {own}. Use layer_types to describe another pattern"
        )
    return own if value is None else value


def _bidirectional(kind: str, value: Any) -> bool:
    """`use_bidirectional_attention`, which only a Gemma 3 may set."""
    require_bool("use_bidirectional_attention", value or False)
    # In transformers' Gemma 1 and 2 the key does not reach the mask, and no such file is published.
    if value and kind != "gemma3_text":
        raise ConfigError(
            f"use_bidirectional_attention is true for a {kind} model; it is only supported "
            "for gemma3_text"
        )
    return bool(value)


# A file says how wide a bidirectional window is, ahead and back together; transformers halves that,
# rounding down, and lets a query see keys at distances up to the half (Gemma3TextConfig, and
# `_bidirectional_window_overlay` in modeling_gemma3.py). 512 and 513 are the same: 256 each way.


def _reach(window: Any) -> int:
    """The file's window as `LayerSpec.sliding_window`, a bound that distances stay below."""
    require_positive_int("sliding_window", window)
    return window // 2 + 1


def _window_of_reach(reach: int) -> int:
    """The inverse; of the two windows that mean the same, the even one if that is not 0."""
    return max(1, (reach - 1) * 2)


def _is_root(layer: LayerSpec, scalar: int) -> bool:
    return scalar > 0 and scalar**-0.5 == layer.query_scale


def _hf_ropes(kind: str, rest: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Layer kind to (theta, scale), from the old keys or from `rope_parameters`; consumes both."""
    theta = rest.pop("rope_theta", None)
    local_theta = rest.pop("rope_local_base_freq", None)
    scaling = _mapping("rope_scaling", rest.pop("rope_scaling", None))
    parameters = _mapping("rope_parameters", rest.pop("rope_parameters", None))
    if kind != "gemma3_text":
        given = {"rope_theta": theta} | parameters | scaling
        rope = _one_rope(given, default_theta=10_000.0)
        return {"full_attention": rope, "sliding_attention": rope}
    ropes = {}
    for layer_kind, old_theta in (("full_attention", theta), ("sliding_attention", local_theta)):
        new = _mapping(f"rope_parameters.{layer_kind}", parameters.get(layer_kind))
        given = {"rope_theta": old_theta} | new
        if layer_kind == "full_attention":
            given |= scaling
        ropes[layer_kind] = _one_rope(given, default_theta=_GEMMA3_THETA[layer_kind])
    unknown = set(parameters) - set(ropes)
    if unknown:
        raise ConfigError(f"rope_parameters has unknown layer kinds: {listed(sorted(unknown))}")
    return ropes


def _one_rope(given: dict[str, Any], *, default_theta: float) -> tuple[float, float]:
    rope_type = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    theta = given.pop("rope_theta", None) or default_theta
    factor = given.pop("factor", None)
    if given or rope_type not in ("default", "linear"):
        raise ConfigError(
            f"RoPE of type {quoted(rope_type)} with {listed(sorted(given)) or 'nothing'} is "
            "not supported; Gemma uses default or linear"
        )
    require_positive("rope_theta", theta)
    if rope_type == "default":
        return float(theta), 1.0
    if factor is None:
        raise ConfigError("linear RoPE scaling needs a factor")
    require_positive("factor", factor)
    return float(theta), float(factor)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be an object, found {quoted(value)}")
    return dict(value or {})
