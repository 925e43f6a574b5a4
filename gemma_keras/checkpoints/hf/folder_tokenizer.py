"""Reads the tokenizer of a Hugging Face folder from all files that describe it.

The vocabulary is in `tokenizer.model`. If that is missing or contradicts `tokenizer.json`, the
latter is used, because transformers reads it first. Added tokens are in `tokenizer.json`,
`tokenizer_config.json` or `added_tokens.json`. Ids that end a text are in `generation_config.json`,
`config.json` and `tokenizer_config.json`.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma_keras.checkpoints.first_bytes import explain_pointer
from gemma_keras.checkpoints.hf.added_tokens import (
    AddedToken,
    add_tokens,
    merge_added_tokens,
    read_added_token,
    read_plain_added_tokens,
)
from gemma_keras.checkpoints.hf.tokenizer_json_reader import read_tokenizer_json, read_vocabulary
from gemma_keras.checkpoints.json_files import read_json
from gemma_keras.checkpoints.sentencepiece_model import check_fits, opened, serialized
from gemma_keras.checkpoints.special_pieces import mark_control, mark_marks, parse_model
from gemma_keras.errors import CheckpointError

_MODEL, _JSON, _CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_ADDED, _SPECIAL = "added_tokens.json", "special_tokens_map.json"
# Files of unsupported tokenizers, and their kinds.
_FOREIGN = {
    "vocab.txt": "a WordPiece tokenizer",
    "vocab.json": "a byte-level BPE tokenizer",
    "*.tiktoken": "a tiktoken tokenizer",
    "tekken.json": "a tiktoken tokenizer",
    "spiece.model": "a tokenizer of another model family",
    "sentencepiece.bpe.model": "a tokenizer of another model family",
}
_ROLES = ("bos", "eos", "pad", "unk")


@dataclasses.dataclass(frozen=True)
class FolderTokenizer:
    """The tokenizer as a folder's files describe it.

    Attributes:
        model: the SentencePiece model, serialized; `None` if there is no tokenizer.
        stop: the ids that end a text, if files name them.
        config: the content of `tokenizer_config.json`.
    """

    model: bytes | None
    stop: tuple[int, ...]
    config: Mapping[str, Any]


def read_folder_tokenizer(folder: Path, config: Mapping[str, Any], rows: int) -> FolderTokenizer:
    """Read the tokenizer of a folder.

    Args:
        folder: of the checkpoint.
        config: the content of its `config.json`.
        rows: of the model's table.

    Raises:
        CheckpointError: a file is damaged, contradicts another, or has no equivalent SentencePiece
            model.
    """
    tokenizer_config = _optional(folder / _CONFIG)
    data = _optional(folder / _JSON)
    added = _added_tokens(folder, data, tokenizer_config)
    parsed, own = _pieces(folder, data, added, _role_names(tokenizer_config), rows)
    if parsed is None:
        return FolderTokenizer(None, (), tokenizer_config)
    before = own and parsed.SerializeToString()
    check_fits(len(parsed.pieces), rows)
    add_tokens(parsed, added, rows)
    stop = _stops(folder, config, tokenizer_config, parsed)
    mark_control(parsed)
    mark_marks(parsed, stop)
    if own is not None and parsed.SerializeToString() == before:
        return FolderTokenizer(opened(own), stop, tokenizer_config)
    return FolderTokenizer(serialized(parsed), stop, tokenizer_config)


def _optional(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.exists() else {}


def _pieces(
    folder: Path,
    data: Mapping[str, Any],
    added: list[AddedToken],
    names: Mapping[str, str],
    rows: int,
) -> tuple[Any, bytes | None]:
    """The pieces without added tokens, as a SentencePiece model's message, and the bytes of the
    file that is this message; `None` for what is not there."""
    path = folder / _MODEL
    if path.exists():
        if what := explain_pointer(path):
            raise CheckpointError(what)
        own = path.read_bytes()
        parsed = parse_model(own, str(path))
        if not data or _same_pieces(read_vocabulary(data, str(folder / _JSON)), parsed, added):
            return parsed, own
    if data:
        return read_tokenizer_json(data, added, names, rows, str(folder / _JSON)), None
    for pattern, kind in _FOREIGN.items():
        if found := next(folder.glob(pattern), None):
            raise CheckpointError(
                f"{folder} has {kind} ({found.name}); Gemma needs a SentencePiece model, "
                f"{_MODEL} or {_JSON}"
            )
    return None, None


def _same_pieces(vocabulary: Mapping[str, int], parsed: Any, added: list[AddedToken]) -> bool:
    """Whether a `tokenizer.json` has the pieces of a SentencePiece model, beside added tokens."""
    own = {token.piece for token in added}
    by_id = {index: piece for piece, index in vocabulary.items() if piece not in own}
    return all(index < len(parsed.pieces) for index in by_id) and all(
        by_id.get(index, piece.piece) == piece.piece for index, piece in enumerate(parsed.pieces)
    )


def _added_tokens(
    folder: Path, data: Mapping[str, Any], tokenizer_config: Mapping[str, Any]
) -> list[AddedToken]:
    entries = data.get("added_tokens") or []
    decoder = tokenizer_config.get("added_tokens_decoder") or {}
    plain = _optional(folder / _ADDED)
    if not isinstance(entries, list) or not isinstance(decoder, Mapping):
        raise CheckpointError(f"{folder} has added tokens that are neither a list nor an object")
    special = _texts(_optional(folder / _SPECIAL).values())
    special += _texts(value for key, value in tokenizer_config.items() if key.endswith("_token"))
    special += _texts([tokenizer_config.get("additional_special_tokens")])
    ids = [entry.get("id") if isinstance(entry, Mapping) else None for entry in entries]
    return merge_added_tokens(
        [read_added_token(e, i, _JSON) for i, e in zip(ids, entries, strict=True)],
        [read_added_token(entry, index, _CONFIG) for index, entry in decoder.items()],
        read_plain_added_tokens(plain, special, _ADDED),
    )


def _texts(values: Iterable[Any]) -> list[str]:
    """Texts of tokens that are a text, an object with a `content`, or a list of such."""
    contents = []
    for value in values:
        for entry in value if isinstance(value, list) else [value]:
            text = entry.get("content") if isinstance(entry, Mapping) else entry
            if isinstance(text, str):
                contents.append(text)
    return contents


def _role_names(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    texts = {role: _texts([tokenizer_config.get(f"{role}_token")]) for role in _ROLES}
    return {role: found[0] for role, found in texts.items() if found}


def _stops(
    folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], parsed: Any
) -> tuple[int, ...]:
    """Returns the ids that end a text, without ids that no token has."""
    text_config = config.get("text_config")
    generation = folder / "generation_config.json"
    sources = {
        generation.name: _optional(generation).get("eos_token_id"),
        "config.json": config.get("eos_token_id"),
        "config.json's text_config": text_config.get("eos_token_id")
        if isinstance(text_config, Mapping)
        else None,
    }
    stops: list[int] = []
    for name, value in sources.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(index) is int for index in values):
            raise CheckpointError(
                f"{folder}: eos_token_id in {name} is {reprlib.repr(value)}; it must be an id or a "
                "list of ids"
            )
        stops += [index for index in values if 0 <= index < len(parsed.pieces)]
    named = _texts([tokenizer_config.get("eos_token")])
    if named:
        stops += [i for i, p in enumerate(parsed.pieces) if p.piece == named[0]][:1]
    return tuple(dict.fromkeys(stops))
