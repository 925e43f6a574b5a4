"""Packs several examples into a row, so that little of a batch is padding."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the largest first, each into the fullest row that has room for it.

    Args:
        sizes: of examples, in tokens; none is more than `capacity`.
        capacity: of a row.

    Returns:
        For each row the indices of its examples, in the order of `sizes`; every index is in one.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # room that is left and the row's number, the least first
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(open_rows, (sizes[index], -1))
        if at == len(open_rows):
            room, number = capacity, len(rows)
            rows.append([])
        else:
            room, number = open_rows.pop(at)
        rows[number].append(index)
        bisect.insort(open_rows, (room - sizes[index], number))
    return [sorted(row) for row in rows]
