"""Says what to install if a package is missing, and distinguishes this from other import errors."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

_PROJECT = ("gemma_keras", "export", "edge_demo")
_BACKENDS = ("jax", "torch", "tensorflow")  # each has an extra of its name


def missing_package(error: ImportError) -> str | None:
    """The package that is not installed, if that is why an import failed.

    `None` for a package that is there and broken, and for modules of this project.
    """
    name = (error.name or "").split(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not name or name in _PROJECT:
        return None
    return None if _is_there(name) else name


def how_to_install(package: str, extra: str) -> str:
    """The command that brings a package.

    Args:
        package: what is missing.
        extra: of this project, which contains the package.
    """
    # quoted, because zsh treats brackets as a pattern
    return f"pip install 'gemma-keras[{package if package in _BACKENDS else extra}]'"


@contextlib.contextmanager
def said_what_is_missing(what: str, extra: str) -> Iterator[None]:
    """Turn an import error of a missing package into one that says what to install.

    Args:
        what: the beginning of the sentence, such as `exporting to ONNX`.
        extra: of this project, which contains the package.

    Raises:
        ModuleNotFoundError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = missing_package(error)
        if package is None:
            raise
        raise ModuleNotFoundError(
            f"{what} needs {package}, which is not installed; run: "
            f"{how_to_install(package, extra)}",
            name=package,
        ) from error


def check_export_is_ours() -> None:
    """Raise an error if another module named `export`, such as a user's script, hides ours.

    Raises:
        ImportError: another module is already imported or found first.
    """
    ours = Path(__file__).resolve().parents[1] / "export" / "__init__.py"
    module = sys.modules.get("export")
    location = getattr(module, "__file__", None)
    if module is None:
        spec = importlib.util.find_spec("export")
        location = spec.origin if spec else None
    if location is None or Path(location).resolve() == ours:
        return
    path = Path(location)
    hides, kind = (path.parent, "folder") if path.name == "__init__.py" else (path, "file")
    raise ImportError(
        f"gemma-keras's package `export` is hidden by {hides}; rename that {kind}, or run "
        "Python from another folder",
        name="export",
        path=location,
    )


def _is_there(name: str) -> bool:
    try:
        return sys.modules.get(name) is not None or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
