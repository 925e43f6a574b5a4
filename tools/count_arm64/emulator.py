"""An emulator that counts: qemu, installed or fetched, and the plugin built for it."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools.arm64.user_space import (
    SUITE,
    Processor,
    SetupError,
    UserSpace,
    make,
    program,
    run,
    unpack_debian,
)

_PLUGIN = Path(__file__).with_name("plugin.c")
_QEMU = "qemu-aarch64"  # the dynamic one: qemu-aarch64-static takes no plugins
_LOADER = {"x86_64": "ld-linux-x86-64.so.2"}
_DEBIAN = {"x86_64": "amd64"}


@dataclasses.dataclass(frozen=True)
class Emulator:
    """qemu's user emulation with the plugin.

    Attributes:
        qemu: the words that start it.
        plugin: the shared library.
    """

    qemu: tuple[str, ...]
    plugin: Path

    def try_out(self) -> None:
        """Refuse a qemu that was built without plugins.

        Raises:
            SetupError: it was.
        """
        done = subprocess.run(
            [*self.qemu, "-plugin", f"{self.plugin},out={os.devnull}", os.devnull],
            capture_output=True,
            text=True,
            errors="replace",
        )
        if "unknown option" in done.stderr or "Could not load plugin" in done.stderr:
            raise SetupError(
                f"{self.qemu[-1]} cannot load the plugin; on Debian: apt-get install qemu-user "
                f"({done.stderr.strip().splitlines()[0]})"
            )

    def command(self, processor: Processor, counts: Path, *words: object) -> list[str]:
        """The words that run something on a processor; the plugin writes to `counts`."""
        start = [*self.qemu, "-cpu", processor.name, "-plugin", f"{self.plugin},out={counts}"]
        return [*start, *map(str, words)]

    def python(
        self, space: UserSpace, processor: Processor, counts: Path, words: Sequence[object]
    ) -> tuple[list[str], Mapping[str, str]]:
        """The same for the Python of a user space: the words, and the environment."""
        root = space.folder / processor.name
        home = f"PYTHONHOME={root / 'usr'}"
        python = ("-0", root / "python", root / "usr/bin/python3")
        start = ("-L", root, "-E", home, *python)
        return self.command(processor, counts, *start, *words), os.environ | space.environment()


def build(folder: Path, say: Callable[[str], None]) -> Emulator:
    """Make what is not there yet.

    Args:
        folder: to make it in.
        say: shown a line before each step that takes seconds.

    Raises:
        SetupError: a program is missing, or a download failed.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    compiler = program("cc", "gcc")
    plugin = folder / "plugin"
    make(plugin, (compiler, _PLUGIN.read_text()), lambda new: _compile(compiler, new))
    emulator = Emulator(_qemu(folder, say), plugin / "libcount.so")
    emulator.try_out()
    return emulator


def _compile(compiler: str, new: Path) -> None:
    options = ("-shared", "-fPIC", "-O2", "-o", new / "libcount.so")
    run([compiler, *options, _PLUGIN], f"{_PLUGIN.name} could not be compiled")


def _qemu(folder: Path, say: Callable[[str], None]) -> tuple[str, ...]:
    """The installed one, or Debian's with its own libraries."""
    installed = shutil.which(_QEMU)
    if installed:
        return (installed,)
    machine = platform.machine()
    if machine not in _DEBIAN:
        raise SetupError(f"{_QEMU} is not installed; on Debian: apt-get install qemu-user")
    system = folder / "qemu"
    packages = ("qemu-user",)
    make(
        system,
        (SUITE, *packages),
        lambda new: unpack_debian(new, _DEBIAN[machine], packages, say),
    )
    (loader,) = system.glob(f"lib*/{_LOADER[machine]}")
    places = [system / "lib" / f"{machine}-linux-gnu", system / "usr/lib" / f"{machine}-linux-gnu"]
    libraries = os.pathsep.join(map(str, places))
    return str(loader), "--library-path", libraries, str(system / "usr/bin" / _QEMU)
