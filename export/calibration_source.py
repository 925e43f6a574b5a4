"""What a model is calibrated on, as a value: text that it writes, a page, a file, or nothing."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from export.errors import ExportRequestError


@dataclasses.dataclass(frozen=True)
class SelfWritten:
    """Text that the model writes itself."""


@dataclasses.dataclass(frozen=True)
class OwnPage:
    """A page that comes with this package."""


@dataclasses.dataclass(frozen=True)
class NoCalibration:
    """No text: weights are rounded to the nearest value."""


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A UTF-8 text file that shows what the model will be used for."""

    path: Path


CalibrationSource = SelfWritten | OwnPage | NoCalibration | TextFile

# How a command line, a manifest and a notebook write those that are no file.
_NAMES: dict[str, CalibrationSource] = {
    "self": SelfWritten(),
    "text": OwnPage(),
    "none": NoCalibration(),
}


def calibration_source(value: str | os.PathLike[str] | CalibrationSource) -> CalibrationSource:
    """The source of that name; any other value is the path of a file."""
    if isinstance(value, CalibrationSource):
        return value
    name = os.fspath(value)
    return _NAMES[name] if name in _NAMES else TextFile(Path(name))


def identity(source: CalibrationSource) -> tuple[str, int, int]:
    """A key for results that depend on the source: its name, and of a file size and time.

    Raises:
        ExportRequestError: the file cannot be read.
    """
    if not isinstance(source, TextFile):
        return next(name for name, known in _NAMES.items() if known == source), 0, 0
    try:
        stat = os.stat(source.path)
    except OSError as error:
        raise ExportRequestError(
            f"the calibration text {source.path} cannot be read: {error.strerror}"
        ) from error
    return os.fspath(source.path), stat.st_size, stat.st_mtime_ns
