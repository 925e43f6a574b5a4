"""Stores intermediate results of a long export in a folder, so that an interrupted export can
continue.

Files get their names only when they are complete, and only numpy arrays are read back. A workspace
is valid only for the same weights, text and method.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.checkpoints.source import table_chunks
from gemma_keras.config import GemmaConfig

_KEY = "key.txt"


def workspace_path(out: Path) -> Path:
    """Returns the folder in which an export to `out` stores intermediate results."""
    return out.parent / f".{out.name}.work"


def kept_work(out: Path) -> bool:
    """Whether an unfinished export to `out` has left results; an empty workspace is removed."""
    folder = workspace_path(out)
    with contextlib.suppress(OSError):  # as of a name that is too long: there is none
        if any(folder.glob("*.npz")):
            return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


class Workspace:
    """Named groups of arrays.

    Args:
        folder: made if it is missing, emptied if it was made for something else; `None` keeps all
            in memory.
        key: identifies weights, text and method.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder = folder
        self._memory: dict[str, dict[str, np.ndarray]] = {}
        if folder is None:
            return
        if folder.exists() and _key_of(folder) != key:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _KEY).write_text(key, encoding="utf-8")

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a group of arrays under a name."""
        if self._folder is None:
            self._memory[name] = dict(arrays)
            return
        path = self._folder / f"{name}.npz"
        unfinished = path.with_suffix(".partial")
        with unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(unfinished, path)

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """Returns the group of that name; `None` if it was not stored, or cannot be read."""
        if self._folder is None:
            return self._memory.get(name)
        try:
            # opened here, because numpy leaves a damaged file open
            with (self._folder / f"{name}.npz").open("rb") as file:
                stored = np.load(file, allow_pickle=False)
                return {key: stored[key] for key in stored.files}
        except (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile):
            return None


def _key_of(folder: Path) -> str:
    try:
        return (folder / _KEY).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def fingerprint(config: GemmaConfig, weights: Mapping[str, np.ndarray], *others: object) -> str:
    """Returns a SHA-256 of a model in float32, and of everything else that determines a result."""
    digest = hashlib.sha256(repr((config, *others)).encode())
    for spec in weight_specs(config).values():
        digest.update(f"{spec.name} {spec.shape}".encode())
        if spec.kind == "table":
            chunks = (chunk for _, chunk in table_chunks(weights, spec.name))
        else:
            chunks = [weights[spec.name]]
        for chunk in chunks:
            array = np.ascontiguousarray(chunk, np.float32)
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
