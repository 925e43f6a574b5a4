"""Callbacks that find out themselves which way is better."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import keras


def stops_on(*names: str) -> list[keras.callbacks.EarlyStopping]:
    """A callback on the value of validation data for each name, which waits longer than tests do."""
    return [keras.callbacks.EarlyStopping(f"val_{name}", patience=100) for name in names]


def check_stops(
    stops: Sequence[keras.callbacks.EarlyStopping],
    history: Mapping[str, list[float]],
    greater: Collection[str],
) -> None:
    """The best that each has seen is the greatest for those that are named, and else the least."""
    for stop in stops:
        of, is_greater = history[stop.monitor], stop.monitor in greater
        assert stop.monitor_op(2, 1) == is_greater, stop.monitor
        assert stop.best == (max if is_greater else min)(of), stop.monitor
