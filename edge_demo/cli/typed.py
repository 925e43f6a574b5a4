"""Reads messages for `chat` from a terminal or a pipe."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator

_CHUNK = 1 << 16
_PROMPT = "> "
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


def typed_message() -> str | None:
    """Ask for a message at the terminal.

    A pasted text of several lines is one message.

    Returns:
        Returns `""` after Ctrl-C, which discards the typed text. Returns `None` after Ctrl-D, also
        if it was typed during the last answer.
    """
    try:
        if _ended_already():
            raise EOFError
        if sys.stdout.isatty():
            message, whole = _edited_line()
        else:  # stdout is for a program
            print(_PROMPT, end="", file=sys.stderr, flush=True)
            message, whole = _plain_line(), False
        if not whole:
            message += _pasted()
    except EOFError:
        print(file=sys.stderr)
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""
    return message.removesuffix("\n")


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


def _edited_line() -> tuple[str, bool]:
    """Returns a line, or several pasted lines, and whether the terminal marks pasted text."""
    import readline

    # Python turns it off, although `input` handles several lines. libedit does not have it, and
    # neither do terminals that cannot move their cursor.
    gnu = "libedit" not in (readline.__doc__ or "")
    brackets = gnu and os.environ.get("TERM", "dumb") != "dumb"
    if brackets:
        readline.parse_and_bind("set enable-bracketed-paste on")
    line = input(_PROMPT)
    return (line, True) if brackets else (f"{line}\n", False)
