"""Adds a tokenizer's added tokens to its SentencePiece model.

A special one becomes a control piece, any other a user-defined piece, which SentencePiece finds in
a text as other runtimes find added tokens. Ids between the pieces and the tokens get unused pieces.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from gemma_keras.checkpoints.sentencepiece_model import SPACE
from gemma_keras.checkpoints.special_pieces import TURN_PIECES
from gemma_keras.errors import CheckpointError

# Of a Gemma 3 with images; the tokenizer of those without has it too, one beyond their table.
OF_IMAGES = ("<image_soft_token>",)


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """One token as a file has it.

    Attributes:
        id: its row of the table.
        content: its text.
        special: whether plain text must not produce it.
        plain: whether it matches everywhere in a text, and includes no neighbouring spaces.
        file: that says so, for people.
    """

    id: int
    content: str
    special: bool
    plain: bool
    file: str

    def __str__(self) -> str:
        return f"{self.file}: the token {reprlib.repr(self.content)} of id {self.id}"

    @property
    def piece(self) -> str:
        """Its text as SentencePiece has it."""
        return self.content.replace(" ", SPACE)


def read_added_token(entry: Any, index: Any, file: str) -> AddedToken:
    """An entry of `tokenizer.json`'s `added_tokens` or of `added_tokens_decoder`.

    Raises:
        CheckpointError: it is not valid.
    """
    data = entry if isinstance(entry, Mapping) else {}
    content = data.get("content")
    flags = [data.get(name, False) for name in ("special", "single_word", "lstrip", "rstrip")]
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags):
        raise CheckpointError(f"{file} has an added token that is not valid: {reprlib.repr(entry)}")
    return AddedToken(_id(index, content, file), content, flags[0], not any(flags[1:]), file)


def read_plain_added_tokens(
    data: Mapping[str, Any], special: Iterable[str], file: str
) -> list[AddedToken]:
    """The content of `added_tokens.json`, text to id.

    Args:
        data: the content.
        special: texts that other files call special.
        file: its name, for people.
    """
    special = set(special)
    return [
        AddedToken(_id(index, content, file), content, content in special, True, file)
        for content, index in data.items()
    ]


def _id(value: Any, content: str, file: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(
            f"{file} gives {reprlib.repr(content)} the id {reprlib.repr(value)}; an id must "
            "be 0 or a positive whole number"
        )
    return value


def merge_added_tokens(*sources: Iterable[AddedToken]) -> list[AddedToken]:
    """Merges the sources into one list by id; an earlier source takes precedence.

    Raises:
        CheckpointError: one source has a text or an id twice.
    """
    merged: dict[int, AddedToken] = {}
    texts: set[str] = set()
    for source in sources:
        ids = set(merged)
        new: set[str] = set()
        for token in source:
            if token.id in ids or token.piece in texts:
                continue
            if token.id in merged or token.piece in new:
                other = merged.get(token.id)
                found = other.content if other else token.content
                raise CheckpointError(
                    f"{token} occurs twice, or has the same id as {reprlib.repr(found)}"
                )
            merged[token.id] = token
            new.add(token.piece)
        texts |= new
    return [merged[index] for index in sorted(merged)]


def add_tokens(parsed: Any, tokens: Iterable[AddedToken], rows: int) -> None:
    """Give a parsed SentencePiece model the pieces of added tokens.

    Args:
        parsed: changed in place.
        tokens: by id.
        rows: of the model's table; no id is beyond it.

    Raises:
        CheckpointError: a token cannot be a piece; the message names it and says why.
    """
    kinds = parsed.SentencePiece
    places = {piece.piece: index for index, piece in enumerate(parsed.pieces)}
    for token in tokens:
        if token.id >= rows and token.content in OF_IMAGES:
            continue
        _check(token, rows)
        at = places.get(token.piece)
        control = token.special or token.piece in TURN_PIECES
        if at is None:
            _put(parsed, places, token.id, token)
        elif at != token.id:
            raise CheckpointError(f"{token} already exists with the id {at}")
        piece = parsed.pieces[token.id]
        if piece.type in (kinds.UNKNOWN, kinds.BYTE, kinds.CONTROL):
            continue
        piece.type = kinds.CONTROL if control else kinds.USER_DEFINED


def _check(token: AddedToken, rows: int) -> None:
    if not token.content:
        raise CheckpointError(f"{token} has no text")
    try:
        token.content.encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{token} is not valid text: it contains half of a surrogate pair"
        ) from None
    if "\0" in token.content:
        raise CheckpointError(f"{token} contains a NUL character, where SentencePiece ends a text")
    if token.id >= rows:
        raise CheckpointError(
            f"{token} has no row in the embedding table, which has {rows:,}; resize the "
            "model's embeddings and save it again, or remove the token from that file"
        )
    if not token.plain and (not token.special or token.piece in TURN_PIECES):
        raise CheckpointError(
            f"{token} matches only whole words or includes neighbouring spaces "
            "(single_word, lstrip or rstrip), which SentencePiece does not support"
        )


def _put(parsed: Any, places: dict[str, int], index: int, token: AddedToken) -> None:
    """Write a piece that is not there yet: over a reserved one, or behind the last."""
    kinds = parsed.SentencePiece
    if index < len(parsed.pieces):
        piece = parsed.pieces[index]
        free = (kinds.CONTROL, kinds.USER_DEFINED, kinds.UNUSED)
        trainer = parsed.trainer_spec
        roles = (trainer.bos_id, trainer.eos_id, trainer.unk_id, trainer.pad_id)
        if piece.type not in free or index in roles:
            raise CheckpointError(
                f"{token} has the id of {reprlib.repr(piece.piece)}, which is not a reserved piece"
            )
        del places[piece.piece]
        piece.piece = token.piece
    else:
        while len(parsed.pieces) < index:
            add_unused(parsed, places)
        parsed.pieces.add(piece=token.piece, score=0.0, type=kinds.USER_DEFINED)
    places[token.piece] = index
    parsed.trainer_spec.vocab_size = len(parsed.pieces)


def unused_name(index: int) -> str:
    """Returns the name of the piece for a row without a token."""
    return f"[PAD{index}]"


def add_unused(parsed: Any, places: dict[str, int]) -> None:
    """Append an unused piece."""
    name = unused_name(len(parsed.pieces))
    while name in places:
        name = f"[{name}]"
    places[name] = len(parsed.pieces)
    parsed.pieces.add(piece=name, score=-1000.0, type=parsed.SentencePiece.UNUSED)
