"""Formats an unexpected error as one sentence that the user can report."""

from __future__ import annotations

import platform
import sys
import traceback
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PACKAGES = ("onnxruntime", "numpy", "sentencepiece")  # the packages of a device
_MOST = 200  # characters of the error's own message
_PROJECT = ("edge_demo", "export", "gemma_keras")


def unexpected(error: BaseException, packages: Iterable[str] = PACKAGES) -> str:
    """The sentence.

    Args:
        error: what was raised.
        packages: distributions whose versions matter.
    """
    kind, message = type(error).__name__, " ".join(str(error).split())
    if len(message) > _MOST:
        message = message[: _MOST - 1] + "…"
    versions = [f"{name} {_version(name)}" for name in ("gemma-keras", *packages)]
    versions += [f"Python {platform.python_version()}", f"{sys.platform} {platform.machine()}"]
    return (
        f"unexpected {kind}{': ' * bool(message)}{message} ({_place(error)}{', '.join(versions)}); "
        "this should not happen: please report this line; run it again with --debug for the "
        "traceback"
    )


def _place(error: BaseException) -> str:
    """Where in this project it was raised, or called what raised it."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        for package in _PROJECT:
            if package in path.parts[:-1]:
                inside = path.parts[path.parts.index(package) :]
                return f"{'/'.join(inside)} line {frame.lineno}, "
    return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
