"""Restarts the process so that weights are in huge pages, which makes decoding about 10 % faster.

Linux gives huge pages to memory that requests them (`madvise`). glibc's malloc requests them if its
tunable `glibc.malloc.hugetlb` is 1. glibc reads it when a process starts, so the process must be
restarted. A second tunable fixes the size above which an allocation is mapped separately. Otherwise
glibc raises this size when such memory is freed, and later allocations leave holes in the heap.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=262144"
_FIRST_GLIBC = (2, 35)  # that knows the tunable
_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Start this command again with huge pages; it does not return, unless that cannot be done."""
    try:
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {VARIABLE: SETTING})
    except OSError:
        pass  # only slower


def of_use(environment: Mapping[str, str] = os.environ, policy: Path = _POLICY) -> bool:
    """Whether a restart would enable huge pages that are not used now.

    If `GLIBC_TUNABLES` is set, nothing is changed.
    """
    if sys.platform != "linux" or VARIABLE in environment or not sys.executable:
        return False
    name, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if name != "glibc" or numbers < _FIRST_GLIBC:
        return False
    try:
        return "[madvise]" in policy.read_text()
    except OSError:
        return False
