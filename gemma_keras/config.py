"""The architecture of a Gemma as data: sizes, windows, scales, soft caps.

Everything downstream (the Keras model, the ONNX lowerings, the engine) reads these two frozen
dataclasses and never asks which generation it is looking at.

Sources of the numbers: the Gemma, Gemma 2 and Gemma 3 technical reports, the ``config.json``
files published with the checkpoints, and llama.cpp's conventions for GGUF metadata.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_keras.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One decoder block.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of one head, even.
        ffw_dim: width of the gated MLP's hidden layer (one branch, not both).
        query_scale: factor of the query-key product, `query_pre_attn_scalar ** -0.5`.
        sliding_window: tokens a query may look at, itself included; `None` means all before it.
        rope_theta: base of the rotary frequencies.
        rope_scale: positions are divided by it (linear RoPE scaling); 1 means no scaling.
        qk_norm: whether RMS norms stand on queries and keys, before the rotation.
        post_norms: whether RMS norms stand on the attention and MLP outputs, before they are added.
        attention_soft_cap: `cap * tanh(scores / cap)` before the mask, or `None`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffw_dim: int
    query_scale: float
    sliding_window: int | None = None
    rope_theta: float = 10_000.0
    rope_scale: float = 1.0
    qk_norm: bool = False
    post_norms: bool = False
    attention_soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim", "ffw_dim"):
            _require_positive_int(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even to be rotated, found {self.head_dim}")
        if self.sliding_window is not None:
            _require_positive_int("sliding_window", self.sliding_window)
        for name in ("query_scale", "rope_theta", "rope_scale"):
            _require_positive(name, getattr(self, name))
        if self.attention_soft_cap is not None:
            _require_positive("attention_soft_cap", self.attention_soft_cap)
        for name in ("qk_norm", "post_norms"):
            _require_bool(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """A whole decoder-only Gemma.

    Attributes:
        vocabulary_size: rows of the embedding table.
        hidden_dim: width of the residual stream.
        layers: one `LayerSpec` a block, first to last.
        embedding_scale: factor of the embeddings, `hidden_dim ** 0.5`; rounded to the compute
            dtype where it is applied, as the original does.
        final_soft_cap: `cap * tanh(logits / cap)`, or `None`.
        norm_epsilon: of every RMS norm.
        tied_head: whether the output projection is the embedding table.
        context_length: the longest sequence the checkpoint was made for, in tokens.
    """

    vocabulary_size: int
    hidden_dim: int
    layers: tuple[LayerSpec, ...]
    embedding_scale: float
    final_soft_cap: float | None = None
    norm_epsilon: float = 1e-6
    tied_head: bool = True
    context_length: int = 8192

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "hidden_dim", "context_length"):
            _require_positive_int(name, getattr(self, name))
        if not self.layers:
            raise ConfigError("a Gemma needs at least one layer")
        for name in ("embedding_scale", "norm_epsilon"):
            _require_positive(name, getattr(self, name))
        if self.final_soft_cap is not None:
            _require_positive("final_soft_cap", self.final_soft_cap)
        _require_bool("tied_head", self.tied_head)

    def to_dict(self) -> dict[str, Any]:
        """This configuration as plain JSON data; `from_dict` reads it back."""
        return dataclasses.asdict(self) | {"layers": [dataclasses.asdict(s) for s in self.layers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GemmaConfig:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or a value is out of range.
        """
        try:
            layers = tuple(LayerSpec(**spec) for spec in data["layers"])
            return cls(**{**data, "layers": layers})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a Gemma configuration: {error}") from error

    @classmethod
    def named(cls, name: str) -> GemmaConfig:
        """The configuration of a published size, such as `gemma_2b`.

        Raises:
            ConfigError: no size has that name; the message lists those that are known.
        """
        try:
            hf = NAMED_SIZES[name]
        except KeyError:
            known = ", ".join(sorted(NAMED_SIZES))
            raise ConfigError(f"no Gemma size is called {name!r}; known: {known}") from None
        return cls.from_hf(hf)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> GemmaConfig:
        """Build from the content of a Hugging Face `config.json`.

        Reads model types `gemma`, `gemma2`, `gemma3_text` and the text part of `gemma3`. Keys
        that are absent take the defaults of transformers' configuration classes, because the
        published files leave out what equals them.

        Raises:
            ConfigError: the model type is another, a key is unknown, or a value asks for
                mathematics that Gemma does not have (another activation, biases, ...).
        """
        return _from_hf(data)

    def to_hf(self) -> dict[str, Any]:
        """The content of a Hugging Face `config.json` that `from_hf` reads as this configuration.

        The keys are those of the published files, which transformers 4 and 5 both read.

        Raises:
            ConfigError: no model type of Hugging Face's can say it, as when layers differ in more
                than their window.
        """
        return _to_hf(self)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, tied_head: bool) -> GemmaConfig:
        """Build from GGUF metadata of architecture `gemma`, `gemma2` or `gemma3`.

        Args:
            metadata: key to value; `tokenizer.ggml.tokens` gives the vocabulary size.
            tied_head: whether the file has no `output.weight` of its own.

        Raises:
            ConfigError: another architecture, a missing key or a value out of range.
        """
        return _from_gguf(metadata, tied_head=tied_head)


