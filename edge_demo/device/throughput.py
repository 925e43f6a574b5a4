"""Measures how fast this device reads memory with all cores, and the disk of a file."""

from __future__ import annotations

import dataclasses
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_MEMORY_BYTES = 256 << 20  # larger than the caches of typical devices
_PIECE = 8 << 20
_DISK_BYTES = 512 << 20


def memory_bytes_per_s(threads: int, seconds: float = 1.0, num_bytes: int = _MEMORY_BYTES) -> float:
    """Returns the best of several passes, in which each thread reads its own array.

    numpy's reductions release the GIL. A reduction that only combines bits is limited by memory
    alone.

    Args:
        threads: that read at once.
        seconds: approximate duration.
        num_bytes: of all arrays together.
    """
    size = max(1, num_bytes // threads // 8)
    arrays = [np.ones(size, np.uint64) for _ in range(threads)]
    best, end = 0.0, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while True:
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, arrays))
            now = time.perf_counter()
            best = max(best, threads * size * 8 / (now - start))
            if now >= end:
                return best


@dataclasses.dataclass(frozen=True)
class DiskSpeed:
    """The result of reading a file.

    Attributes:
        bytes_per_s: read.
        direct: whether the page cache was bypassed; otherwise data may have come from memory.
    """

    bytes_per_s: float
    direct: bool


def disk_speed(path: Path, seconds: float = 1.0) -> DiskSpeed | None:
    """Read a file from its beginning, past the page cache where the system allows.

    Args:
        path: of a large file.
        seconds: approximate maximum duration.

    Returns:
        `None` where the file is empty or cannot be read.
    """
    for flag in dict.fromkeys((getattr(os, "O_DIRECT", 0), 0)):
        try:
            handle = os.open(path, os.O_RDONLY | flag)
        except OSError:  # a file system without direct reads
            continue
        try:
            speed = _read(handle, seconds)
        except OSError:
            continue
        finally:
            os.close(handle)
        return DiskSpeed(speed, bool(flag)) if speed else None
    return None


def _read(handle: int, seconds: float) -> float:
    done, start = 0, time.perf_counter()
    with mmap.mmap(-1, _PIECE) as piece:  # page-aligned, as direct reads require
        while done < _DISK_BYTES and time.perf_counter() - start < seconds:
            count = os.readv(handle, [piece])
            done += count
            if count < _PIECE:
                break
    return done / (time.perf_counter() - start) if done else 0.0
