"""The errors of `edge_demo`; each message says what is wrong and what to do."""

from __future__ import annotations

import os

_LONGEST_VALUE = 200
LONGEST_MESSAGE = 600
INTERRUPTED = 130  # the exit status after Ctrl-C, as shells have it


def brief(value: object, most: int = _LONGEST_VALUE) -> str:
    """Shortens a value for a message: one line, with the middle left out if it is long."""
    text = " ".join(line.strip() for line in str(value).splitlines())
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end]}…{text[-end:]}"


def sentence(error: object) -> str:
    """Returns an error's message without the errno that Python puts before it."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if isinstance(error.filename, str | bytes):
        return f"{brief(os.fsdecode(error.filename))}: {error.strerror}"
    return error.strerror


class EdgeError(Exception):
    """Something failed; commands end with exit status 1.

    Args:
        message: the sentence; line breaks, which other libraries make, become spaces. The middle of
            a very long message is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(brief(message, LONGEST_MESSAGE))


class NotFiniteError(EdgeError):
    """A model's logits are not finite, so sampling and measuring are impossible.

    Args:
        whose: they are, such as `the draft`.
    """

    def __init__(self, whose: str = "the model") -> None:
        super().__init__(
            f"{whose} gave logits that are not finite (NaN or infinity): its weights are damaged "
            "or overflow; export the bundle again, or with another recipe"
        )


class TooLittleMemoryError(EdgeError):
    """A bundle does not fit into the memory that there is."""


class RequestError(EdgeError):
    """The request is not valid; commands end with exit status 2."""


class BundleError(RequestError):
    """A bundle is missing, incomplete, changed, or made for another version."""
