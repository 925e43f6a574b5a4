"""Turn templates: Gemma's, `<start_of_turn>ROLE\\nTEXT<end_of_turn>\\n`, and its like, as data.

Source: ai.google.dev/gemma/docs/core/prompt-structure. Gemma has no system role; what would be one
stands at the head of the first user turn. ChatML, which many tune Gemmas to, has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from edge_demo.turns import stretches
from gemma_keras.text.stream import encode, processor


@dataclasses.dataclass(frozen=True)
class TurnTemplate:
    """The tokens of a template, its role names, and where it puts a system text.

    Attributes:
        start_of_turn: piece that opens a turn.
        end_of_turn: piece that closes it, and ends an answer.
        user: role name of the person.
        model: role name of the model.
        system: role name of a turn for the system text; `None` puts the text and a blank line
            before the first user text.
        default_system: the system text of a conversation that has none; may be empty.
        strip: whether white space around a text is left out.
    """

    start_of_turn: str = "<start_of_turn>"
    end_of_turn: str = "<end_of_turn>"
    user: str = "user"
    model: str = "model"
    system: str | None = None
    default_system: str = ""
    strip: bool = True

    def stretches(
        self, messages: Sequence[Mapping[str, str]], answered: bool = False
    ) -> list[tuple[str, str]]:
        """What stands in each turn between its two tokens: who speaks, and the text.

        Args:
            messages: as for `encode_chat`.
            answered: whether the model speaks last, and not the user.

        Raises:
            ValueError: they are not a conversation.
        """
        turns = list(messages)
        for turn in turns:
            if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
                raise ValueError(
                    f"a message needs a role and a content that is text, found {turn!r}"
                )
        system = ""
        if turns and turns[0].get("role") == "system":
            system = turns.pop(0)["content"]
        expected = ["user", "model"] * (len(turns) // 2) + ([] if answered else ["user"])
        roles = [turn.get("role", "") for turn in turns]
        if [_ROLES.get(r) if isinstance(r, str) else None for r in roles] != expected or not turns:
            found = ", ".join(str(message.get("role")) for message in messages) or "none"
            last = "first and the model last" if answered else "first and last"
            raise ValueError(f"user and model must speak in turn, the user {last}; found {found}")
        said = [turn["content"] for turn in turns]
        found = stretches(self, zip(expected, said, strict=True), system)
        before = ["system"] * (len(found) - len(expected))
        return list(zip(before + expected, found, strict=True))

    def text(self, messages: Sequence[Mapping[str, str]], beginning: str) -> str:
        """A conversation as text, ready for the model's next turn, after `beginning`."""
        turns = [
            f"{self.start_of_turn}{stretch}{self.end_of_turn}\n"
            for _, stretch in self.stretches(messages)
        ]
        return beginning + "".join(turns) + f"{self.start_of_turn}{self.model}\n"


GEMMA_TURNS = TurnTemplate()
CHATML_TURNS = TurnTemplate(
    "<|im_start|>", "<|im_end|>", model="assistant", system="system", strip=False
)
TURN_TEMPLATES = (GEMMA_TURNS, CHATML_TURNS)


def turn_ids(proto: bytes, turns: TurnTemplate = GEMMA_TURNS) -> tuple[int, int]:
    """The ids that open and close a turn.

    Raises:
        ValueError: the tokenizer does not have them.
    """
    model = processor(proto)
    found = [model.piece_to_id(n) for n in (turns.start_of_turn, turns.end_of_turn)]
    if model.unk_id() in found:
        raise ValueError(
            f"the tokenizer lacks the tokens of the turn template, {turns.start_of_turn} "
            f"and {turns.end_of_turn}"
        )
    return found[0], found[1]


def all_stops(
    proto: bytes, named: Iterable[int] = (), turns: TurnTemplate | None = None
) -> tuple[int, ...]:
    """The ids that end a text.

    Args:
        proto: the serialized SentencePiece model.
        named: ids that a checkpoint's files name, which come first.
        turns: the template that a model was tuned to follow, the end of whose turns is one.

    Raises:
        ValueError: the tokenizer lacks the tokens of the turns.
    """
    stops = [*named, processor(proto).eos_id()]
    if turns is not None:
        stops.append(turn_ids(proto, turns)[1])
    return tuple(dict.fromkeys(i for i in stops if i >= 0))


_ROLES = {"user": "user", "model": "model", "assistant": "model"}


def encode_chat(
    proto: bytes, messages: Sequence[Mapping[str, str]], turns: TurnTemplate = GEMMA_TURNS
) -> list[int]:
    """The ids of a conversation, ready for the model's next turn.

    Text never becomes a control token here. The beginning-of-sequence token comes first, whether
    or not a template writes it: Gemmas are trained with it.

    Args:
        proto: the serialized SentencePiece model.
        messages: `{"role": ..., "content": ...}` each, of role `user` and `model` (or `assistant`)
            in turn, perhaps after one of role `system`; the last is the user's.
        turns: the template.

    Raises:
        ValueError: they are not such a conversation, or the tokenizer has no turns.
    """
    start, end = turn_ids(proto, turns)
    newline = encode(proto, "\n")
    ids = [processor(proto).bos_id()]
    for _, stretch in turns.stretches(messages):
        ids += [start, *encode(proto, stretch), end, *newline]
    return [*ids, start, *encode(proto, f"{turns.model}\n")]


def encode_answered(
    proto: bytes, messages: Sequence[Mapping[str, str]], turns: TurnTemplate = GEMMA_TURNS
) -> list[tuple[list[int], bool]]:
    """The ids of a conversation that ends with an answer, to learn from.

    What the model has said is encoded apart from what asks it to speak, as it is generated.

    Args:
        proto: as of `encode_chat`.
        messages: as of `encode_chat`, but the last is the model's.
        turns: the template.

    Returns:
        Stretches of ids, and whether the model says them: an answer's text, the end of its turn and
        the line break after it.

    Raises:
        ValueError: as `encode_chat`.
    """
    start, end = turn_ids(proto, turns)
    newline = encode(proto, "\n")
    ids, found = [processor(proto).bos_id()], []
    opening = f"{turns.model}\n"
    for who, stretch in turns.stretches(messages, answered=True):
        if who == "model":
            asked = [*ids, start, *encode(proto, opening)]
            said = encode(proto, stretch.removeprefix(opening))
            found += [(asked, False), ([*said, end, *newline], True)]
            ids = []
        else:
            ids += [start, *encode(proto, stretch), end, *newline]
    return found
