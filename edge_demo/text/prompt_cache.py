"""Stores a prompt's keys and values in a file, so that the next start does not compute them again.

The file has the layout of safetensors: 8 bytes of header length, a JSON header, the arrays' bytes
one after another. Common tools can read it, it contains only data, and the offset of every array is
known before reading. `np.savez` would hide that in a zip.

The file is checked before use. It must belong to this bundle (hashes), this onnxruntime version and
this kind of processor, because these determine the numbers to the last bit. Its header must be
exactly the one that is written for as many tokens. The checksum, the token ids and the numbers must
be valid. The CRC-32 checksum detects damage, not manipulation.

The file also says how the tokens were run, so that only identical results are reused
(`edge_demo.engine.prompt_chunks`).
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnxruntime as ort

from edge_demo.device import hardware
from edge_demo.durable import write_whole
from edge_demo.engine.kv_cache import Snapshot
from edge_demo.engine.prompt_chunks import PromptRun
from edge_demo.engine.runner import TokenRunner
from edge_demo.errors import EdgeError, RequestError, brief
from edge_demo.safetensors_header import LENGTH_BYTES, Tensor, encode_header, header_of

FORMAT = "gemma-keras-prompt-cache"
FORMAT_VERSION = "2"
_BEGINNING = b'{"__metadata__":{"format":"' + FORMAT.encode() + b'"'
_MAX_HEADER = 1 << 20
_COURSE = re.compile(r"(\d{1,9}) of (\d{1,9}) tokens(, in float32)?")
_DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U8", "int32": "I32"}


class CacheError(EdgeError):
    """A prompt cache cannot be read or written; the prompt can be run without it."""


class PromptCache:
    """A prompt cache in one file.

    Args:
        path: of the file, which may not exist yet.
        read_only: whether it is never written.

    Raises:
        RequestError: the path is not valid, or the file is not a prompt cache and must not be
            overwritten.
    """

    def __init__(self, path: str | os.PathLike[str], read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        try:
            exists = os.path.lexists(self.path)
            if exists and self.path.exists() and not self.path.is_file():
                raise RequestError(f"the prompt cache {self.path} is not a file")
            if not read_only and not Path(os.path.realpath(self.path)).parent.is_dir():
                raise RequestError(f"the parent of the prompt cache {self.path} is not a folder")
            if not self.path.is_file():
                return
            with self.path.open("rb") as file:
                beginning = file.read(LENGTH_BYTES + len(_BEGINNING))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise RequestError(f"the prompt cache {brief(path)} cannot be read: {why}") from error
        if beginning and beginning[LENGTH_BYTES:] != _BEGINNING:
            why = "" if read_only else ", so it is not overwritten"
            raise RequestError(
                f"{self.path} is not a prompt cache{why}; choose another name, or remove the file"
            )

    def load(self, engine: TokenRunner) -> int:
        """Load the file into the engine.

        Returns:
            The number of loaded tokens; 0 if there is no file yet, or an empty one.

        Raises:
            CacheError: the file belongs to another bundle or version, is too long, or damaged. The
                engine is unchanged.
        """
        try:
            if not self.path.exists() or not self.path.stat().st_size:
                return 0
            with self.path.open("rb") as file:
                snapshot = _read(file, engine)
        except _Unusable as reason:
            raise CacheError(f"the prompt cache {self.path} {reason}") from None
        except OSError as error:
            raise CacheError(
                f"the prompt cache {self.path} cannot be read: {error.strerror}"
            ) from error
        engine.restore(snapshot)
        return len(snapshot.tokens)

    def save(self, engine: TokenRunner) -> None:
        """Write the engine's keys and values; the file is replaced only when the new one is
        complete.

        Raises:
            CacheError: it cannot be written.
        """
        snapshot = engine.snapshot()
        arrays = [np.array(snapshot.tokens, np.int32), *snapshot.filled.values()]
        checksum = 0
        for array in arrays:
            checksum = zlib.crc32(_bytes(array), checksum)
        header = _header(engine, len(snapshot.tokens), snapshot.prompt_run, f"{checksum:08x}")
        try:
            write_whole(self.path, (encode_header(header), *map(_bytes, arrays)))
        except OSError as error:
            raise CacheError(
                f"the prompt cache {self.path} cannot be written: {error.strerror}"
            ) from error


class _Unusable(Exception):
    """Why a file cannot be used, as the end of a sentence."""


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")


def _arrays(engine: TokenRunner, length: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {"tokens": (np.dtype(np.int32), (length,)), **engine.layout(length)}


def _header(
    engine: TokenRunner, length: int, prompt_run: PromptRun, checksum: str
) -> dict[str, Any]:
    metadata = {
        "format": FORMAT,  # first, because it identifies the file
        "format_version": FORMAT_VERSION,
        "bundle": engine.bundle.fingerprint,
        "onnxruntime": ort.__version__,
        "processor": hardware.kind(),
        "run_as_prompt": f"{prompt_run.left} of {prompt_run.length} tokens"
        + (", in float32" if prompt_run.in_float else ""),
        "crc32": checksum,
    }
    arrays = _arrays(engine, length).items()
    tensors = (
        Tensor(name, _DTYPES[dtype.name], shape, dtype.itemsize * int(np.prod(shape)))
        for name, (dtype, shape) in arrays
    )
    return header_of(tensors, metadata)


def _read(file: BinaryIO, engine: TokenRunner) -> Snapshot:
    length, prompt_run, checksum = _checked_header(file, engine)
    found = 0
    arrays = {}
    for name, (dtype, shape) in _arrays(engine, length).items():
        arrays[name] = np.empty(shape, dtype)
        if file.readinto(_bytes(arrays[name])) != arrays[name].nbytes:
            raise _Unusable("changed while it was being read")
        found = zlib.crc32(_bytes(arrays[name]), found)
    if f"{found:08x}" != checksum:
        raise _Unusable("is damaged: its checksum is wrong")
    tokens = arrays.pop("tokens")
    if tokens.min() < 0 or tokens.max() >= engine.bundle.vocabulary_size:
        raise _Unusable("is damaged: it holds tokens outside the vocabulary")
    for array in arrays.values():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise _Unusable("is damaged: it holds numbers that are not finite")
    return Snapshot(tokens.tolist(), arrays, prompt_run)


def _checked_header(file: BinaryIO, engine: TokenRunner) -> tuple[int, PromptRun, str]:
    """The number of tokens, how they were run, and the checksum; nothing large is allocated."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if not 0 < length <= min(_MAX_HEADER, size - LENGTH_BYTES):
        raise _Unusable("is damaged: the length of its header is not valid")
    try:
        header = json.loads(file.read(length))
        metadata = dict(header["__metadata__"])
        tokens = header["tokens"]["shape"][0]
        checksum = metadata["crc32"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise _Unusable("is damaged: its header is not valid JSON") from None
    if metadata.get("format_version") != FORMAT_VERSION:
        version = reprlib.repr(metadata.get("format_version"))
        raise _Unusable(f"has format version {version}, not {FORMAT_VERSION!r}")
    if metadata.get("bundle") != engine.bundle.fingerprint:
        raise _Unusable("was made with another bundle")
    if metadata.get("onnxruntime") != ort.__version__:
        version = reprlib.repr(metadata.get("onnxruntime"))
        raise _Unusable(f"was made with onnxruntime {version}, not {ort.__version__}")
    if metadata.get("processor") != hardware.kind():
        processor = reprlib.repr(metadata.get("processor"))
        raise _Unusable(f"was made on another processor ({processor}), which rounds differently")
    if type(tokens) is not int or tokens < 1:
        raise _Unusable("is damaged: it holds no tokens")
    if tokens > engine.context_length:
        raise _Unusable(
            f"holds {tokens:,} tokens, more than the context of {engine.context_length:,}"
        )
    match = _COURSE.fullmatch(str(metadata.get("run_as_prompt")))
    if match is None:
        raise _Unusable("is damaged: its header does not say how its tokens were run")
    prompt_run = PromptRun(int(match[2]), match[3] is not None, int(match[1]))
    if prompt_run.left > min(prompt_run.length, tokens):
        raise _Unusable("is damaged: its header describes more tokens than the file holds")
    if header != _header(engine, tokens, prompt_run, checksum):
        raise _Unusable("is damaged: its arrays do not match this bundle")
    expected = (
        LENGTH_BYTES + length + max(a["data_offsets"][1] for n, a in header.items() if n[0] != "_")
    )
    if size != expected:
        raise _Unusable(f"is damaged: it has {size:,} bytes, not {expected:,}")
    return tokens, prompt_run, checksum
