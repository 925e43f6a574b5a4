"""Edits messages at a terminal with prompt_toolkit, which the `chat` extra installs.

A pasted text is inserted and not sent. Enter sends, except in a block of several lines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from edge_demo.cli.typed_text import is_open


class Editor:
    """Reads one text after another.

    Args:
        prompt: stands before a text.
        more: stands before each of its lines after the first.
        entries: earlier texts, oldest first.

    Raises:
        ImportError: prompt_toolkit is not installed.
    """

    def __init__(self, prompt: str, more: str, entries: Sequence[str]) -> None:
        # Nothing here needs the cursor's position. A serial console does not report it, and each
        # message would wait for it.
        os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
        from prompt_toolkit import PromptSession
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.history import InMemoryHistory

        self._session: PromptSession[str] = PromptSession(
            prompt,
            multiline=Condition(lambda: is_open(self._session.default_buffer.text)),
            history=InMemoryHistory(entries),
            prompt_continuation=lambda width, line, wrapped: "" if wrapped else more,
            enable_suspend=True,
        )

    def read(self) -> str:
        """The next text.

        Raises:
            EOFError: Ctrl-D was typed, with no text.
            KeyboardInterrupt: Ctrl-C was typed; the text is discarded.
        """
        return self._session.prompt()
