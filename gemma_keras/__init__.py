"""Gemma as a Keras 3 model on JAX, TensorFlow or PyTorch.

Public names are imported at first use. So `gemma_keras.config` and `gemma_keras.checkpoints` work
without starting a Keras backend.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gemma_keras.missing import said_what_is_missing

if TYPE_CHECKING:
    from gemma_keras.causal_lm import GemmaCausalLM
    from gemma_keras.checkpoints.hf.config import named_config
    from gemma_keras.config import GemmaConfig, LayerSpec
    from gemma_keras.model.backbone import GemmaBackbone
    from gemma_keras.open import open_checkpoint
    from gemma_keras.text_embedder import GemmaTextEmbedder
    from gemma_keras.tokenizer import GemmaCausalLMPreprocessor, GemmaTokenizer
    from gemma_keras.train.distil import Distiller
    from gemma_keras.train.preferences import PreferenceTuner
    from gemma_keras.train.teacher_targets import write_targets

__all__ = [
    "Distiller",
    "GemmaBackbone",
    "GemmaCausalLM",
    "GemmaCausalLMPreprocessor",
    "GemmaConfig",
    "GemmaTextEmbedder",
    "GemmaTokenizer",
    "LayerSpec",
    "PreferenceTuner",
    "named_config",
    "open_checkpoint",
    "write_targets",
]

_HOMES = {
    "Distiller": "train.distil",
    "GemmaBackbone": "model.backbone",
    "GemmaCausalLM": "causal_lm",
    "GemmaCausalLMPreprocessor": "tokenizer",
    "GemmaConfig": "config",
    "GemmaTextEmbedder": "text_embedder",
    "GemmaTokenizer": "tokenizer",
    "LayerSpec": "config",
    "PreferenceTuner": "train.preferences",
    "named_config": "checkpoints.hf.config",
    "open_checkpoint": "open",
    "write_targets": "train.teacher_targets",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gemma-keras")
    if name not in _HOMES:
        raise AttributeError(f"module 'gemma_keras' has no attribute {name!r}")
    with said_what_is_missing(f"gemma_keras.{name}", "keras"):
        return getattr(import_module(f"gemma_keras.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
