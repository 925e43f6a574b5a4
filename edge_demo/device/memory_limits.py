"""Finds what limits the memory of this process: the device, control groups, resource limits."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from edge_demo.device.system_files import read_sizes, read_text


@dataclasses.dataclass(frozen=True)
class MemoryLimit:
    """Memory that this process may still allocate under one limit.

    Attributes:
        bound: the limit in words.
        counts: the property of `MemoryEstimate` that it is compared with.
        free: bytes.
    """

    bound: str
    counts: str
    free: int


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """Returns all known limits of this process's memory.

    Args:
        root: the folder that contains `proc` and `sys`.
    """
    limits = []
    meminfo = read_sizes(read_text(root / "proc/meminfo"))
    if "MemAvailable" in meminfo:
        limits.append(MemoryLimit("of the device", "resident", meminfo["MemAvailable"]))
    groups = [free for free in control_group_limits(root) if free is not None]
    if groups:
        limits.append(MemoryLimit("in its control group", "resident", min(groups)))
    status = read_sizes(read_text(root / "proc/self/status"))
    for name, field, counts in (
        ("RLIMIT_DATA", "VmData", "data"),
        ("RLIMIT_AS", "VmSize", "address_space"),
    ):
        limit = _resource_limit(name)
        if limit is not None:
            limits.append(
                MemoryLimit(
                    f"under the resource limit {name}", counts, max(0, limit - status.get(field, 0))
                )
            )
    return limits


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory available without swapping; `None` if unknown."""
    return min((r.free for r in memory_limits(root) if r.counts == "resident"), default=None)


def control_group_limits(root: Path = Path("/")) -> Iterator[int | None]:
    """Bytes free in each control group of this process, including outer ones; `None` means
    unlimited.

    The group's page cache can be dropped, so it counts as free.
    """
    for line in read_text(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        if not controllers:
            bases, names = ("sys/fs/cgroup", "sys/fs/cgroup/unified"), _VERSION_2
        elif "memory" in controllers.split(","):
            bases, names = ("sys/fs/cgroup/memory",), _VERSION_1
        else:
            continue
        for base in bases:
            top = root / base
            group = top / path.lstrip("/")
            while True:
                yield _group_limit(group, *names)
                if group == top or top not in group.parents:
                    break
                group = group.parent


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = ("memory.max", "memory.current", "")


def _group_limit(group: Path, limit_name: str, usage_name: str, prefix: str) -> int | None:
    limit, usage = read_text(group / limit_name).strip(), read_text(group / usage_name).strip()
    if not limit.isdigit() or not usage.isdigit() or int(limit) >= 1 << 60:
        return None
    stat = dict(
        line.split()
        for line in read_text(group / "memory.stat").splitlines()
        if line.count(" ") == 1
    )
    files = sum(int(stat.get(f"{prefix}{name}_file", "0")) for name in ("inactive", "active"))
    return max(0, int(limit) - max(0, int(usage) - files))


def _resource_limit(name: str) -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(getattr(resource, name))[0]
    return None if limit == resource.RLIM_INFINITY else limit


def rss_bytes() -> int:
    """The memory this process has resident now, in bytes; 0 if unknown."""
    return read_sizes(read_text(Path("/proc/self/status"))).get("VmRSS", 0)


def peak_rss_bytes() -> int:
    """The most memory this process has had resident, in bytes."""
    # Not `ru_maxrss` on Linux: that begins with what the parent had when it started this process.
    peak = read_sizes(read_text(Path("/proc/self/status"))).get("VmHWM")
    if peak is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
