"""Makes examples of rows: token ids, and which of them are to be learnt."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_keras.errors import quoted
from gemma_keras.text.chat import GEMMA_TURNS, TurnTemplate, encode_answered
from gemma_keras.text.stream import encode, processor
from gemma_keras.train.errors import RowError
from gemma_keras.train.rows import KINDS, Row, kind_of

ON_TOO_LONG = ("error", "truncate", "skip")

Segments = list[tuple[list[int], bool]]


@dataclasses.dataclass(frozen=True)
class Example:
    """One text to learn from.

    Attributes:
        ids: int32 `(length,)`, the beginning-of-sequence token first.
        counts: bool `(length,)`: whether a token is to be predicted.
        beside: gives what else is known of each token, arrays `(length, ...)` by name.
        begins: where texts begin that do not see each other; most examples are one.
    """

    ids: np.ndarray
    counts: np.ndarray
    beside: Callable[[], Mapping[str, np.ndarray]] = dict
    begins: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, segments: Segments) -> Example:
        """The example of stretches of ids, and whether each is to be predicted."""
        ids = [token for part, _ in segments for token in part]
        counts = [counted for part, counted in segments for _ in part]
        return cls(np.array(ids, np.int32), np.array(counts, bool))

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def digest(self) -> bytes:
        """What tells it from others: the same tokens may be learnt and divided otherwise."""
        found = hashlib.blake2b(self.ids.tobytes(), digest_size=16)
        found.update(np.array([*self.begins, len(self)], np.int64).tobytes())
        found.update(self.counts.tobytes())
        return found.digest()

    @property
    def texts(self) -> list[slice]:
        """Which tokens are of which text."""
        return [slice(*ends) for ends in itertools.pairwise((*self.begins, len(self)))]

    @property
    def inputs(self) -> int:
        """Tokens that a model is given; the last of a text is only a target."""
        return len(self) - len(self.begins)

    def joined(self, other: Example) -> Example:
        """One example of both texts."""
        begins = (*self.begins, *(len(self) + begin for begin in other.begins))
        ids = np.concatenate([self.ids, other.ids])
        return Example(ids, np.concatenate([self.counts, other.counts]), begins=begins)

    def cut(self, length: int) -> Example:
        """Its beginning, or that of each text, of at most so many tokens."""
        parts = [slice(text.start, min(text.stop, text.start + length)) for text in self.texts]
        cut = [Example(self.ids[part], self.counts[part]) for part in parts]
        return functools.reduce(Example.joined, cut)


@dataclasses.dataclass(frozen=True)
class Renderer:
    """Writes rows as a model's tokens, as `chat` and the device write them.

    Attributes:
        proto: the serialized SentencePiece model.
        turns: the template of conversations.
        encode_text: the ids of a text; by default none of them is a control token.
        starts: whether a text begins with the beginning-of-sequence token; a conversation does.
        ends: whether a text ends with the end-of-sequence token.
        pairs: whether rows prefer an answer to another; the chosen text comes first.
    """

    proto: bytes
    turns: TurnTemplate = GEMMA_TURNS
    encode_text: Callable[[str], list[int]] | None = None
    starts: bool = True
    ends: bool = True
    pairs: bool = False

    def __call__(self, row: str | Mapping[str, Any]) -> Example:
        """The example of a row.

        A text is learnt whole, and so is its end. Of two texts the second is learnt, with the end;
        of a conversation what the model says: each answer, the end of its turn and the line break
        after it.

        Raises:
            RowError: it lacks something, is empty, or is no conversation.
        """
        kind = "text" if isinstance(row, str) else kind_of(row)
        prefers = kind in ("preference", "preference without a prompt")
        if prefers and not self.pairs:
            raise RowError("it prefers an answer to another, which `fit` does not learn from")
        if self.pairs and not prefers:
            raise RowError("it needs a prompt, a chosen and a rejected answer")
        if isinstance(row, str):
            return self._text("", row)
        if kind == "text":
            return self._text("", _text_of(row, "text"))
        if kind == "conversation":
            return self._conversation(_messages_of(row, "messages"))
        if kind is None:
            raise RowError(f"it has the keys {', '.join(map(quoted, row)) or 'none'}")
        if prefers:
            kind, row = "preference", _with_prompt(row)
        asked, *answers = KINDS[kind]
        return functools.reduce(Example.joined, (self._answered(row, asked, a) for a in answers))

    def _answered(self, row: Mapping[str, Any], asked: str, said: str) -> Example:
        """The example of a prompt and an answer, which are texts or messages."""
        if not _are_messages(row, asked, said):
            return self._text(_text_of(row, asked), _text_of(row, said))
        answer = _messages_of(row, said)
        answers = sum(message.get("role") in ("assistant", "model") for message in answer)
        return self._conversation([*_messages_of(row, asked), *answer], answers)

    def _text(self, prompt: str, text: str) -> Example:
        encoded = self.encode_text or (lambda text: encode(self.proto, text))
        for one in (prompt, text):
            _check_characters(one)
        model = processor(self.proto)
        asked = [model.bos_id()] * self.starts + encoded(prompt)
        said = encoded(text)
        if not said:
            raise RowError("its text is empty")
        said = said + [model.eos_id()] * self.ends
        return Example.of([(asked, False), (said, True)])

    def _conversation(
        self, messages: Sequence[Mapping[str, Any]], answers: int | None = None
    ) -> Example:
        """The example of a conversation, of which the last `answers` are learnt, or all."""
        for message in messages:
            if isinstance(message.get("content"), str):
                _check_characters(message["content"])
        try:
            segments = encode_answered(self.proto, messages, self.turns)
        except ValueError as error:
            raise RowError(str(error)) from None
        empty = [number for number, (ids, said) in enumerate(segments) if said and len(ids) <= 2]
        if empty:
            raise RowError(f"answer {empty[0] // 2 + 1} is empty")
        if answers is not None:
            first = len(segments) - 2 * answers
            segments = [(ids, said and i > first) for i, (ids, said) in enumerate(segments)]
        return Example.of(segments)


def _with_prompt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A preference with a prompt: its own, or what both answers begin with, by TRL's rule.

    Each answer keeps something, and texts the space before it. A prompt that is a text beside
    messages is in these already.

    Raises:
        RowError: the answers do not begin with a prompt, or are the same.
    """
    keys = KINDS["preference without a prompt"]
    own = row.get("prompt")
    among = isinstance(own, str) and all(isinstance(row[key], (list, tuple)) for key in keys)
    if "prompt" in row and not among:
        return row
    of = _messages_of if _are_messages(row, *keys) else _text_of
    chosen, rejected = (of(row, key) for key in keys)
    if chosen == rejected:
        raise RowError("its chosen and rejected answers are the same")
    both = enumerate(zip(chosen, rejected, strict=False))
    size = next((i for i, (a, b) in both if a != b), None)
    if size is None:
        size = min(len(chosen), len(rejected)) - 1
    elif size and chosen[size - 1] == " ":
        size -= 1
    if size < 1:
        raise RowError("its chosen and rejected do not begin with one prompt that both go on from")
    return {"prompt": chosen[:size], "chosen": chosen[size:], "rejected": rejected[size:]}


