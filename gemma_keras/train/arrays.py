"""Files of numpy's arrays, read without pickle and without trust in the sizes that they state."""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# What numpy and zipfile raise of a damaged file. RuntimeError: it says that it is encrypted, or
# compressed in a way that is not known.
DAMAGED = (ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@contextlib.contextmanager
def opened_arrays(path: Path) -> Iterator[Any]:
    """The arrays of a file of `numpy.savez`, by name.

    Raises:
        OSError: the file cannot be read.
        DAMAGED: it is no such file, or an array states more bytes than the file has.
    """
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        most = path.stat().st_size
        for member in arrays.zip.namelist():
            with arrays.zip.open(member) as array:
                shape, _, dtype = _HEADERS[np.lib.format.read_magic(array)](array)
            if math.prod(shape) * dtype.itemsize > most:
                raise ValueError(f"{member} states more bytes than the file has")
        yield arrays
