"""Reads the JSON files of a checkpoint safely, because they may come from an untrusted source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_keras.checkpoints.first_bytes import explain_pointer
from gemma_keras.errors import CheckpointError

_MAX_JSON = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, too large, or not a JSON object.
    """
    data = read_json_value(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return data


def read_json_value(path: Path) -> Any:
    """Like `read_json`, for any JSON value."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is too large for a JSON file of a checkpoint")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(explain_pointer(path) or f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
