"""The table of all weights: canonical name, Hugging Face name, GGUF name, shape and kind.

Readers and writers of all formats use this table, so each name and transform is defined once.
Canonical conventions:

* a `matrix` is `[in, out]`, as a Keras `Dense` kernel is; both files store `[out, in]`;
* a `norm` is the `scale` in `x * (1 + scale)`; GGUF stores `1 + scale`;
* a `table` (the embedding, an untied head) is `[vocabulary, hidden]` everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from gemma_keras.config import GemmaConfig, LayerSpec

Kind = Literal["matrix", "norm", "table"]
FileFormat = Literal["hf", "gguf"]


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One weight of one model.

    Attributes:
        name: canonical, such as `layers.3.attention.query`.
        shape: canonical, `[in, out]` for a matrix.
        kind: what transforms a file format applies to it.
        hf: its name in Hugging Face safetensors.
        gguf: its name in GGUF.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    hf: str
    gguf: str

    def file_name(self, file_format: FileFormat) -> str:
        """Its name in files of `file_format`."""
        return self.hf if file_format == "hf" else self.gguf

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Its shape in either file format, row-major."""
        return self.shape[::-1] if self.kind == "matrix" else self.shape

    def from_file(self, array: np.ndarray, file_format: FileFormat) -> np.ndarray:
        """A file's array as the canonical one; a view where it can be."""
        if self.kind == "matrix":
            return array.T
        if self.kind == "norm" and file_format == "gguf":
            return array - 1
        return array

    def to_file(self, array: np.ndarray, file_format: FileFormat) -> np.ndarray:
        """The canonical array as a file's; the inverse of `from_file`."""
        if self.kind == "matrix":
            return array.T
        if self.kind == "norm" and file_format == "gguf":
            return array + 1
        return array


@dataclasses.dataclass(frozen=True)
class _Row:
    name: str
    hf: str
    gguf: str
    kind: Kind
    shape: Callable[[LayerSpec, int], tuple[int, ...]]
    when: Callable[[LayerSpec], bool] = lambda spec: True


_LAYER_ROWS = (
    _Row("pre_attention_norm", "input_layernorm", "attn_norm", "norm", lambda s, d: (d,)),
    _Row(
        "attention.query",
        "self_attn.q_proj",
        "attn_q",
        "matrix",
        lambda s, d: (d, s.num_heads * s.head_dim),
    ),
    _Row(
        "attention.key",
        "self_attn.k_proj",
        "attn_k",
        "matrix",
        lambda s, d: (d, s.num_kv_heads * s.head_dim),
    ),
    _Row(
        "attention.value",
        "self_attn.v_proj",
        "attn_v",
        "matrix",
        lambda s, d: (d, s.num_kv_heads * s.head_dim),
    ),
    _Row(
        "attention.query_norm",
        "self_attn.q_norm",
        "attn_q_norm",
        "norm",
        lambda s, d: (s.head_dim,),
        lambda s: s.qk_norm,
    ),
    _Row(
        "attention.key_norm",
        "self_attn.k_norm",
        "attn_k_norm",
        "norm",
        lambda s, d: (s.head_dim,),
        lambda s: s.qk_norm,
    ),
    _Row(
        "attention.output",
        "self_attn.o_proj",
        "attn_output",
        "matrix",
        lambda s, d: (s.num_heads * s.head_dim, d),
    ),
    _Row(
        "post_attention_norm",
        "post_attention_layernorm",
        "post_attention_norm",
        "norm",
        lambda s, d: (d,),
        lambda s: s.post_norms,
    ),
    # Hugging Face calls Gemma 1's only MLP norm by the name that Gemma 2 and 3 give to the norm
    # after the attention.
    _Row(
        "pre_ffw_norm",
        "post_attention_layernorm",
        "ffn_norm",
        "norm",
        lambda s, d: (d,),
        lambda s: not s.post_norms,
    ),
    _Row(
        "pre_ffw_norm",
        "pre_feedforward_layernorm",
        "ffn_norm",
        "norm",
        lambda s, d: (d,),
        lambda s: s.post_norms,
    ),
    _Row("mlp.gate", "mlp.gate_proj", "ffn_gate", "matrix", lambda s, d: (d, s.ffw_dim)),
    _Row("mlp.up", "mlp.up_proj", "ffn_up", "matrix", lambda s, d: (d, s.ffw_dim)),
    _Row("mlp.down", "mlp.down_proj", "ffn_down", "matrix", lambda s, d: (s.ffw_dim, d)),
    _Row(
        "post_ffw_norm",
        "post_feedforward_layernorm",
        "post_ffw_norm",
        "norm",
        lambda s, d: (d,),
        lambda s: s.post_norms,
    ),
)


def weight_specs(config: GemmaConfig) -> dict[str, WeightSpec]:
    """Canonical name to `WeightSpec`, for every weight of the model, in the order of use."""
    table_shape = (config.vocabulary_size, config.hidden_dim)
    specs = [
        WeightSpec(
            "token_embedding",
            table_shape,
            "table",
            "model.embed_tokens.weight",
            "token_embd.weight",
        )
    ]
    for i, layer in enumerate(config.layers):
        specs += [
            WeightSpec(
                f"layers.{i}.{row.name}",
                row.shape(layer, config.hidden_dim),
                row.kind,
                f"model.layers.{i}.{row.hf}.weight",
                f"blk.{i}.{row.gguf}.weight",
            )
            for row in _LAYER_ROWS
            if row.when(layer)
        ]
    specs.append(
        WeightSpec(
            "final_norm", (config.hidden_dim,), "norm", "model.norm.weight", "output_norm.weight"
        )
    )
    if not config.tied_head:
        specs.append(WeightSpec("head", table_shape, "table", "lm_head.weight", "output.weight"))
    return {spec.name: spec for spec in specs}


def head_table(config: GemmaConfig) -> str:
    """The table that makes logits of hidden states."""
    return "token_embedding" if config.tied_head else "head"


def parameter_count(config: GemmaConfig) -> int:
    """Returns the number of parameters; a tied embedding counts once."""
    return sum(int(np.prod(spec.shape, dtype=np.int64)) for spec in weight_specs(config).values())
