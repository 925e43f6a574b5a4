"""Decides whether prompts run faster in float32, and prepares the graph for it.

Products with weights of 4 and 8 bits (`MatMulNBits`) round activations to 8 bits and multiply
integers. On x86-64 without VNNI, the instructions for that, many rows take longer than float32
products. On Linux, where the processor's features are known, a second session then runs prompts
over the same weights file. It has the same graph, but its products dequantize the weights. It
copies no weights, so it loads in some milliseconds. AMD's Zen 3 has no VNNI either, but does not
use this. There `int4` was slower in float32 and `int8` only slightly faster (docs/lab-notes.md),
with more memory. ARM without dot products does not need it: there onnxruntime already multiplies
floats.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from edge_demo.bundle.reader import Bundle
from edge_demo.device.system_files import read_text
from edge_demo.errors import BundleError

VARIABLE = "EDGE_DEMO_FLOAT_PROMPTS"  # 0: never, 1: if weights are integers and it fits
FEWEST = 96  # at once; more are run so, which is faster (docs/lab-notes.md)

_VNNI = {"avx_vnni", "avx512_vnni"}
_ZEN_3 = re.compile(r"^vendor_id\s*: AuthenticAMD\ncpu family\s*: 25$", re.MULTILINE)
# An attribute of `MatMulNBits` as protocol buffers have it: its name (field 1) and number (3).
_LEVEL = b"\x0a\x0eaccuracy_level\x18"
_ROUNDED, _FLOAT = _LEVEL + b"\x04", _LEVEL + b"\x01"


def preferred(bundle: Bundle, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this device runs a bundle's prompts faster in float32.

    `EDGE_DEMO_FLOAT_PROMPTS` in the environment decides, 0 or 1, where it is set.

    Args:
        bundle: opened.
        cpuinfo: the file that describes the processor; without it float32 is not preferred.
    """
    asked = os.environ.get(VARIABLE)
    if asked == "0" or (asked != "1" and not _gains(read_text(cpuinfo))):
        return False
    try:
        return _ROUNDED in _graph(bundle)
    except BundleError:
        return False  # the error is reported when the bundle is run


def graph_in_float(bundle: Bundle) -> bytes:
    """Returns the graph of all logits, with products that do not quantize activations.

    Raises:
        BundleError: the graph cannot be read.
    """
    return _graph(bundle).replace(_ROUNDED, _FLOAT)


def _graph(bundle: Bundle) -> bytes:
    try:
        return (bundle.path / bundle.engine.file).read_bytes()
    except OSError as error:
        raise BundleError(f"{bundle.engine.file} cannot be read: {error}") from error


def _gains(cpuinfo: str) -> bool:
    """Whether a processor multiplies floats faster than 8-bit integers."""
    if platform.machine() != "x86_64" or _ZEN_3.search(cpuinfo):
        return False  # an emulator may show another processor's file
    flags = re.search(r"^flags\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return flags is not None and not _VNNI & set(flags[1].split())
