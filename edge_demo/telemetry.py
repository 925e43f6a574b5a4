"""Turns off onnxruntime's telemetry, unless the user has set its environment variable.

Since 1.29, its builds for Linux, macOS and Windows store a permanent device id and events in the
user's cache. They send these to Microsoft. It reads `ORT_DISABLE_TELEMETRY` once, when it is
imported (its Privacy.md, "Disabling Telemetry"; onnxruntime-genai does so too).
"""

from __future__ import annotations

import os
import sys

VARIABLE = "ORT_DISABLE_TELEMETRY"


def turn_off() -> None:
    """Call this before onnxruntime is imported. A variable that is already set is not changed.

    If onnxruntime is already imported, it has sent an event; later events are turned off.
    """
    if VARIABLE in os.environ:
        return
    os.environ[VARIABLE] = "1"
    loaded = sys.modules.get("onnxruntime")
    if loaded is not None and hasattr(loaded, "disable_telemetry_events"):
        loaded.disable_telemetry_events()
