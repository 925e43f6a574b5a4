"""Gemma's turn template: `<start_of_turn>ROLE\\nTEXT<end_of_turn>\\n`.

Source: ai.google.dev/gemma/docs/core/prompt-structure. There is no system role; what would be one
stands at the head of the first user turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from gemma_keras.text_pieces import encode, processor


@dataclasses.dataclass(frozen=True)
class TurnTemplate:
    """The template's control tokens and role names.

    Attributes:
        start_of_turn: piece that opens a turn.
        end_of_turn: piece that closes it, and ends an answer.
        user: role name of the person.
        model: role name of the model.
    """

    start_of_turn: str = "<start_of_turn>"
    end_of_turn: str = "<end_of_turn>"
    user: str = "user"
    model: str = "model"


GEMMA_TURNS = TurnTemplate()


def turn_ids(proto: bytes) -> tuple[int, int]:
    """The ids that open and close a turn.

    Raises:
        ValueError: the tokenizer does not have them.
    """
    model = processor(proto)
    found = [model.piece_to_id(n) for n in (GEMMA_TURNS.start_of_turn, GEMMA_TURNS.end_of_turn)]
    if model.unk_id() in found:
        raise ValueError("the tokenizer lacks the tokens of Gemma's turn template")
    return found[0], found[1]


_ROLES = {"user": "user", "model": "model", "assistant": "model"}


def encode_chat(proto: bytes, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a conversation, ready for the model's next turn.

    Args:
        proto: the serialized SentencePiece model.
        messages: `{"role": ..., "content": ...}` each, of role `user` and `model` (or `assistant`)
            in turn, perhaps after one of role `system`; the last is the user's.

    Raises:
        ValueError: they are not such a conversation, or the tokenizer has no turns.
    """
    turns, before = list(messages), ""
    for turn in turns:
        if not isinstance(turn.get("content"), str):
            raise ValueError(f"a message needs a role and a content that is text, found {turn!r}")
    if turns and turns[0].get("role") == "system":
        before = f"{turns.pop(0)['content']}\n\n"
    expected = ["user", "model"] * (len(turns) // 2) + ["user"]
    if [_ROLES.get(turn.get("role", "")) for turn in turns] != expected:
        found = ", ".join(str(message.get("role")) for message in messages)
        raise ValueError(
            f"user and model must speak in turn, the user first and last; found {found}"
        )
    model, names = processor(proto), GEMMA_TURNS
    start, end = turn_ids(proto)
    newline = encode(proto, "\n")
    ids = [model.bos_id()]
    for turn, role in zip(turns, expected, strict=True):
        # The role and the text are one stretch, as one string would be tokenized.
        ids += [start, *encode(proto, f"{role}\n{before}{turn['content'].strip()}")]
        ids += [end, *newline]
        before = ""
    return [*ids, start, *encode(proto, f"{names.model}\n")]