def _are_messages(row: Mapping[str, Any], *keys: str) -> bool:
    """Whether these are messages, and not texts.

    Raises:
        RowError: one is messages and another a text.
    """
    messages = [isinstance(row[key], (list, tuple)) for key in keys]
    if any(messages) and any(isinstance(row[key], str) for key in keys):
        raise RowError(f"its {' and '.join(keys)} must be two texts, or messages both")
    return all(messages)


def _text_of(row: Mapping[str, Any], key: str) -> str:
    text = row[key]
    if not isinstance(text, str):
        raise RowError(f"its {key} must be a text, not {quoted(text)}")
    return text


def _messages_of(row: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    messages = row[key]
    good = isinstance(messages, (list, tuple)) and all(isinstance(m, Mapping) for m in messages)
    if not good:
        raise RowError(f"its {key} must be a list of messages, not {quoted(messages)}")
    return [_in_one_text(message) for message in messages]


def _in_one_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose content is one text, also if it came in parts.

    Raises:
        RowError: a part is no text.
    """
    parts = message.get("content")
    if not isinstance(parts, (list, tuple)):
        return message
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise RowError(f"a message has a part of the type {quoted(kind)}; only text is learnt")
    return {**message, "content": "".join(part["text"] for part in parts)}


def _check_characters(text: str) -> None:
    """Refuse half of a surrogate pair, which no encoding can write.

    Raises:
        RowError: the text holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"its text cannot be written as UTF-8: {error}") from None


