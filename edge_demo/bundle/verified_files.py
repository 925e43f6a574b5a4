"""Remembers which files were checked against their SHA-256, so that they are not read again.

A check is stored with the file's size, times and inode. The next start then skips the file.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from edge_demo.durable import write_whole

_LARGE = 8 << 20  # bytes; reading smaller files is fast


class VerifiedFiles:
    """Large files whose SHA-256 was checked, in `$XDG_CACHE_HOME/gemma-keras/verified.json`.

    If this file is lost or cannot be written, checks only take longer.
    """

    _MOST = 64

    def __init__(self) -> None:
        self._path: Path | None = None
        self._entries: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, RuntimeError):
            # RuntimeError: the user has no home folder, or the JSON is nested too deeply
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            self._path = cache / "gemma-keras/verified.json"
            self._entries = dict(json.loads(self._path.read_bytes()))

    @staticmethod
    def _stamp(file: Path, sha256: str) -> list[Any]:
        stat = file.stat()
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, sha256]

    def knows(self, file: Path, sha256: str) -> bool:
        """Whether the file had this hash, and has not changed since."""
        return self._entries.get(str(file.resolve())) == self._stamp(file, sha256)

    def remember(self, file: Path, sha256: str) -> None:
        """Remember that the file has this hash now, if it is large."""
        if file.stat().st_size < _LARGE:
            return
        key = str(file.resolve())
        self._entries.pop(key, None)
        self._entries[key] = self._stamp(file, sha256)
        while len(self._entries) > self._MOST:
            self._entries.pop(next(iter(self._entries)))
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._path, [json.dumps(self._entries).encode()])
