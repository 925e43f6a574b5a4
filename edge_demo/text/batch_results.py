"""Writes the output of a batch, so that a run continues after an interrupted one.

Each result is one line, in the order of the prompts, and is flushed to disk before the next one.
Rows do not end in the order in which they began. A result that is ready early waits on disk in
`.FILE.ahead`, which is removed at the end. So a killed run loses only the prompts that were being
decoded.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from edge_demo.durable import sync_folder
from edge_demo.errors import EdgeError, RequestError

_BEGINNING = b'{"index": '
_AHEAD = ".ahead"


class Results:
    """A file of results, open for one run; a context manager.

    Args:
        path: of the file; made if it is not there.
        keys: of all prompts, in order; a key is a hash of everything that determines the result.
        overwrite: whether to discard existing results.

    Attributes:
        done: indices of the prompts whose results are there.
        errors: how many of these are errors.

    Raises:
        RequestError: the file does not match the first of these prompts, it cannot be written, or
            another run is writing it.
    """

    def __init__(self, path: str | Path, keys: Sequence[str], overwrite: bool = False) -> None:
        self._path = Path(path)
        self._keys = keys
        self._next = 0
        self._waiting: dict[int, bytes] = {}
        self.done: set[int] = set()
        self.errors = 0
        existed = self._path.exists()
        if existed and not self._path.is_file():
            raise RequestError(f"{path} is not a file, so results cannot be written to it")
        with contextlib.ExitStack() as files:
            self._files = files
            self._file = self._open(self._path)
            self._go_on(keep=existed and not overwrite)
            self._files = files.pop_all()  # no error: the files stay open

    def _open(self, path: Path) -> BinaryIO:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            file = self._files.enter_context(os.fdopen(handle, "r+b", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"another run is writing {path}; wait until it ends, or stop it"
            ) from None
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}") from error
        return file

    def _go_on(self, keep: bool) -> None:
        end = self._read_results() if keep else 0
        self._ahead = self._open(self._path.with_name(f".{self._path.name}{_AHEAD}"))
        if keep:
            self._read_ahead()
        self._file.truncate(end)
        self._file.seek(end)
        if not keep:
            self._ahead.truncate(0)
        sync_folder(self._path.parent)
        self._write_what_is_next()

    def _read_results(self) -> int:
        """Check what is there; where the last good line ends."""
        end = 0
        lines = self._file.readall().splitlines(keepends=True)
        for number, line in enumerate(lines):
            if number == len(lines) - 1 and _is_torn(line):
                break
            record = _record(line)
            if number >= len(self._keys) or not self._belongs(record, number):
                raise RequestError(
                    f"line {number + 1:,} of {self._path} does not match that prompt with "
                    "this bundle and these options; choose another --out, or add "
                    "--overwrite"
                )
            self._count(number, record)
            end += len(line)
        self._next = len(self.done)
        return end

    def _read_ahead(self) -> None:
        end = 0
        for line in self._ahead.readall().splitlines(keepends=True):
            record = _record(line)
            index = record.get("index")
            if not line.endswith(b"\n"):
                break
            end += len(line)
            if not isinstance(index, int) or not self._next <= index < len(self._keys):
                continue
            if index not in self.done and self._belongs(record, index):
                self._waiting[index] = line
                self._count(index, record)
        self._ahead.truncate(end)
        self._ahead.seek(end)

    def _belongs(self, record: dict[str, Any], index: int) -> bool:
        return record.get("index") == index and record.get("key") == self._keys[index]

    def _count(self, index: int, record: dict[str, Any]) -> None:
        self.done.add(index)
        self.errors += "error" in record

    def add(self, index: int, result: dict[str, Any]) -> None:
        """Keep a result; it is on the disk when this returns.

        Args:
            index: of the prompt.
            result: what the line holds beside index and key; `error` if there is no text.

        Raises:
            EdgeError: it cannot be written. The file stays valid, and a later run can continue it.
        """
        record = {"index": index, **result, "key": self._keys[index]}
        line = json.dumps(record).encode() + b"\n"
        if index == self._next:
            self._write(self._file, line)
            self._next += 1
            self._write_what_is_next()
        else:
            self._write(self._ahead, line)
            self._waiting[index] = line
        self._count(index, record)

    def _write_what_is_next(self) -> None:
        while (line := self._waiting.get(self._next)) is not None:
            self._write(self._file, line)
            del self._waiting[self._next]
            self._next += 1
        if not self._waiting and self._ahead.tell():
            self._ahead.truncate(0)
            self._ahead.seek(0)

    def _write(self, file: BinaryIO, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError as error:
            raise EdgeError(
                f"{self._path} cannot be written: {error.strerror}. The results written so "
                "far are kept; run the same command again to continue"
            ) from error

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files; remove `.FILE.ahead` if it is empty."""
        if not self._waiting:
            with contextlib.suppress(OSError):
                os.unlink(self._path.with_name(f".{self._path.name}{_AHEAD}"))
        self._files.close()


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_torn(line: bytes) -> bool:
    """Whether this is the beginning of a result or empty, and not another file's text."""
    if line.endswith(b"\n"):
        return False
    return line[: len(_BEGINNING)] == _BEGINNING[: len(line)] or not line.strip(b"\0")
