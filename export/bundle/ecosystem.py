"""Writes the files with which onnxruntime-genai, Optimum and transformers.js load a bundle.

They all run `model.onnx` with the bundle's weights file; its inputs and outputs have the names that
they expect. They also need small files. Hugging Face's `config.json` describes the architecture,
and `generation_config.json` token ids and sampling. `tokenizer.json` and `tokenizer_config.json`
describe the tokenizer, and `genai_config.json` is for onnxruntime-genai.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.graph.contract import INTERCHANGE_FILE
from gemma_keras.checkpoints.hf.files import (
    CONFIG_FILE,
    GENERATION_FILE,
    SUPPRESSED,
    hf_files,
    json_text,
)
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.checkpoints.token_ids import TokenIds
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import ModelError

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_ecosystem_files(
    folder: Path, checkpoint: Checkpoint, tokenizer: Mapping[str, Any], max_context: int
) -> bool:
    """Write all of them, or none if these formats cannot describe the model.

    That is so when its layers differ in more than their window, or its tokenizer is not BPE. Then
    only `edge_demo` runs the bundle, and the model card says so.

    Args:
        folder: the bundle.
        checkpoint: with its tokenizer.
        tokenizer: the manifest's entry about it, which `write_tokenizer` returned.
        max_context: the longest sequence the bundle is for, in tokens.

    Returns:
        Whether they were written.
    """
    try:
        files = _files(checkpoint, tokenizer, max_context)
    except ModelError:
        return False
    for name, content in files.items():
        (folder / name).write_text(json_text(name, content), encoding="utf-8")
    return True


def _files(
    checkpoint: Checkpoint, tokenizer: Mapping[str, Any], max_context: int
) -> dict[str, dict[str, Any]]:
    config = dataclasses.replace(checkpoint.config, context_length=max_context)
    ids = TokenIds(tokenizer["bos"], tuple(tokenizer["stop"]))
    files = hf_files(dataclasses.replace(checkpoint, config=config), ids, "float32")
    hf = files[CONFIG_FILE]
    # transformers.js derives a file's name from its dtype, and downloads the files listed here.
    hf["transformers.js_config"] = {
        "dtype": "fp32",
        "use_external_data_format": {INTERCHANGE_FILE: 1},
    }
    sampling = dict(files[GENERATION_FILE])
    special = {key: sampling.pop(key) for key in _TOKEN_IDS}
    sampling.pop(SUPPRESSED, None)  # which onnxruntime-genai does not know
    genai = _genai_config(config, hf["model_type"], special, sampling)
    return files | {"genai_config.json": genai}


def _genai_config(
    config: GemmaConfig, model_type: str, ids: Mapping[str, Any], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `genai_config.json`.

    Keys: onnxruntime.ai/docs/genai/reference/config.html, and onnxruntime-genai's `src/config.h`.

    Args:
        config: with the bundle's context length.
        model_type: Hugging Face's.
        ids: `bos_token_id`, `eos_token_id` and `pad_token_id`.
        sampling: `do_sample` and, if it is true, its parameters.
    """
    layer = config.layers[0]
    return {
        "model": {
            "type": model_type,
            **ids,
            "context_length": config.context_length,
            "vocab_size": config.vocabulary_size,
            "decoder": {
                "filename": INTERCHANGE_FILE,
                "session_options": {"provider_options": []},
                "num_hidden_layers": len(config.layers),
                "num_attention_heads": layer.num_heads,
                "num_key_value_heads": layer.num_kv_heads,
                "head_size": layer.head_dim,
                "hidden_size": config.hidden_dim,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            **sampling,
            "max_length": config.context_length,
            "num_beams": 1,
            "num_return_sequences": 1,
            # Else the keys and values of the whole context are allocated before the first token.
            "past_present_share_buffer": False,
        },
    }
