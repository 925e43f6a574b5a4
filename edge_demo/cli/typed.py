"""Reads messages for `chat` from a terminal or a pipe."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator

from edge_demo.cli.editor import Editor
from edge_demo.cli.history import TypedHistory
from edge_demo.cli.typed_text import is_open

_CHUNK = 1 << 16
_PROMPT = "> "
_MORE = "... "  # before a further line of a block
_TYPING_S = 0.05  # seconds; pasted lines arrive faster than typed ones


def piped_messages() -> Iterator[str]:
    """Reads stdin as one message, or as several that NUL characters separate.

    The last line break is not part of a message. Messages that are only white space are skipped.
    """
    handle, held = sys.stdin.buffer, b""
    while True:
        chunk = handle.read1(_CHUNK)
        *ended, held = (held + chunk).split(b"\0")
        if not chunk:
            ended.append(held)
        for data in ended:
            text = data.decode("utf-8", "replace").replace("\r\n", "\n")
            if text.strip():
                yield text.removesuffix("\n")
        if not chunk:
            return


class Keyboard:
    """Reads what is typed at the terminal.

    Lines are edited with prompt_toolkit where it is installed, else with readline. A terminal that
    cannot move its cursor has readline only. If stdout is for a program, nothing is edited.

    Args:
        history: of typed texts.
    """

    def __init__(self, history: TypedHistory) -> None:
        self._history = history
        self._edits = sys.stdout.isatty()
        self._editor: Editor | None = None
        if self._edits and _moves_its_cursor():
            with contextlib.suppress(ImportError):
                self._editor = Editor(_PROMPT, _MORE, history.entries)
        if self._edits and self._editor is None:
            _start_readline(history.entries)

    def read(self) -> str | None:
        """Ask for a text; a pasted text of several lines is one.

        Returns:
            Returns `""` after Ctrl-C, which discards the typed text. Returns `None` after Ctrl-D,
            also if it was typed during the last answer.
        """
        try:
            if _ended_already():
                raise EOFError
            text = self._line(_PROMPT)
            while is_open(text):
                text += f"\n{self._line(_MORE)}"
        except EOFError:
            self._end_line()
            return None
        except KeyboardInterrupt:
            self._end_line()
            return ""
        if text.strip():
            self._history.add(text)
            if self._edits and self._editor is None:
                _remember(text)
        return text

    def _line(self, prompt: str) -> str:
        """A line, or several that were pasted; of an editor a whole text."""
        if self._editor is not None:
            line, whole = self._editor.read(), True
        elif self._edits:
            line, whole = _edited_line(prompt)
        else:  # stdout is for a program
            print(prompt, end="", file=sys.stderr, flush=True)
            line, whole = _plain_line(), False
        if not whole:
            line += _pasted()
        return line.removesuffix("\n")

    def _end_line(self) -> None:
        if self._editor is None:  # which ends it itself
            print(file=sys.stderr)


def _ended_already() -> bool:
    """Whether Ctrl-D is waiting in the terminal. Line editing would treat it as another key."""
    if not _waits():
        return False
    import fcntl
    import termios

    count = fcntl.ioctl(sys.stdin, termios.FIONREAD, bytes(4))
    # Readable without any bytes means the end of input.
    return not int.from_bytes(count, sys.byteorder) and not os.read(sys.stdin.fileno(), 1)


def _waits(seconds: float = 0.0) -> bool:
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _plain_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _pasted() -> str:
    """Returns the lines that arrive so soon after the first that they were pasted, not typed."""
    data = b""
    while _waits(_TYPING_S) and (more := os.read(sys.stdin.fileno(), _CHUNK)):
        data += more
    return data.decode("utf-8", "replace")


def _moves_its_cursor() -> bool:
    return os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def _start_readline(entries: list[str]) -> None:
    import readline

    readline.set_auto_history(False)  # which would take each line of a block
    for entry in entries:
        _remember(entry)


def _remember(text: str) -> None:
    import readline

    with contextlib.suppress(ValueError):  # the terminal's encoding lacks a character
        readline.add_history(text)


def _edited_line(prompt: str) -> tuple[str, bool]:
    """Returns a line, or several pasted lines, and whether the terminal marks pasted text."""
    import readline

    # Python turns it off, although `input` handles several lines. libedit does not have it, and
    # neither do terminals that cannot move their cursor.
    gnu = "libedit" not in (readline.__doc__ or "")
    brackets = gnu and _moves_its_cursor()
    if brackets:
        readline.parse_and_bind("set enable-bracketed-paste on")
    line = input(prompt)
    return (line, True) if brackets else (f"{line}\n", False)
