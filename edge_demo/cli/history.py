"""Keeps what was typed in `chat`, for the next chats.

Without the file, or with a damaged one, there are only fewer texts to go back to. So no problem
with it is an error.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from edge_demo.durable import write_whole

_MOST = 1000  # texts
_MOST_BYTES = 4 << 20  # that are read
_LONGEST = 1 << 16  # bytes of a text; a longer one is not kept


class TypedHistory:
    """Typed texts in `$XDG_STATE_HOME/gemma-keras/chat-history`, a JSON string a line.

    Each text is appended when it is typed, so that two chats at once lose nothing. What is too much
    goes at the next start.

    Args:
        keep: whether to read and write the file.

    Attributes:
        entries: the texts of earlier chats and of this one, oldest first.
    """

    def __init__(self, keep: bool) -> None:
        self.entries: list[str] = []
        self._path: Path | None = None
        if keep:
            with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home folder
                state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
                self._path = state / "gemma-keras/chat-history"
                self._read(self._path)

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        size = path.stat().st_size
        with path.open("rb") as file:
            if size > _MOST_BYTES:
                file.seek(size - _MOST_BYTES)
                file.readline()  # the rest of a line
            lines = file.read(_MOST_BYTES).splitlines()
        read = [(line, _entry(line)) for line in lines[-_MOST:]]
        self.entries = [entry for _, entry in read if entry is not None]
        if size > _MOST_BYTES or len(lines) > _MOST:
            write_whole(path, [line + b"\n" for line, entry in read if entry is not None])

    def add(self, text: str) -> None:
        """Keep a text, unless it is the last one again."""
        if self.entries[-1:] == [text]:
            return
        self.entries.append(text)
        line = json.dumps(text).encode() + b"\n"
        if self._path is None or len(line) > _LONGEST:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(handle, line)
            finally:
                os.close(handle)


def _entry(line: bytes) -> str | None:
    with contextlib.suppress(ValueError, RecursionError):
        text = json.loads(line)
        if isinstance(text, str) and text.strip() and "\0" not in text:
            return text
    return None
