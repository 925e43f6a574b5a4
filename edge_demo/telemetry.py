"""onnxruntime collects and sends nothing, unless whoever runs it says otherwise.

From 1.29 on its builds for Linux, macOS and Windows keep a lasting device id and a database of
events in the user's cache, and send them to Microsoft. It reads `ORT_DISABLE_TELEMETRY` once, when
it is imported (its Privacy.md, "Disabling Telemetry"; onnxruntime-genai does so too).
"""

from __future__ import annotations

import os
import sys

VARIABLE = "ORT_DISABLE_TELEMETRY"


def turn_off() -> None:
    """Before onnxruntime is imported; a variable that is set, to whatever, stays as it is.

    Where it is imported already, it has told that it was; what it would tell later is turned off.
    """
    if VARIABLE in os.environ:
        return
    os.environ[VARIABLE] = "1"
    loaded = sys.modules.get("onnxruntime")
    if loaded is not None and hasattr(loaded, "disable_telemetry_events"):
        loaded.disable_telemetry_events()
