"""onnxruntime collects and sends nothing, unless whoever runs it says otherwise.

From 1.29 on its builds for Linux, macOS and Windows keep a lasting device id and a database of
events in the user's cache, and send them to Microsoft. It reads `ORT_DISABLE_TELEMETRY` once, when
it is imported (its Privacy.md, "Disabling Telemetry"; onnxruntime-genai does so too).
"""

from __future__ import annotations

import os

VARIABLE = "ORT_DISABLE_TELEMETRY"


def turn_off() -> None:
    """Before onnxruntime is imported; a variable that is set, to whatever, stays as it is."""
    os.environ.setdefault(VARIABLE, "1")
