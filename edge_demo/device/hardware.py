"""Finds the device's processor, board, memory pages, temperature and throttling state.

Unknown values are `None`. Functions that parse text take it as an argument. Functions that read the
device take the folder that contains `proc` and `sys`.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from edge_demo.device.system_files import read_text

_ROOT = Path("/")
_DOT_PRODUCT, _I8MM = "dot product", "i8mm"
# Instructions that speed up products of 4-bit and 8-bit weights, by their Linux names.
_INSTRUCTIONS = {
    "x86_64": {
        "avx2": "AVX2",
        "avx512f": "AVX-512",
        "avx_vnni": "AVX-VNNI",
        "avx512_vnni": "AVX-512 VNNI",
    },
    "aarch64": {"asimddp": _DOT_PRODUCT, "i8mm": _I8MM, "asimdhp": "fp16"},
}
# `CPU part` with implementer 0x41; source: Linux, arch/arm64/include/asm/cputype.h
_ARM_CORES = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse N1",
    "0xd40": "Neoverse V1",
    "0xd41": "Cortex-A78",
    "0xd49": "Neoverse N2",
    "0xd4f": "Neoverse V2",
}
# Raspberry Pi documentation, "vcgencmd get_throttled"; the same bits 16 higher: since it started
_THROTTLING = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")


@dataclasses.dataclass(frozen=True)
class Device:
    """Facts about a device.

    Attributes:
        system: such as `Linux`.
        machine: such as `aarch64`.
        bits: of this Python, and so of what it can load.
        board: such as `Raspberry Pi 5 Model B Rev 1.0`.
        processor: its model.
        cores: physical ones that this process may use.
        instructions: those found that speed up kernels for low-bit weights.
        missing: those not found; both are empty if the processor does not report them.
        page_bytes: of memory.
        huge_pages: the kernel's policy: `always`, `madvise` or `never`.
        celsius: the hottest sensor.
        throttled: the board's throttling state in words.
    """

    system: str
    machine: str
    bits: int
    board: str | None
    processor: str | None
    cores: int | None
    instructions: tuple[str, ...]
    missing: tuple[str, ...]
    page_bytes: int | None
    huge_pages: str | None
    celsius: float | None
    throttled: str | None

    @property
    def dot_products(self) -> bool | None:
        """Whether an ARM processor has 8-bit dot products; `None` elsewhere, or if unknown."""
        if _DOT_PRODUCT in self.instructions:
            return True
        return False if _DOT_PRODUCT in self.missing else None

    @property
    def has_i8mm(self) -> bool:
        """Whether an ARM processor has matrix products of 8-bit integers."""
        return _I8MM in self.instructions


def look(root: Path = _ROOT) -> Device:
    """Examine this device, or one whose `proc` and `sys` are in a folder."""
    cpuinfo = read_text(root / "proc/cpuinfo")
    machine = platform.machine()
    found, missing = instructions(cpuinfo)
    return Device(
        system=platform.system(),
        machine=machine,
        bits=64 if sys.maxsize > 1 << 32 else 32,
        board=read_text(root / "proc/device-tree/model").strip("\0\n") or None,
        processor=processor(cpuinfo) or _sysctl("machdep.cpu.brand_string"),
        cores=physical_cores(root),
        instructions=found,
        missing=missing,
        page_bytes=_page_bytes(),
        huge_pages=chosen(read_text(root / "sys/kernel/mm/transparent_hugepage/enabled")),
        celsius=celsius(root),
        throttled=throttled(root),
    )


def kind(root: Path = _ROOT) -> str:
    """Returns the processor and its instructions in a line; they determine how kernels round."""
    cpuinfo = read_text(root / "proc/cpuinfo")
    name = processor(cpuinfo) or _sysctl("machdep.cpu.brand_string") or ""
    return " ".join(filter(None, (platform.machine(), name, *instructions(cpuinfo)[0])))


def processor(cpuinfo: str) -> str | None:
    """The model's name in the text of `/proc/cpuinfo`; several with `+` where cores differ."""
    names = re.findall(r"^model name\s*:\s*(.+?)\s*$", cpuinfo, re.MULTILINE)
    if not names:
        parts = re.findall(r"^CPU part\s*:\s*(\w+)", cpuinfo, re.MULTILINE)
        names = [_ARM_CORES.get(part, f"Arm core {part}") for part in parts]
    return " + ".join(dict.fromkeys(names)) or None


def instructions(cpuinfo: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Instructions that matter here, found and missing, by the text of `/proc/cpuinfo`."""
    line = re.search(r"^(flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    if line is None:
        return (), ()
    kinds = _INSTRUCTIONS["x86_64" if line[1] == "flags" else "aarch64"]
    has = set(line[2].split())
    return (
        tuple(name for flag, name in kinds.items() if flag in has),
        tuple(name for flag, name in kinds.items() if flag not in has),
    )


def chosen(setting: str) -> str | None:
    """The word in brackets of a setting such as `always [madvise] never`."""
    found = re.search(r"\[(\w+)\]", setting)
    return found[1] if found else None


def physical_cores(root: Path = _ROOT) -> int | None:
    """Cores this process may use, those that share one counted once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    cores = set()
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*"):
        number = folder.name.removeprefix("cpu")
        if not number.isdigit() or (root == _ROOT and allowed and int(number) not in allowed):
            continue
        siblings = read_text(folder / "topology/thread_siblings_list").strip()
        cores.add(siblings or number)
    if cores:
        return len(cores)
    count = _sysctl("hw.physicalcpu")
    return int(count) if count and count.isdigit() else os.cpu_count()


def celsius(root: Path = _ROOT) -> float | None:
    """The hottest of the device's thermal zones, in degrees."""
    found = []
    for path in (root / "sys/class/thermal").glob("thermal_zone*/temp"):
        text = read_text(path).strip()
        if text.isdigit() and 0 < int(text) < 150_000:  # in thousandths
            found.append(int(text) / 1000)
    return max(found, default=None)


def throttled(root: Path = _ROOT) -> str | None:
    """Returns a Raspberry Pi's throttling state in words; see `throttling`."""
    text = read_text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if not text and root == _ROOT and shutil.which("vcgencmd"):
        text = _output("vcgencmd", "get_throttled") or ""
    return throttling(text)


def throttling(text: str) -> str | None:
    """The firmware's bits, `throttled=0x50005` or `50005`, in words."""
    found = re.fullmatch(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]{1,8})", text.strip())
    if not found:
        return None
    bits = int(found[1], 16)
    now = [name for i, name in enumerate(_THROTTLING) if bits >> i & 1]
    before = [name for i, name in enumerate(_THROTTLING) if bits >> (16 + i) & 1]
    if not now and not before:
        return "not throttled"
    parts = [f"now {', '.join(now)}"] if now else ["not throttled now"]
    parts += [f"since it started {', '.join(before)}"] if before else []
    return "; ".join(parts)


def _page_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _sysctl(name: str) -> str | None:
    return _output("sysctl", "-n", name) if sys.platform == "darwin" else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