# --- published sizes, as the keys of their config.json ------------------------------------------

NAMED_SIZES: dict[str, dict[str, Any]] = {
    "gemma_2b": {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    },
    "gemma_7b": {
        "model_type": "gemma",
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "gemma3_270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "max_position_embeddings": 32_768,
    },
}


# --- Hugging Face config.json -------------------------------------------------------------------

_HF_COMMON = {
    "vocab_size": 256_000,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
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
    "gemma2": _HF_COMMON
    | {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": _HF_COMMON
    | {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
}

# Every n-th layer sees the whole context, the others a sliding window. The same for GGUF, which
# does not always carry it.
_GLOBAL_EVERY = {"gemma2": 2, "gemma3_text": 6}
_GEMMA3_THETA = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}

# Keys that say nothing about the forward pass.
_HF_INERT = frozenset(
    """
    architectures attention_dropout bos_token_id cache_implementation chunk_size_feed_forward dtype
    eos_token_id id2label initializer_range is_encoder_decoder label2id model_type name_or_path
    output_attentions output_hidden_states pad_token_id problem_type return_dict torch_dtype
    transformers.js_config transformers_version unk_token_id use_cache
    """.split()  # noqa: SIM905 - as a list it would fill the screen
)
# Keys whose only value we can honour is the one Gemma has.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "use_bidirectional_attention": (False, None),
    "add_cross_attention": (False, None),
    "is_decoder": (False, True, None),
}
# The largest Gemma has 62; a file that asks for a billion must not fill the memory.
_MAX_LAYERS = 1000
_TANH_GELU = ("gelu_pytorch_tanh",)


def _from_hf(data: Mapping[str, Any]) -> GemmaConfig:
    kind = data.get("model_type")
    if kind == "gemma3":
        text = data.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError("a gemma3 config.json must have a text_config")
        data = {"model_type": "gemma3_text"} | dict(text)
        kind = data["model_type"]
    if not isinstance(kind, str) or kind not in _HF_DEFAULTS:
        known = ", ".join([*_HF_DEFAULTS, "gemma3"])
        raise ConfigError(f"model_type is {kind!r}; this project reads {known}")

    rest = {k: v for k, v in data.items() if k not in _HF_INERT and not k.startswith("_")}
    defaults = _HF_DEFAULTS[kind]

    def take(key: str, default: Any = None) -> Any:
        return rest.pop(key, defaults.get(key, default))

    for key, allowed in _HF_FIXED.items():
        if take(key) not in allowed:
            raise ConfigError(f"{key}={data[key]!r} is not part of any Gemma this project knows")
    # Gemma 1 was published with hidden_act="gelu", by which the tanh approximation was meant.
    legacy = take("hidden_act", None)
    activation = take("hidden_activation", None) or (
        "gelu_pytorch_tanh" if kind == "gemma" and legacy in ("gelu", None) else legacy
    )
    if (activation or "gelu_pytorch_tanh") not in _TANH_GELU:
        raise ConfigError(f"the activation is {activation!r}; Gemma's is gelu_pytorch_tanh")

    num_layers = take("num_hidden_layers")
    _require_positive_int("num_hidden_layers", num_layers)
    if num_layers > _MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers is {num_layers}; no Gemma has over {_MAX_LAYERS}")
    head_dim = take("head_dim")
    kinds = take("layer_types") or _layer_kinds(
        num_layers,
        take("sliding_window_pattern", None)
        or data.get("_sliding_window_pattern")
        or _GLOBAL_EVERY.get(kind, 1),
    )
    rest.pop("sliding_window_pattern", None)
    window = take("sliding_window")
    if (
        not isinstance(kinds, (list, tuple))
        or len(kinds) != num_layers
        or any(k not in ("full_attention", "sliding_attention") for k in kinds)
    ):
        raise ConfigError(f"layer_types does not describe {num_layers} layers: {kinds!r}")
    if "sliding_attention" in kinds and window is None:
        raise ConfigError("layer_types has sliding_attention but sliding_window is null")
    ropes = _hf_ropes(kind, rest)
    hidden_dim = take("hidden_size")
    _require_positive_int("hidden_size", hidden_dim)
    query_pre_attn_scalar = take("query_pre_attn_scalar", head_dim)
    _require_positive("query_pre_attn_scalar", query_pre_attn_scalar)
    shared = {
        "num_heads": take("num_attention_heads"),
        "num_kv_heads": take("num_key_value_heads"),
        "head_dim": head_dim,
        "ffw_dim": take("intermediate_size"),
        "query_scale": query_pre_attn_scalar**-0.5,
        "qk_norm": kind == "gemma3_text",
        "post_norms": kind != "gemma",
        "attention_soft_cap": take("attn_logit_softcapping"),
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
        tied_head=take("tie_word_embeddings"),
        context_length=take("max_position_embeddings"),
    )
    if rest:
        raise ConfigError(
            f"config.json has keys this project does not know: {', '.join(sorted(rest))}; "
            "one of them may change the mathematics, so the model is refused"
        )
    return config


