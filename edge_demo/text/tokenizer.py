"""Converts text to token ids and back, also as a stream that never splits a character."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from edge_demo.bundle.manifest import ChatTemplate
from edge_demo.bundle.reader import Bundle
from edge_demo.detokenizer import Detokenizer, piece_of
from edge_demo.errors import BundleError
from edge_demo.turns import BLANK_LINE, beginning, stretches


def _clean(text: str) -> str:
    """The text with U+FFFD for lone surrogates."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Tokenizer:
    """Gemma's SentencePiece tokenizer, read from a bundle.

    Text never becomes a control token; control tokens are added by id.

    Args:
        bundle: opened.

    Raises:
        BundleError: the tokenizer's file is not a SentencePiece model, or larger than the
            model's vocabulary.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.spec = bundle.tokenizer
        path = bundle.path / self.spec.file
        try:
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.load_from_serialized_proto(path.read_bytes())
        except Exception as error:  # sentencepiece raises RuntimeError or its own, by version
            raise BundleError(f"{path} is not a SentencePiece model: {error}") from error
        if self._model.vocab_size() > bundle.vocabulary_size:
            raise BundleError(f"{path} has more tokens than the model's vocabulary")
        self._check_control(path)
        self._num_pieces = self._model.vocab_size()
        while self._num_pieces > 1 and self._model.is_unused(self._num_pieces - 1):
            self._num_pieces -= 1

    def _check_control(self, path: Path) -> None:
        """Raise an error for a model that would turn user text into control tokens."""
        ids = {self.spec.bos}
        if self.spec.chat is not None:
            ids |= {self.spec.chat.start_of_turn, self.spec.chat.end_of_turn}
        for token in sorted(ids):
            if token >= self._model.vocab_size() or not self._model.is_control(token):
                raise BundleError(
                    f"{path} has no control token with the id {token}, which marks the "
                    "beginning of a text or a turn. User text could become that token; "
                    "export the bundle again"
                )

    @property
    def num_pieces(self) -> int:
        """Number of ids that have a token; the embedding table may have more rows, which are
        unused."""
        return self._num_pieces

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of a text, after the beginning-of-sequence token if `bos`.

        Lone surrogates, which represent bytes that are not UTF-8, become U+FFFD.
        """
        ids = self._model.encode(_clean(text))
        return [self.spec.bos, *ids] if bos else ids

    def encode_template(self, text: str) -> list[int]:
        """The ids of a text in the model's template: what is written as a token of turns, of a
        text's beginning or its end is that token. Never for what users write.

        The beginning-of-sequence token comes first, whether or not the text has it.
        """
        marks = self._marks()
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, marks))})", _clean(text)):
            if part in marks:
                ids.append(marks[part])
            elif part:
                ids += self._model.encode(part)
        return ids if ids[:1] == [self.spec.bos] else [self.spec.bos, *ids]

    def mark_in(self, text: str) -> str | None:
        """Returns a control token that occurs in a text, which `encode` treats as plain
        characters."""
        return next((mark for mark in self._marks() if mark in text), None)

    def _marks(self) -> dict[str, int]:
        """The tokens of turns, of a text's beginning and of its end as a text has them."""
        ids = [self.spec.bos, *self.spec.stop]
        if self.spec.chat is not None:
            ids += [self.spec.chat.start_of_turn, self.spec.chat.end_of_turn]
        control = [i for i in ids if i < self._model.vocab_size() and self._model.is_control(i)]
        return {self._model.id_to_piece(i): i for i in control}

    def encode_chat(self, turns: Sequence[tuple[str, str]], system: str = "") -> list[int]:
        """The ids of a conversation in the model's turn template, ready for its next turn.

        Args:
            turns: `("user" or "model", text)`, oldest first, a user's.
            system: instructions before all turns. A template without a role for them has them
                before the first message, a blank line between.

        Raises:
            BundleError: the bundle is not instruction-tuned.
        """
        chat = self._chat()
        ids = [self.spec.bos]
        for stretch in stretches(chat, turns, system):
            ids += self._turn(stretch)
        return [*ids, chat.start_of_turn, *self.encode(f"{chat.model}\n", bos=False)]

    def encode_system(self, system: str) -> list[int]:
        """Returns the common beginning of all conversations that `encode_chat` encodes with this
        system text.

        Raises:
            BundleError: the bundle is not instruction-tuned.
        """
        chat = self._chat()
        whole, before = beginning(chat, system)
        ids = [self.spec.bos]
        for stretch in whole:
            ids += self._turn(stretch)
        if before:
            # Without the blank line, which may be one token with what comes after it.
            stretch = f"{chat.user}\n{before.removesuffix(BLANK_LINE)}"
            ids += [chat.start_of_turn, *self.encode(stretch, bos=False)]
        return ids

    def _turn(self, stretch: str) -> list[int]:
        chat = self._chat()
        ids = self.encode(stretch, bos=False)
        return [chat.start_of_turn, *ids, chat.end_of_turn, *self.encode("\n", bos=False)]

    def _chat(self) -> ChatTemplate:
        if self.spec.chat is None:
            raise BundleError(
                "the bundle has no turn template, because its model is not instruction-tuned"
            )
        return self.spec.chat

    def control_id(self, name: str) -> int | None:
        """The id of a control token, which no text becomes; `None` where there is no such token."""
        token = self._model.piece_to_id(name)
        return token if self._model.is_control(token) else None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; control tokens are empty."""
        stream = self.stream()
        return "".join(stream.push(i) for i in ids) + stream.flush()

    def show(self, ids: Sequence[int]) -> str:
        """The text of some ids with control tokens as their names, for people."""
        stream, marks = self.stream(), {i: mark for mark, i in self._marks().items()}
        parts = []
        for token in ids:
            parts.append(stream.flush() + marks[token] if token in marks else stream.push(token))
        return "".join(parts) + stream.flush()

    def piece_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be a part of a character; empty for control tokens."""
        piece = piece_of(self._model, token)
        return piece if isinstance(piece, bytes) else piece.encode()

    def stream(self) -> Detokenizer:
        """Turns ids into text as they come."""
        return Detokenizer(self._model)
