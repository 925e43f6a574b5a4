"""Decides how a prompt is split into chunks, so that cached tokens can be reused bit for bit.

A kernel may sum several rows in another order than one row. One bit can change an activation that
is rounded to 8 bits, and then a token. A text must not depend on an earlier text in the cache. So
one rule always applies. The last token of a prompt runs alone. The other tokens run in chunks that
end at a multiple of `UNIT` or at the end. All chunks run in float32, or none
(`edge_demo.engine.float_prompts`). A whole unit gets the same result in any chunk. The tokens after
the last whole unit do too, unless it is a single token, which runs alone.

No kernel guarantees this. It follows from how kernels split their work. Products take 128 rows at a
time, within them eight, four, two or one. Attention takes 64 rows, and sums keys by 64, 128 or 256.
Heads of 64 dimensions or fewer use larger steps, but no Gemma has them.
`tests/edge_demo/test_prompt_chunks.py` checks this for the kernels of a processor.
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
        """Returns how many of the first tokens have the same result as a run like `wanted`.

        Args:
            wanted: how the tokens of the new prompt would be run.
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