def _to_hf(config: GemmaConfig) -> dict[str, Any]:
    first = config.layers[0]
    kind = "gemma3_text" if first.qk_norm else "gemma2" if first.post_norms else "gemma"
    local = next((s for s in config.layers if s.sliding_window is not None), None)
    full = next((s for s in config.layers if s.sliding_window is None), first)
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
            "sliding_window": local.sliding_window if local else None,
            "attn_logit_softcapping": first.attention_soft_cap,
            "final_logit_softcapping": config.final_soft_cap,
            "layer_types": [
                "full_attention" if s.sliding_window is None else "sliding_attention"
                for s in config.layers
            ],
        }
    if kind == "gemma3_text":
        data["rope_local_base_freq"] = local.rope_theta if local else 10_000.0
    # What that leaves out or cannot say shows when it is read again.
    if _from_hf(data) != config:
        raise ConfigError(
            f"this architecture cannot be written as a Hugging Face config.json of type {kind}: "
            "its layers differ in more than their window, or it scales something as no published "
            "Gemma does"
        )
    return data


def _is_root(layer: LayerSpec, scalar: int) -> bool:
    return scalar > 0 and scalar**-0.5 == layer.query_scale


def _layer_kinds(num_layers: int, global_every: Any) -> list[str]:
    _require_positive_int("sliding_window_pattern", global_every)
    return [
        "full_attention" if (i + 1) % global_every == 0 else "sliding_attention"
        for i in range(num_layers)
    ]


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
        raise ConfigError(f"rope_parameters has unknown layer kinds: {', '.join(sorted(unknown))}")
    return ropes


def _one_rope(given: dict[str, Any], *, default_theta: float) -> tuple[float, float]:
    rope_type = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    theta = given.pop("rope_theta", None) or default_theta
    factor = given.pop("factor", None)
    if given or rope_type not in ("default", "linear"):
        raise ConfigError(
            f"RoPE of type {rope_type!r} with {sorted(given)} is not one Gemma uses "
            "(default or linear)"
        )
    _require_positive("rope_theta", theta)
    if rope_type == "default":
        return float(theta), 1.0
    if factor is None:
        raise ConfigError("linear RoPE scaling needs a factor")
    _require_positive("factor", factor)
    return float(theta), float(factor)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be an object, found {value!r}")
    return dict(value or {})


# --- GGUF metadata ------------------------------------------------------------------------------

# Layers of the two 27B models, whose query scale is (hidden / heads) ** -0.5 rather than
# head_dim ** -0.5. GGUF has no key for it; llama.cpp tells them by the number of layers too.
_GGUF_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def _from_gguf(metadata: Mapping[str, Any], *, tied_head: bool) -> GemmaConfig:
    kind = metadata.get("general.architecture")
    if kind not in ("gemma", "gemma2", "gemma3"):
        raise ConfigError(f"the GGUF holds a {kind!r} model, not a gemma, gemma2 or gemma3")

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{key}", default)
        if value is None:
            raise ConfigError(f"the GGUF metadata lacks {kind}.{key}")
        return value

    num_layers, hidden_dim = get("block_count"), get("embedding_length")
    _require_positive_int("block_count", num_layers)
    _require_positive_int("embedding_length", hidden_dim)
    num_heads = get("attention.head_count")
    kv_heads = get("attention.head_count_kv", num_heads)
    kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * num_layers
    ffw = get("feed_forward_length")
    ffw = ffw if isinstance(ffw, list) else [ffw] * num_layers
    if len(kv_heads) != num_layers or len(ffw) != num_layers:
        raise ConfigError(f"per-layer metadata does not describe {num_layers} layers")
    _require_positive_int("attention.head_count", num_heads)
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
    for i, layer_kind in enumerate(_layer_kinds(num_layers, global_every)):
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


def _require_positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{name} must be a positive integer, found {value!r}")


def _require_positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise ConfigError(f"{name} must be a positive number, found {value!r}")


def _require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, found {value!r}")
