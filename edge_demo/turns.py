"""The texts between the tokens of a turn template: one renderer for notebook and device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

BLANK_LINE = "\n\n"


class Roles(Protocol):
    """What a template says about texts.

    Attributes:
        user: role name of the person.
        model: role name of the model.
        system: role name of a turn for the system text; `None` puts the text and a blank line
            before the first user text.
        default_system: the system text of a conversation that has none; may be empty.
        strip: whether white space around a turn's text is left out.
    """

    @property
    def user(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def system(self) -> str | None: ...
    @property
    def default_system(self) -> str: ...
    @property
    def strip(self) -> bool: ...


def beginning(roles: Roles, system: str) -> tuple[list[str], str]:
    """What stands before the first message.

    Args:
        roles: of the template.
        system: the system text; empty takes the template's own.

    Returns:
        Whole turns, and what stands before the first message's text.
    """
    system = (system.strip() if roles.strip else system) or roles.default_system
    if not system:
        return [], ""
    if roles.system is None:
        return [], f"{system}{BLANK_LINE}"
    return [f"{roles.system}\n{system}"], ""


def stretches(roles: Roles, turns: Iterable[tuple[str, str]], system: str = "") -> list[str]:
    """What stands in each turn between its two tokens, as one string would be tokenized.

    Args:
        roles: of the template.
        turns: `("user" or "model", text)`, oldest first.
        system: the system text; empty takes the template's own.
    """
    found, before = beginning(roles, system)
    for who, text in turns:
        role = roles.model if who == "model" else roles.user
        found.append(f"{role}\n{before}{text.strip() if roles.strip else text}")
        before = ""
    return found
