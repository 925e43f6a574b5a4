"""What is run between marks, on both sides; standard library only, for the emulated board."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        prompts: lengths of prompts, in tokens.
        tokens: counted one by one, at each depth.
        shallow: tokens before the first of them.
        depth: tokens before the first of the others.
    """

    prompts: tuple[int, ...] = (64, 128)
    tokens: int = 4
    shallow: int = 64
    depth: int = 448

    def prompt_name(self, count: int) -> str:
        """The name of a prompt's instructions."""
        return f"prompt of {count}"

    def token_name(self, depth: int) -> str:
        """The name of a token's instructions."""
        return f"token after {depth}"

    def words(self) -> list[str]:
        """As arguments of a command."""
        prompts = ",".join(map(str, self.prompts))
        return [prompts, *map(str, (self.tokens, self.shallow, self.depth))]

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Plan:
        """The plan of `words`."""
        prompts, *numbers = words
        return cls(tuple(map(int, prompts.split(","))), *map(int, numbers))
