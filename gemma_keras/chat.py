"""Gemma's turn template: `<start_of_turn>ROLE\\nTEXT<end_of_turn>\\n`.

Source: ai.google.dev/gemma/docs/core/prompt-structure. There is no system role; what would be one
stands at the head of the first user turn.
"""

from __future__ import annotations

import dataclasses


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
