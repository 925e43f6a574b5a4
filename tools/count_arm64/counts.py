"""Reads what the plugin wrote: instructions by mark."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path


def read_totals(path: Path) -> list[int]:
    """Instructions that end at each mark, in the order of the marks.

    Raises:
        ValueError: the file is not the plugin's, or a mark is missing.
    """
    totals = []
    with path.open(encoding="ascii") as file:
        for line in file:
            words = line.split()
            if words[:1] != ["mark"]:
                continue
            if len(words) != 3 or int(words[1]) != len(totals):
                raise ValueError(f"{path} lacks mark {len(totals)}")
            totals.append(int(words[2]))
    if not totals:
        raise ValueError(f"{path} holds no marks")
    return totals


def by_name(names: Sequence[str], totals: Sequence[int]) -> Mapping[str, float]:
    """The median of the instructions of each name; marks without a name are left out.

    Raises:
        ValueError: there are more marks than names, or fewer.
    """
    found: dict[str, list[int]] = {}
    for name, total in zip(names, totals, strict=True):
        if name:
            found.setdefault(name, []).append(total)
    return {name: statistics.median(values) for name, values in found.items()}
