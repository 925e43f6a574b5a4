"""Whether an emulated processor refuses the instructions it does not have.

What runs on the Cortex-A72 shows that a Raspberry Pi 4 can run it only if the emulation is no
kinder than the board. This program, for the device's Python, runs the one instruction it is given.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

# Arm A-profile A64 instruction set: the encodings.
INSTRUCTIONS = {
    "add": 0x4EA28420,  # add v0.4s, v1.4s, v2.4s: Armv8.0, everywhere
    "sdot": 0x4E829420,  # sdot v0.4s, v1.16b, v2.16b: the 8-bit dot product
    "stadd": 0xF83F03FF,  # stadd xzr, [sp]: an atomic operation of the large system extensions
}
NEWER = ("sdot", "stadd")  # than Armv8.0
_RETURN = 0xD65F03C0


def main(name: str) -> None:
    """Run an instruction of `INSTRUCTIONS`; on a processor without it, SIGILL ends this."""
    access = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=access)
    for word in (INSTRUCTIONS[name], _RETURN):
        page.write(word.to_bytes(4, "little"))
    ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()


if __name__ == "__main__":
    main(sys.argv[1])
