"""Reads a GGUF model in several files (`NAME-00001-of-00003.gguf`), as `llama-gguf-split` writes
it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from gemma_keras.checkpoints.gguf.file import GGUFFile, TensorInfo
from gemma_keras.checkpoints.quantized_grid import QuantizedGrid
from gemma_keras.errors import CheckpointError

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GGUFParts:
    """All files of a model, opened by the path of any of them; a model in one file has one part.

    Attributes:
        path: that was given.
        metadata: key to value, of the first part.
        tensors: name to `TensorInfo`, of all parts.

    Raises:
        CheckpointError: a part is missing, damaged or of another model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        given = GGUFFile(path)
        parts = [given if p == self.path else GGUFFile(p) for p in _paths(given)]
        self.metadata: dict[str, Any] = parts[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._part_of: dict[str, GGUFFile] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"the tensor {name} is in {self._part_of[name].path.name} and in "
                        f"{part.path.name}; keep only the parts of one model"
                    )
                self.tensors[name], self._part_of[name] = info, part
        promised = self.metadata.get("split.tensors.count", len(self.tensors))
        if len(parts) > 1 and promised != len(self.tensors):
            raise CheckpointError(
                f"the parts of {self.path} hold {len(self.tensors):,} tensors, but the "
                f"first part says {promised!r}; keep only the parts of one model"
            )

    def read(self, name: str) -> np.ndarray:
        """As `GGUFFile.read`."""
        return self._part_of[name].read(name)

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """As `GGUFFile.read_rows`."""
        return self._part_of[name].read_rows(name, first, last)

    def stored_as(self, name: str) -> str | None:
        """As `GGUFFile.stored_as`."""
        return self._part_of[name].stored_as(name)

    def grid(self, name: str) -> QuantizedGrid | None:
        """As `GGUFFile.grid`."""
        return self._part_of[name].grid(name)


def _paths(given: GGUFFile) -> list[Path]:
    """Returns all files of the model that a file belongs to, in order."""
    count = given.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return [given.path]
    match = _PART_NAME.fullmatch(given.path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{given.path} is one of {count:,} parts of a model; to let the other parts be "
            f"found, give it its original name, NAME-00001-of-{count:05}.gguf"
        )
    paths = [
        given.path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{given.path} is one of {count:,} parts of a model, but {missing[0]} is "
            "missing from its folder"
            + (f", and {len(missing) - 1:,} more" if len(missing) > 1 else "")
        )
    return paths
