"""Defines the architecture of a Gemma as data: sizes, windows, scales, soft caps.

Everything downstream (the Keras model, the ONNX lowerings, the engine) reads these two frozen
dataclasses and never asks which generation it is looking at.

Sources of the numbers: the Gemma, Gemma 2 and Gemma 3 technical reports; the ``config.json`` files
of the published checkpoints; llama.cpp's conventions for GGUF metadata.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_keras.errors import ConfigError, quoted


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One decoder block.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of one head, even.
        ffw_dim: width of the gated MLP's hidden layer (one branch, not both).
        query_scale: factor of the query-key product, `query_pre_attn_scalar ** -0.5`.
        sliding_window: a query sees keys at smaller distances; in a causal layer that is this many
            tokens, including itself. `None` means no limit.
        rope_theta: base of the rotary frequencies.
        rope_scale: positions are divided by it (linear RoPE scaling); 1 means no scaling.
        qk_norm: whether queries and keys have RMS norms, before the rotation.
        post_norms: whether attention and MLP outputs have RMS norms, before they are added.
        attention_soft_cap: `cap * tanh(scores / cap)` before the mask, or `None`.
        bidirectional: whether a query also sees what comes after it, in a window as far ahead as
            back. Such a model gives vectors of whole texts; it cannot predict the next token.
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
    bidirectional: bool = False

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim", "ffw_dim"):
            require_positive_int(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, found {self.head_dim}")
        if self.sliding_window is not None:
            require_positive_int("sliding_window", self.sliding_window)
        require_positive("query_scale", self.query_scale)
        for name in ("rope_theta", "rope_scale"):
            value = getattr(self, name)
            require_positive(name, value)
            if not _LEAST_ROTARY < value < _MOST_ROTARY:
                raise ConfigError(
                    f"{name} is {quoted(value)}; it must be a number from {_LEAST_ROTARY:g} to "
                    f"{_MOST_ROTARY:g}"
                )
        if self.attention_soft_cap is not None:
            require_positive("attention_soft_cap", self.attention_soft_cap)
        for name in ("qk_norm", "post_norms", "bidirectional"):
            require_bool(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """A whole Gemma: one stack of blocks.

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
            require_positive_int(name, getattr(self, name))
        if not self.layers:
            raise ConfigError("the model needs at least one layer")
        for name in ("embedding_scale", "norm_epsilon"):
            require_positive(name, getattr(self, name))
        if self.final_soft_cap is not None:
            require_positive("final_soft_cap", self.final_soft_cap)
        require_bool("tied_head", self.tied_head)
        self._require_holdable()

    def _require_holdable(self) -> None:
        """Raise an error for sizes whose product is too large, before anything is allocated."""
        require_layer_count("the number of layers", len(self.layers))
        widths = {"vocabulary_size": self.vocabulary_size}
        for layer in self.layers:
            widths["num_heads * head_dim"] = layer.num_heads * layer.head_dim
            widths["ffw_dim"] = layer.ffw_dim
            for name, width in widths.items():
                if width > LARGEST_SIZE or width * self.hidden_dim > _MOST_NUMBERS:
                    raise ConfigError(
                        f"{name} ({width:,}) with hidden_dim ({self.hidden_dim:,}) needs a "
                        f"matrix that is too large; the limit is {_MOST_NUMBERS:,} numbers"
                    )

    def require_causal(self, purpose: str) -> None:
        """Raise an error for a bidirectional model where a causal one is needed.

        Args:
            purpose: what needs it, the beginning of the sentence.

        Raises:
            ConfigError: some layer is bidirectional.
        """
        if any(layer.bidirectional for layer in self.layers):
            raise ConfigError(
                f"{purpose} needs a model that predicts the next token, but this model has "
                "bidirectional attention (use_bidirectional_attention) and embeds texts. "
                "Use gemma_keras.GemmaTextEmbedder"
            )

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


def layer_kinds(num_layers: int, global_every: Any) -> list[str]:
    """Returns `full_attention` or `sliding_attention` for each layer: every n-th layer is
    global."""
    require_positive_int("sliding_window_pattern", global_every)
    return [
        "full_attention" if (i + 1) % global_every == 0 else "sliding_attention"
        for i in range(num_layers)
    ]


# --- checks of single values ---------------------------------------------------------------------

LARGEST_SIZE = 2**31 - 1  # an int32, what kernels count tokens, heads and features with
_MOST_NUMBERS = 2**36  # of one matrix, 40 times the largest published
_LEAST_ROTARY, _MOST_ROTARY = 1e-6, 1e12  # what a bundle may hold
_MOST_LAYERS = 1000  # the largest Gemma has 62


def require_positive_int(name: str, value: Any) -> None:
    """Raise `ConfigError` unless it is valid."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{name} must be a positive integer, found {quoted(value)}")
    if value > LARGEST_SIZE:
        raise ConfigError(f"{name} is {quoted(value)}; the limit is {LARGEST_SIZE:,}")


def require_layer_count(name: str, value: Any) -> None:
    """Raise `ConfigError` unless it can be a number of layers; call it before listing them."""
    require_positive_int(name, value)
    if value > _MOST_LAYERS:
        raise ConfigError(f"{name} is {value}; the limit is {_MOST_LAYERS}")


def require_positive(name: str, value: Any) -> None:
    """Raise `ConfigError` unless it is a number above 0, and not beyond reason."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise ConfigError(f"{name} must be a positive number, found {quoted(value)}")


def require_bool(name: str, value: Any) -> None:
    """Raise `ConfigError` unless it is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, found {quoted(value)}")


def not_a_gemma(found: str) -> str:
    """Returns the message for an unsupported architecture.

    Args:
        found: the value that was found, and where.
    """
    return (
        f"{found}, which is not supported. Supported are Gemma 1, 2 and 3 and models of the "
        "same architecture, such as CodeGemma, ShieldGemma and EmbeddingGemma (gemma, "
        "gemma2, gemma3_text, gemma3)"
    )
