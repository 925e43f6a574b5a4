"""How much memory there is, before something large is begun."""

from __future__ import annotations


def free_memory() -> int | None:
    """Bytes that can be had without swapping; `None` where that is not known."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
