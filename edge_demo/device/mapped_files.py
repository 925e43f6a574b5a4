"""Releases pages of memory-mapped files that a process no longer needs."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from pathlib import Path

_MAPS = Path("/proc/self/maps")
# start-end permissions offset device inode path; only private mappings of this process
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ...p \S+ \S+ [1-9]\d* +(.*)")


def forget_pages(path: Path) -> None:
    """Release the mapped pages of a file; they are loaded again when they are read.

    onnxruntime maps a weight, copies it in a layout for its products, and never reads the mapping
    again. The mapped pages count as the process's memory while it runs. If the system does not list
    mappings, nothing is done.

    Args:
        path: of a file whose mappings are never written to.
    """
    advice = getattr(mmap, "MADV_DONTNEED", None)
    try:
        lines = _MAPS.read_text(errors="surrogateescape").splitlines()
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    if advice is None:
        return
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    name = os.path.realpath(path)
    for line in lines:
        mapping = _LINE.fullmatch(line)
        if mapping is not None and mapping[3] == name:
            start, end = int(mapping[1], 16), int(mapping[2], 16)
            advise(start, end - start, advice)
