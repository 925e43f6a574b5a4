"""Decides how a prompt is split into chunks, so that cached tokens can be reused bit for bit.

Several rows may be added up in another order than one row, and a bit can flip an activation that is
rounded to 8 bits, and then a token. A text must not depend on what an earlier one left. So there is
one rule, whatever is held before: the last token of a prompt is run alone, the others many at once,
in pieces that end at multiples of `UNIT` or with them, all in float32 or none
(`edge_demo.engine.float_prompts`). A whole unit comes out the same whatever else its piece holds,
and so do the tokens after the last whole unit, unless it is a single one: that is run alone, too.

No kernel promises that. It follows from how they cut their work: products take 128 rows at a time,
within them eight, four, two or one; attention takes 64 rows, and adds up keys by 64, 128 or 256.
Heads of 64 dimensions or fewer are added up by more, and no Gemma has them.
`tests/edge_demo/test_courses.py` holds the kernels of a processor to it.
"""

from __future__ import annotations

import dataclasses

UNIT = 64


@dataclasses.dataclass(frozen=True)
class PromptRun:
    """How the first tokens were run: as those of a prompt before its last token.

    Attributes:
        length: how many that prompt has before its last one.
        in_float: whether they were run in float32.
        left: how many of them are still there.
    """

    length: int = 0
    in_float: bool = False
    left: int = 0

    def cut(self, tokens: int) -> PromptRun:
        """After all but the first `tokens` were forgotten."""
        return dataclasses.replace(self, left=min(self.left, tokens))

    def shared(self, wanted: PromptRun, same: int) -> int:
        """How many of the first tokens are as `wanted` would leave them.

        Args:
            wanted: how the tokens of a new prompt are to be run.
            same: how many first tokens the two texts have in common.
        """
        if self.in_float != wanted.in_float:
            return 0
        same = min(same, self.left)
        if same == self.length == wanted.length:
            return same
        return min(same, wanted.length) // UNIT * UNIT


def end_of_piece(held: int, end: int, most: int) -> int:
    """Where the next piece of a prompt ends.

    Args:
        held: tokens before it.
        end: those before it, and all that are to be run.
        most: how many to run at once, at least `UNIT`.
    """
    border = end - 1 if end % UNIT == 1 and end - 1 > held else end
    return min(border, (held + most) // UNIT * UNIT)
