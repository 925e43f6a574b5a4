"""Reads the text files that commands take."""

from __future__ import annotations

from edge_demo.errors import RequestError


def read_text(path: str) -> str:
    """Reads a UTF-8 file.

    Raises:
        RequestError: it is not a regular file, or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise RequestError(f"the text {path} is not a file") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"the text {path} is not UTF-8: {error}") from error
