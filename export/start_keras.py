"""Starting Keras without the notices that its native libraries print while they load."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


def start_keras() -> None:
    """Import Keras, KerasHub and the backend; takes some seconds the first time."""
    if "keras" in sys.modules and "keras_hub" in sys.modules:
        return
    with _native_stderr_kept_back():
        import keras
        import keras_hub  # noqa: F401 - it loads TensorFlow, whichever the backend is

        keras.ops.zeros(1)  # the backend's own start-up, with its own notices


@contextlib.contextmanager
def _native_stderr_kept_back() -> Iterator[None]:
    """Send file descriptor 2 elsewhere for a while; what came is shown if the block fails."""
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
