"""Starts Keras without the notices that its native libraries print while they load."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator

from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig

_LARGE_BLOCK = 1 << 27  # weights in one decoder block: half a gigabyte in float32


def start_keras(config: GemmaConfig | None = None) -> None:
    """Import Keras, KerasHub and the backend; takes some seconds the first time.

    oneDNN makes TensorFlow's products faster, but its allocator never frees memory. So it is
    switched off for models with large blocks, unless the user has turned it on.

    Args:
        config: of the model that will be used; `None` if it is not known yet.
    """
    if "keras" in sys.modules and "keras_hub" in sys.modules:
        return
    if config is not None and _largest_block(config) > _LARGE_BLOCK:
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with _native_stderr_kept_back():
        import keras
        import keras_hub  # noqa: F401 - it loads TensorFlow, whichever the backend is

        keras.ops.zeros(1)  # the backend's own start-up, with its own notices


def _largest_block(config: GemmaConfig) -> int:
    """How many weights the largest decoder block has."""
    sizes: dict[str, int] = {}
    for spec in weight_specs(config).values():
        if spec.name.startswith("layers."):
            block = spec.name.split(".")[1]
            sizes[block] = sizes.get(block, 0) + math.prod(spec.shape)
    return max(sizes.values())


@contextlib.contextmanager
def _native_stderr_kept_back() -> Iterator[None]:
    """Redirect file descriptor 2 during the block; show the captured text if the block fails."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except Exception:  # not for Ctrl-C
            os.dup2(saved, 2)
            kept.seek(0)
            os.write(2, kept.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)
