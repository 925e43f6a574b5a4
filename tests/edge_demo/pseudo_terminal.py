"""A terminal to test commands at, and what a person does there."""

from __future__ import annotations

import importlib.util
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time

import pytest

from tests.conftest import ROOT

CTRL_C, CTRL_D = b"\x03", b"\x04"
UP = b"\x1b[A"
# prompt_toolkit moves over the space, and both editors send sequences after it.
PROMPT = r">(?: |\x08\x1b\[2C)(?:\r|\x1b\[[0-9;?]*[a-zA-Z])*$"
XTERM = {"TERM": "xterm"}
EDITORS = ("readline", "prompt_toolkit")
# Makes the pseudo-terminal the controlling one, so that Ctrl-C becomes SIGINT, and sees to it that
# SIGINT is heard, which a shell's background jobs ignore; then runs the command.
LAUNCH = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "edge_demo.cli.main", *sys.argv[1:]])
"""


class Terminal:
    """A command that sits at a pseudo-terminal, but for the streams given.

    Args:
        arguments: of the command.
        environment: in addition to this process's; the terminal is a dumb one unless it says
            another.
        streams: as `Popen` takes them.
    """

    def __init__(self, *arguments, environment=None, **streams):
        self._master, self._slave = pty.openpty()
        self._before = termios.tcgetattr(self._slave)
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), self._slave)
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "TERM": "dumb", **(environment or {})},
            start_new_session=True,
            **ends | streams,
        )
        self.screen, self._seen = "", 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()
        os.close(self._master)
        os.close(self._slave)

    def keys(self, keys):
        os.write(self._master, keys)

    def wait_for(self, pattern, seconds=60):
        """Read on until the screen holds a pattern after the last one; what came up to its end."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.screen[self._seen :], re.DOTALL)):
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"no {pattern!r} in {self.screen[self._seen :]!r}")
        found = self.screen[self._seen : self._seen + match.end()]
        self._seen += match.end()
        return found

    def _read(self, seconds):
        ready, _, _ = select.select([self._master], [], [], max(0, seconds))
        if ready:
            self.screen += os.read(self._master, 1 << 16).decode(errors="replace")
        return ready

    def finish(self):
        """Wait for the end, see that the terminal is as it was; the exit status."""
        end = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it goes on: {self.screen!r}"
            self._read(0.05)
        while self._read(0):
            pass
        assert termios.tcgetattr(self._slave) == self._before
        assert "Traceback" not in self.screen
        return self.process.returncode


def environment_with(editor, folder):
    """A terminal that can move its cursor, at which messages are edited with one of `EDITORS`.

    Args:
        editor: its name; a test is skipped where it is not installed.
        folder: for what hides prompt_toolkit.
    """
    if editor == "prompt_toolkit":
        if importlib.util.find_spec(editor) is None:
            pytest.skip("prompt_toolkit is not installed")
        return XTERM
    folder.mkdir(exist_ok=True)
    (folder / "prompt_toolkit.py").write_text("raise ImportError('it is hidden')\n")
    return {**XTERM, "PYTHONPATH": str(folder)}
