"""Text to token ids and back, and back piece by piece without ever splitting a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import sentencepiece

from edge_demo.bundle import Bundle
from edge_demo.errors import BundleError
from edge_demo.manifest import ChatTemplate

_SPACE = "\u2581"


def _one_mark_a_byte(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for every byte that is no UTF-8, as SentencePiece decodes them."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error("edge_demo.one_mark_a_byte", _one_mark_a_byte)


class Tokenizer:
    """Gemma's SentencePiece tokenizer, read from a bundle.

    Text never becomes a control token: those are put in by id.

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
            raise BundleError(f"{path} has more pieces than the model's vocabulary")
        self._num_pieces = self._model.vocab_size()
        while self._num_pieces > 1 and self._model.is_unused(self._num_pieces - 1):
            self._num_pieces -= 1

    @property
    def num_pieces(self) -> int:
        """How many ids have a piece that a model may say; its table may have more rows, which
        stand for nothing."""
        return self._num_pieces

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of a text, after the beginning-of-sequence token if `bos`.

        Lone surrogates, which stand for bytes that were no UTF-8, become U+FFFD.
        """
        clean = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        ids = self._model.encode(clean)
        return [self.spec.bos, *ids] if bos else ids

    def encode_chat(self, turns: Sequence[tuple[str, str]], system: str = "") -> list[int]:
        """The ids of a conversation in Gemma's turn template, ready for the model's next turn.

        Args:
            turns: `("user" or "model", text)`, oldest first, a user's.
            system: what the model is told before all. Gemma's template has no role for it: it
                stands before the first message, a blank line between them.

        Raises:
            BundleError: the bundle is not instruction-tuned.
        """
        chat = self._chat()
        newline = self.encode("\n", bos=False)
        ids = [self.spec.bos]
        before = f"{system}\n\n" if system else ""
        for who, text in turns:
            role = chat.model if who == "model" else chat.user
            # The role and the text are one stretch, as one string would be tokenized.
            ids += [chat.start_of_turn, *self.encode(f"{role}\n{before}{text.strip()}", bos=False)]
            before = ""
            ids += [chat.end_of_turn, *newline]
        return [*ids, chat.start_of_turn, *self.encode(f"{chat.model}\n", bos=False)]

    def encode_system(self, system: str) -> list[int]:
        """What every conversation begins with that `encode_chat` makes with this system text.

        Raises:
            BundleError: the bundle is not instruction-tuned.
        """
        chat = self._chat()
        stretch = self.encode(f"{chat.user}\n{system}", bos=False)
        return [self.spec.bos, chat.start_of_turn, *stretch]

    def _chat(self) -> ChatTemplate:
        if self.spec.chat is None:
            raise BundleError("the bundle has no turn template; it is not instruction-tuned")
        return self.spec.chat

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; control tokens are empty."""
        stream = TextStream(self)
        return "".join(stream.push(i) for i in ids) + stream.flush()

    def piece(self, token: int) -> str | bytes:
        """One token: its text, its byte for a byte piece, or `""` for a control token."""
        if token >= self._model.vocab_size() or self._model.is_control(token):
            return ""
        if self._model.is_byte(token):
            return bytes([int(self._model.id_to_piece(token)[1:-1], 16)])
        if self._model.is_unknown(token):
            return "\u2047"
        return self._model.id_to_piece(token).replace(_SPACE, " ")


class TextStream:
    """Turns ids into text as they come; a character is given out when all its bytes are there.

    Args:
        tokenizer: whose ids they are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("edge_demo.one_mark_a_byte")

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        piece = self.tokenizer.piece(token)
        if isinstance(piece, bytes):
            return self._decoder.decode(piece)
        return self.flush() + piece

    def flush(self) -> str:
        """What is left when no more comes: U+FFFD for each byte of an unfinished character."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
