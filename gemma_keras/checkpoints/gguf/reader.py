"""Opens a GGUF checkpoint: interprets its metadata and tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import re
import reprlib

from gemma_keras.checkpoints.chat_templates import turns_of
from gemma_keras.checkpoints.gguf.config import config_from_gguf
from gemma_keras.checkpoints.gguf.parts import GGUFParts
from gemma_keras.checkpoints.sentencepiece_model import build_sentencepiece_model, gguf_stops
from gemma_keras.checkpoints.source import Checkpoint, WeightSource
from gemma_keras.errors import CheckpointError

_ROPE_FACTORS = "rope_freqs.weight"
_IMAGES = ("v.", "mm.")
_HUB_URL = re.compile(r"https://huggingface\.co/([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/?")
_NUMBERS = (
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.global.freq_base",
    "rope.local.freq_base",
)
_NUMBERS_OR_ZERO = (  # 0 means none
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.scale_linear",
    "rope.scaling.factor",
)


def read_gguf(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a GGUF checkpoint of architecture `gemma`, `gemma2` or `gemma3`.

    Raises:
        CheckpointError: the file is missing, truncated, corrupt, or does not match its own
            metadata.
        ConfigError: it holds another architecture.
    """
    file = GGUFParts(path)
    _check_metadata(file)
    config = config_from_gguf(file.metadata, tied_head="output.weight" not in file.tensors)
    _check_rope_factors(file, config.layers[0].head_dim)
    images = [name for name in file.tensors if name.startswith(_IMAGES)]
    weights = WeightSource(
        config,
        "gguf",
        {name: info.shape for name, info in file.tensors.items()},
        file.read,
        ignore=lambda name: name == _ROPE_FACTORS or name.startswith(_IMAGES),
        stored_as=file.stored_as,
        grid=file.grid,
        read_rows=file.read_rows,
    )
    tokenizer_model = build_sentencepiece_model(file.metadata)
    template = _text(file, "tokenizer.chat_template", "") or None
    turns, tuned, remarks = turns_of(template, tokenizer_model)
    return Checkpoint(
        config=config,
        weights=weights,
        tokenizer_model=tokenizer_model,
        instruction_tuned=tuned,
        provenance={
            "format": "gguf",
            "file": file.path.name,
            "name": _text(file, "general.name", file.path.stem),
            "license": _text(file, "general.license", "gemma"),
            "tensor_types": _count_types(file),
        }
        | _base_model(file),
        stop=gguf_stops(file.metadata),
        turns=turns,
        chat_template=template,
        remarks=(*_explain_images(file, images), *remarks),
    )


def _explain_images(file: GGUFParts, names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"{file.path.name} holds {len(names):,} image tensors (v.*, mm.*), which were "
        "ignored: only the text model is loaded",
    )


def _check_rope_factors(file: GGUFParts, head_dim: int) -> None:
    """Raise an error for divisors of rotary frequencies, unless they are all 1."""
    info = file.tensors.get(_ROPE_FACTORS)
    if info is None:
        return
    if info.shape != (head_dim // 2,) or (file.read(_ROPE_FACTORS) != 1).any():
        raise CheckpointError(
            f"{file.path} has {_ROPE_FACTORS}, a separate divisor for each rotary "
            "frequency; no supported Gemma has these, and llama.cpp ignores them for Gemma"
        )


def _check_metadata(file: GGUFParts) -> None:
    """Raise an error for values that `config_from_gguf` cannot compute with, and name the key."""
    kind = file.metadata.get("general.architecture")
    for key in _NUMBERS + _NUMBERS_OR_ZERO:
        value = file.metadata.get(f"{kind}.{key}", 1)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not (value > 0 or (value == 0 and key in _NUMBERS_OR_ZERO)):
            raise CheckpointError(
                f"{file.path} has {kind}.{key} = {reprlib.repr(value)}; it must be a positive "
                "number"
            )
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise CheckpointError(
            f"{file.path} has tokenizer.ggml.tokens = {reprlib.repr(tokens)}; it must be an array"
        )
    num_layers = file.metadata.get(f"{kind}.block_count", 0)
    if isinstance(num_layers, int) and num_layers > len(file.tensors):
        raise CheckpointError(
            f"{file.path} declares {num_layers:,} layers but holds {len(file.tensors):,} tensors"
        )


def _text(file: GGUFParts, key: str, default: str) -> str:
    value = file.metadata.get(key, default)
    if not isinstance(value, str):
        raise CheckpointError(f"{file.path} has {key} = {reprlib.repr(value)}; it must be text")
    return value


def _base_model(file: GGUFParts) -> dict[str, str]:
    """Returns the repository on the Hugging Face Hub that the file names as its base model, if it
    is valid."""
    count = file.metadata.get("general.base_model.count", 0)
    keys = ["general.source.repo_url", "general.source.url"]
    keys += ["general.base_model.0.repo_url"] * (
        count == 1
    )  # with several, none of them is the base
    for key in keys:
        match = _HUB_URL.fullmatch(str(file.metadata.get(key, "")))
        if match:
            return {"base_model": match[1]}
    return {}


def _count_types(file: GGUFParts) -> dict[str, int]:
    counts: dict[str, int] = {}
    for info in file.tensors.values():
        counts[info.type.name] = counts.get(info.type.name, 0) + 1
    return dict(sorted(counts.items()))
