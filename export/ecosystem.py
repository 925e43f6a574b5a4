"""Files by which other runtimes load a bundle: onnxruntime-genai, Optimum and transformers.js.

They all run `model.onnx`, whose inputs and outputs have the names they expect, over the bundle's
one weights file. What they want beside it is small: the architecture in Hugging Face's
`config.json`, token ids and sampling in `generation_config.json`, the tokenizer as `tokenizer.json`
with `tokenizer_config.json`, and for onnxruntime-genai `genai_config.json`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.contract import INTERCHANGE_FILE
from export.errors import ExportError
from export.hf_tokenizer import tokenizer_json
from gemma_keras.chat import GEMMA_TURNS
from gemma_keras.checkpoints import Checkpoint
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import ConfigError

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
# How a tuned Gemma is sampled, as its published generation_config.json says.
_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
_GREEDY = {"do_sample": False}
_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def write_ecosystem_files(
    folder: Path, checkpoint: Checkpoint, tokenizer: Mapping[str, Any], max_context: int
) -> bool:
    """Write them, or none if the model cannot be said in these forms.

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
    except (ConfigError, ExportError):
        return False
    for name, content in files.items():
        # A quarter of a million pieces are written without indentation.
        layout: dict[str, Any] = (
            {"separators": (",", ":")} if name == TOKENIZER_FILE else {"indent": 1}
        )
        text = json.dumps(content, ensure_ascii=False, **layout)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return True


def _files(
    checkpoint: Checkpoint, tokenizer: Mapping[str, Any], max_context: int
) -> dict[str, dict[str, Any]]:
    import sentencepiece

    assert checkpoint.tokenizer_model is not None  # write_tokenizer has refused that
    pieces = sentencepiece.SentencePieceProcessor(model_proto=checkpoint.tokenizer_model)
    config = dataclasses.replace(checkpoint.config, context_length=max_context)
    hf = config.to_hf()
    stop = list(tokenizer["stop"])
    ids = {
        "bos_token_id": tokenizer["bos"],
        "eos_token_id": stop[0] if len(stop) == 1 else stop,
        "pad_token_id": pieces.pad_id() if pieces.pad_id() >= 0 else stop[0],
    }
    named = {"bos": ids["bos_token_id"], "eos": stop[0], "pad": ids["pad_token_id"]}
    named["unk"] = pieces.unk_id()
    tokens = {f"{name}_token": pieces.id_to_piece(index) for name, index in named.items()}
    sampling = _SAMPLING if checkpoint.instruction_tuned else _GREEDY
    return {
        CONFIG_FILE: {
            "architectures": [_ARCHITECTURES[hf["model_type"]]],
            **hf,
            **ids,
            "dtype": "float32",
            "use_cache": True,
            # The form of this file. Without it transformers 4.57 takes the tokenizer for one of
            # Mistral's and warns.
            "transformers_version": "4.57.0",
            # transformers.js takes a file's name from its dtype, and fetches what it is told to.
            "transformers.js_config": {
                "dtype": "fp32",
                "use_external_data_format": {INTERCHANGE_FILE: 1},
            },
        },
        "generation_config.json": {**ids, **sampling},
        "tokenizer_config.json": _tokenizer_config(
            tokens, checkpoint.instruction_tuned, max_context
        ),
        TOKENIZER_FILE: tokenizer_json(checkpoint.tokenizer_model),
        "genai_config.json": _genai_config(config, hf["model_type"], ids, sampling),
    }


def _tokenizer_config(tokens: dict[str, str], tuned: bool, max_context: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "GemmaTokenizer",
        **tokens,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_context,
    }
    if tuned:
        config["chat_template"] = _CHAT_TEMPLATE
    return config


# What `edge_demo.tokenizer.Tokenizer.encode_chat` does, as a Jinja template. Gemma has no system
# role: what stands in one goes to the head of the first user turn.
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set ns = namespace(before='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% set ns.before = message['content'] | trim + '\\n\\n' %}"
    "{% else %}"
    "{{ 'START' + ('MODEL' if message['role'] == 'assistant' else 'USER') + '\\n' }}"
    "{{ ns.before + message['content'] | trim + 'END\\n' }}"
    "{% set ns.before = '' %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'STARTMODEL\\n' }}{% endif %}"
)
for _name, _text in (
    ("START", GEMMA_TURNS.start_of_turn),
    ("END", GEMMA_TURNS.end_of_turn),
    ("MODEL", GEMMA_TURNS.model),
    ("USER", GEMMA_TURNS.user),
):
    _CHAT_TEMPLATE = _CHAT_TEMPLATE.replace(_name, _text)


def _genai_config(
    config: GemmaConfig, model_type: str, ids: Mapping[str, Any], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `genai_config.json`.

    Keys: onnxruntime.ai/docs/genai/reference/config.html, and onnxruntime-genai's `src/config.h`.

    Args:
        config: with the bundle's context length.
        model_type: Hugging Face's.
        ids: `bos_token_id`, `eos_token_id` and `pad_token_id`.
        sampling: `do_sample` and, if it is true, what it goes by.
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
