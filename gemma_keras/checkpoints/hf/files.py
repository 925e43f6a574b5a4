"""Makes the small JSON files of a Hugging Face folder that accompany the weights.

The architecture is `config.json`; token ids and sampling `generation_config.json`; the tokenizer
`tokenizer.json` with `tokenizer_config.json`. A folder of safetensors has them, and a bundle for
the runtimes that look for them.
"""

from __future__ import annotations

import json
from typing import Any

from gemma_keras.checkpoints.chat_templates import chat_template
from gemma_keras.checkpoints.hf.config import config_to_hf
from gemma_keras.checkpoints.hf.tokenizer_json import tokenizer_json
from gemma_keras.checkpoints.sentencepiece_model import check_fits
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.checkpoints.special_pieces import is_usable
from gemma_keras.checkpoints.token_ids import TokenIds, processor

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# How a tuned Gemma is sampled, as its published generation_config.json says.
_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
_GREEDY = {"do_sample": False}
SUPPRESSED = "suppress_tokens"
_MOST_SUPPRESSED = 8192  # each is a number in the file, and costs time at each token


def hf_files(checkpoint: Checkpoint, ids: TokenIds | None, dtype: str) -> dict[str, dict[str, Any]]:
    """Name to content.

    Args:
        checkpoint: its configuration's context length goes into the files.
        ids: of its tokenizer; `None` leaves out what needs one.
        dtype: of the weights, by torch's name.

    Raises:
        ConfigError: no Hugging Face model type can describe the architecture.
        CheckpointError: the tokenizer is not as Gemma's, or has more pieces than the table rows.
    """
    hf = config_to_hf(checkpoint.config)
    config = {
        "architectures": [_ARCHITECTURES[hf["model_type"]]],
        **hf,
        "dtype": dtype,
        "use_cache": True,
        # The form of this file. Without it transformers 4.57 takes the tokenizer for one of
        # Mistral's and warns.
        "transformers_version": "4.57.0",
    }
    if ids is None:
        return {CONFIG_FILE: config}
    assert checkpoint.tokenizer_model is not None  # its ids came from there
    pieces = processor(checkpoint)
    check_fits(pieces.vocab_size(), checkpoint.config.vocabulary_size)
    end, pad = ids.stop[0], pieces.pad_id() if pieces.pad_id() >= 0 else ids.stop[0]
    special = {
        "bos_token_id": ids.bos,
        "eos_token_id": end if len(ids.stop) == 1 else list(ids.stop),
        "pad_token_id": pad,
    }
    named = {"bos": ids.bos, "eos": end, "pad": pad, "unk": pieces.unk_id()}
    template = chat_template(checkpoint)
    sampling = _SAMPLING if checkpoint.instruction_tuned else _GREEDY
    return {
        CONFIG_FILE: config | special,
        GENERATION_FILE: special | sampling | _suppressed(checkpoint),
        TOKENIZER_CONFIG_FILE: {
            "tokenizer_class": "GemmaTokenizer",
            **{f"{name}_token": pieces.id_to_piece(index) for name, index in named.items()},
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": checkpoint.config.context_length,
            **({"chat_template": template} if template else {}),
        },
        TOKENIZER_FILE: tokenizer_json(checkpoint.tokenizer_model),
    }


def _suppressed(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Returns the unused ids, which `transformers` and compatible runtimes never generate."""
    assert checkpoint.tokenizer_model is not None
    usable = is_usable(checkpoint.tokenizer_model)
    rows = range(checkpoint.config.vocabulary_size)
    ids = [index for index in rows if index >= len(usable) or not usable[index]]
    return {SUPPRESSED: ids} if 0 < len(ids) <= _MOST_SUPPRESSED else {}


def json_text(name: str, content: Any) -> str:
    """The text of such a file; a quarter of a million pieces are written without indentation."""
    layout: dict[str, Any] = {"separators": (",", ":")} if name == TOKENIZER_FILE else {"indent": 1}
    return json.dumps(content, ensure_ascii=False, **layout) + "\n"
