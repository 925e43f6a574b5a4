"""Texts: what a model is calibrated on, and what it is then measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from export.errors import ExportRequestError

ROW_LENGTH = 256
MOST_ROWS = 64
_FEWEST_TOKENS = 128
_HELD_OUT_ROWS = 4
_MOST_BYTES = 64 << 20
_WINDOW, _MOST_WINDOWS = 512, 24
_PAGE = Path(__file__).with_name("calibration.txt")


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """Rows of token ids, each beginning with the beginning-of-sequence token.

    Attributes:
        rows: int `(rows, length)`, to calibrate on.
        held_out: int `(few, length)`, to measure on.
        origin: what it is, for people.
    """

    rows: np.ndarray
    held_out: np.ndarray
    origin: str

    @property
    def positions(self) -> np.ndarray:
        """Of each held-out row, every fourth token of its second half, which has context."""
        length = self.held_out.shape[1]
        return np.arange(length // 2, length, 4)


def read_text(path: Path, what: str) -> str:
    """A UTF-8 text; of one beyond 64 MB, the beginning.

    Args:
        path: a file.
        what: it is to be called where it cannot be used.

    Raises:
        ExportRequestError: it cannot be read, or is no text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES)
            cut = bool(file.read(1))
        # where a long text is cut, a character may be
        decoded = content.decode("utf-8", "ignore" if cut else "strict")
    except UnicodeDecodeError as error:
        raise ExportRequestError(f"the {what} {path} is not UTF-8: {error}") from error
    except OSError as error:
        raise ExportRequestError(f"the {what} {path} cannot be read: {error.strerror}") from error
    if "\0" in decoded:
        raise ExportRequestError(f"the {what} {path} is not text: it contains NUL characters")
    return decoded


def page(tokenizer: sentencepiece.SentencePieceProcessor, context: int) -> CalibrationText:
    """A page that comes with this package, cut for a model's context."""
    tokens = tokenizer.encode(_PAGE.read_text(encoding="utf-8"))
    return cut_text(tokenizer.bos_id(), tokens, context, "a page of the exporter's own")


def text_file(
    path: Path, tokenizer: sentencepiece.SentencePieceProcessor, context: int
) -> CalibrationText:
    """A text of the user's.

    Raises:
        ExportRequestError: it cannot be read, or is too short.
    """
    tokens = tokenizer.encode(read_text(path, "calibration text"))
    return cut_text(tokenizer.bos_id(), tokens, context, f"the text {path.name}")


def cut_text(bos: int, tokens: Sequence[int], context: int, origin: str) -> CalibrationText:
    """Cut a text into rows, the last of which are held out.

    Args:
        bos: the beginning-of-sequence token.
        tokens: of the text.
        context: the longest row the model takes.
        origin: what it is, for people.

    Raises:
        ExportRequestError: it has fewer than 128 tokens.
    """
    if len(tokens) < _FEWEST_TOKENS:
        raise ExportRequestError(
            f"{origin} is too short to calibrate on: it has {len(tokens)} tokens, but at "
            f"least {_FEWEST_TOKENS} are needed"
        )
    length = min(ROW_LENGTH, context, len(tokens) // 4 + 1)
    count = min(len(tokens) // (length - 1), MOST_ROWS + _HELD_OUT_ROWS)
    rows = np.full((count, length), bos, np.int32)
    rows[:, 1:] = np.reshape(tokens[: count * (length - 1)], (count, length - 1))
    return split_rows(rows, origin)


@dataclasses.dataclass(frozen=True)
class Windows:
    """A text to compare on, as `edge_demo.evaluate.compare` cuts it.

    Attributes:
        ids: of its tokens.
        bos: the beginning-of-sequence token, which every window begins with.
        length: tokens in a window.
        count: of the windows.
        name: of the text.
    """

    ids: Sequence[int]
    bos: int
    length: int
    count: int
    name: str

    @property
    def rows(self) -> np.ndarray:
        """The windows: int32 `(count, length)`."""
        rows = np.full((self.count, self.length), self.bos, np.int32)
        room = self.length - 1
        rows[:, 1:] = np.reshape(self.ids[: self.count * room], (self.count, room))
        return rows


def read_windows(
    path: Path, tokenizer: sentencepiece.SentencePieceProcessor, context: int
) -> Windows:
    """The first 24 windows of 512 tokens of a text, shorter ones for a shorter context.

    Raises:
        ExportRequestError: the text cannot be read, or does not fill one.
    """
    ids = tokenizer.encode(read_text(path, "text of the report"))
    length = min(_WINDOW, context)
    # One token more than fill them: the last position's right token is the next of the text.
    count = min((len(ids) - 1) // (length - 1), _MOST_WINDOWS)
    if count < 1:
        raise ExportRequestError(
            f"the text of the report {path} has {len(ids)} tokens; {length} are needed"
        )
    return Windows(ids, tokenizer.bos_id(), length, count, path.name)


def split_rows(rows: np.ndarray, origin: str) -> CalibrationText:
    """Hold out the last eighth of the rows, from 1 to 4 of them."""
    held_out = min(_HELD_OUT_ROWS, max(1, len(rows) // 8))
    return CalibrationText(rows[:-held_out], rows[-held_out:], origin)