@dataclasses.dataclass(frozen=True)
class Examples:
    """What is learnt from, and what became of the rows.

    Attributes:
        examples: in the order of the rows.
        truncated: rows of which only the beginning is used.
        skipped: rows that are not used.
        length: the most tokens of an example.
    """

    examples: list[Example]
    truncated: list[str]
    skipped: list[str]
    length: int

    @property
    def tokens(self) -> int:
        """Of all examples."""
        return sum(map(len, self.examples))

    @property
    def counted(self) -> int:
        """Tokens that are to be predicted."""
        return int(sum(example.counts.sum() for example in self.examples))

    def __str__(self) -> str:
        said = (
            f"{len(self.examples):,} examples of {self.tokens:,} tokens, {self.counted:,} of which "
            "are learnt"
        )
        if self.truncated:
            said += f"; {len(self.truncated):,} cut to {self.length:,} tokens"
            said += f" ({_first_of(self.truncated)})"
        if self.skipped:
            said += f"; {len(self.skipped):,} skipped ({_first_of(self.skipped)})"
        return said


def make_examples(
    rows: Iterable[Row],
    render: Callable[[str | Mapping[str, Any]], Example],
    length: int,
    on_too_long: str = "error",
) -> Examples:
    """Make an example of each row.

    Args:
        rows: as `gemma_keras.train.rows.read_rows` gives them.
        render: makes an example of a row's value.
        length: the most tokens that an example may have.
        on_too_long: what becomes of a row with more: an error, its beginning, or nothing. A row
            whose beginning has nothing to be learnt is skipped.

    Raises:
        RowError: a row cannot be used, or none is left; the message names the row.
        ValueError: `on_too_long` is none of these words.
    """
    if on_too_long not in ON_TOO_LONG:
        raise ValueError(
            f"on_too_long is {on_too_long!r}; it must be one of {', '.join(ON_TOO_LONG)}"
        )
    made = Examples([], [], [], length)
    for where, example in _rendered(rows, render):
        longest = max(text.stop - text.start for text in example.texts)
        if longest > length:
            if on_too_long == "error":
                raise RowError(
                    f"{where} has {longest:,} tokens, more than {length:,}; give a larger "
                    "sequence_length, or on_too_long='truncate' or 'skip'"
                )
            cut = example.cut(length)
            if on_too_long == "skip" or not _all_learn(cut):
                made.skipped.append(where)
                continue
            made.truncated.append(where)
            example = cut
        made.examples.append(example)
    if not made.examples:
        why = f": all {len(made.skipped):,} are too long" if made.skipped else ""
        raise RowError(f"there are no rows to learn from{why}")
    return made


def _rendered(
    rows: Iterable[Row], render: Callable[[str | Mapping[str, Any]], Example]
) -> Iterator[tuple[str, Example]]:
    for row in rows:
        try:
            example = render(row.value)
        except RowError as error:
            raise RowError(f"{row.where}: {error}") from None
        if not _all_learn(example):
            raise RowError(f"{row.where}: nothing of it is to be learnt")
        yield row.where, example


def _all_learn(example: Example) -> bool:
    """Whether there is something to learn of each text; nobody asks which its first token is."""
    return all(example.counts[text][1:].any() for text in example.texts)


def _first_of(rows: Sequence[str], most: int = 3) -> str:
    """Names of rows for people: the first few, and how many more."""
    more = f" and {len(rows) - most:,} more" if len(rows) > most else ""
    return ", ".join(rows[:most]) + more
