"""A small arm64 Linux in a folder: Debian's Python under qemu's user emulation, and aarch64 wheels.

It needs no root, no chroot and no kernel support for foreign programs. apt-get, told to be another
architecture in folders of its own, checks signatures and finds what is needed; dpkg-deb unpacks.
A launcher for each processor, `UserSpace.python`, is a program of this machine, so that Python
there can start itself: it finds the launcher's name in `sys.executable`.

Standard library only. `python -m tools.arm64.user_space FOLDER` makes one.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SUITE = "bookworm"  # glibc 2.36 and Python 3.11, as Raspberry Pi OS of the same name
PYTHON = "3.11"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = ("python3", "libstdc++6")
# What the tests of `edge_demo` use beside the device's packages; onnx spoils graphs in
# them, scipy knows what chance allows.
TEST_PACKAGES = ("pytest", "hypothesis", "filelock", "onnx", "scipy")
# What a server on a device installs, beside what every device does.
SERVER_EXTRAS = ("serve", "grammar")
_EXTRAS = "optional-dependencies"
# Their version here is their version there, so that the processor is the only difference.
_SAME_VERSION = ("onnxruntime", "sentencepiece")
_PLATFORMS = (
    "manylinux_2_31",
    "manylinux_2_28",
    "manylinux_2_27",
    "manylinux2014",
    "manylinux_2_17",
)
_CORES = os.cpu_count() or 1  # as many as here: onnxruntime binds its threads to them


class SetupError(Exception):
    """The user space cannot be made here, in one sentence that says what to do."""


@dataclasses.dataclass(frozen=True)
class Processor:
    """A processor as qemu emulates it.

    Attributes:
        name: qemu's, after `-cpu`.
        board: that has it.
        features: what Linux lists in `/proc/cpuinfo` on that board.
        part: Arm's number of the core.
        revision: variant and revision.
        dot_product: whether it has the 8-bit dot products of Armv8.2, which came with the large
            system extensions' atomic operations.
    """

    name: str
    board: str
    features: str
    part: int
    revision: tuple[int, int]
    dot_product: bool


_A72 = "fp asimd evtstrm crc32 cpuid"
_A76 = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop "
    "asimddp"
)
PROCESSORS = (
    Processor("cortex-a76", "Raspberry Pi 5", _A76, 0xD0B, (4, 1), True),
    Processor("cortex-a72", "Raspberry Pi 4", _A72, 0xD08, (0, 3), False),
)


@dataclasses.dataclass(frozen=True)
class UserSpace:
    """What `build` has made.

    Attributes:
        folder: that holds it.
    """

    folder: Path

    def python(self, processor: Processor) -> Path:
        """The Python of a processor, to be started like any program."""
        return self.folder / processor.name / "python"

    def environment(self, *, tests: bool = False, server: bool = False) -> dict[str, str]:
        """What the environment of that Python has to hold beside this process's own.

        Args:
            tests: whether what the tests need can be imported, too.
            server: whether what `edge-demo serve` needs can be.
        """
        more = [name for name, wanted in (("tests", tests), ("server", server)) if wanted]
        places = [*(self.folder / name for name in ("device", *more)), ROOT]
        return {"PYTHONPATH": os.pathsep.join(map(str, places)), "PYTHONNOUSERSITE": "1"}


def build(folder: Path, say: Callable[[str], None], qemu: Sequence[str] | None = None) -> UserSpace:
    """Make what is not there yet, or was made from something else.

    Args:
        folder: to make it in.
        say: shown a line before each step that takes seconds.
        qemu: the words that start the emulator; by default the installed qemu-aarch64-static.

    Raises:
        SetupError: a program is missing, or a download failed.
    """
    qemu = qemu or [program("qemu-aarch64-static", "qemu-user-static")]
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    system = folder / "system"
    make(
        system, ("Debian", SUITE, *PACKAGES), lambda new: unpack_debian(new, "arm64", PACKAGES, say)
    )
    device, tests = _device_requirements(), TEST_PACKAGES
    make(folder / "device", device, lambda new: _install(new, device, say))
    make(folder / "tests", tests, lambda new: _install(new, tests, say))
    server = tuple(one for extra in SERVER_EXTRAS for one in _project()[_EXTRAS][extra])
    make(folder / "server", server, lambda new: _install(new, server, say))
    for processor in PROCESSORS:
        root = folder / processor.name
        launcher = _launcher(qemu, root, processor)
        made_from = (launcher, _cpuinfo(processor))
        make(root, made_from, lambda new, p=processor, s=launcher: _lay_out(new, system, p, s))
    return UserSpace(folder)


def make(folder: Path, made_from: Sequence[str], fill: Callable[[Path], None]) -> None:
    """Fill a folder under a name of its own and give it its final one when it is complete.

    Args:
        folder: to be there afterwards.
        made_from: what it depends on; if none of it has changed, nothing is done.
        fill: given the new, empty folder.
    """
    note = "\n".join(made_from)
    stamp = folder / ".made-from"
    if stamp.is_file() and stamp.read_text() == note:
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    (partial / stamp.name).write_text(note)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


# --- Debian ---------------------------------------------------------------------------------------


def unpack_debian(
    new: Path, architecture: str, packages: Sequence[str], say: Callable[[str], None]
) -> None:
    """Unpack packages and what they need, as if on a system where nothing is installed.

    Args:
        new: an existing folder.
        architecture: Debian's name of it, such as `arm64`.
        packages: their names.
        say: as of `build`.

    Raises:
        SetupError: a program is missing, or a download failed.
    """
    apt_get, dpkg_deb = program("apt-get", "apt"), program("dpkg-deb", "dpkg")
    if not KEYRING.exists():
        raise SetupError(
            f"Debian's keys are not in {KEYRING}; apt-get install debian-archive-keyring"
        )
    apt = new / "apt"
    for part in ("lists/partial", "archives/partial"):
        (apt / part).mkdir(parents=True)
    (apt / "status").touch()  # nothing is installed
    source = f"deb [signed-by={KEYRING}] {_mirror(apt_get)} {SUITE} main\n"
    (apt / "sources.list").write_text(source)
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures::": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",  # may not enter these folders
        "Debug::NoLocking": "1",
        "Dir::Cache": apt,
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Log": apt,
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    say(f"reading Debian's list of {architecture} packages ({SUITE}, 9 MB)")
    run([apt_get, *options, "update"], "apt-get could not read the list of packages")
    say(f"fetching {', '.join(packages)} and what they need (16 MB)")
    fetch = ("install", "--yes", "--download-only", *packages)
    run([apt_get, *options, *fetch], "apt-get could not fetch the packages")
    archives = sorted((apt / "archives").glob("*.deb"))
    say(f"unpacking {len(archives)} packages")
    for archive in archives:
        run([dpkg_deb, "--extract", archive, new], f"{archive.name} could not be unpacked")
    shutil.rmtree(apt)


def _mirror(apt_get: str) -> str:
    """Where this system fetches Debian's packages from, or what the user says."""
    named = os.environ.get("DEBIAN_MIRROR")
    if named:
        return named
    wanted = ("Created-By: Packages", "Origin: Debian", "Label: Debian")
    command = [apt_get, "indextargets", "--format", "$(REPO_URI)", *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout.strip():
        raise SetupError(
            "this system's apt-get knows no source of Debian's packages; set DEBIAN_MIRROR to the "
            "address of one"
        )
    return done.stdout.split()[0]


# --- wheels ---------------------------------------------------------------------------------------


def _device_requirements() -> tuple[str, ...]:
    """What `pyproject.toml` says a device installs, some of it in this environment's version."""
    try:
        here = {name: importlib.metadata.version(name) for name in _SAME_VERSION}
    except importlib.metadata.PackageNotFoundError as error:
        raise SetupError(
            f"{error.name} is not installed for {sys.executable}; use the project's environment, "
            "as make test-arm64 does"
        ) from error
    pinned = tuple(f"{name}=={version}" for name, version in here.items())
    return (*_project()["dependencies"], *pinned)


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _install(new: Path, requirements: Iterable[str], say: Callable[[str], None]) -> None:
    say(f"installing {new.stem}: the aarch64 wheels of {' '.join(requirements)} (100 MB)")
    command = [sys.executable, "-m", "pip", "install", "--target", str(new)]
    command += ["--disable-pip-version-check", "--quiet", "--no-compile", "--upgrade"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    command += [f"--platform={platform}_aarch64" for platform in _PLATFORMS]
    run([*command, *requirements], "pip could not install the wheels")


# --- what differs from processor to processor -----------------------------------------------------


def _lay_out(new: Path, system: Path, processor: Processor, launcher: str) -> None:
    """The system by links, with files of its own where Linux tells programs about the processor.

    onnxruntime reads them at its import, and crashes if there is nothing.
    """
    for place in system.iterdir():
        if place.is_dir():
            (new / place.name).symlink_to(Path("..", system.name, place.name))
    (new / "proc").mkdir()
    (new / "proc" / "cpuinfo").write_text(_cpuinfo(processor))
    cpus = new / "sys" / "devices" / "system" / "cpu"
    cpus.mkdir(parents=True)
    for state in ("possible", "present", "online"):
        (cpus / state).write_text(f"0-{_CORES - 1}\n")
    (new / "python").write_text(launcher)
    (new / "python").chmod(0o755)


def _cpuinfo(processor: Processor) -> str:
    variant, revision = processor.revision
    core = (
        f"BogoMIPS\t: 108.00\nFeatures\t: {processor.features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: {variant:#x}\nCPU part\t: {processor.part:#x}\n"
        f"CPU revision\t: {revision}\n\n"
    )
    return "".join(f"processor\t: {number}\n{core}" for number in range(_CORES))


def _launcher(qemu: Sequence[str], root: Path, processor: Processor) -> str:
    """A shell script: the name it is started by is what that Python takes for its own."""
    home, python = shlex.quote(f"PYTHONHOME={root / 'usr'}"), shlex.quote(f"{root}/usr/bin/python3")
    name = shlex.quote(str(root / "python"))
    return (
        "#!/bin/sh\n"
        f"exec {shlex.join(qemu)} -L {shlex.quote(str(root))} -cpu {processor.name} "
        f'-E {home} -0 {name} {python} "$@"\n'
    )


# --- other programs -------------------------------------------------------------------------------


def program(name: str, package: str) -> str:
    """The path of an installed program.

    Raises:
        SetupError: it is not installed; the message names the package that has it.
    """
    found = shutil.which(name)
    if found is None:
        raise SetupError(f"{name} is not installed; on Debian or Ubuntu: apt-get install {package}")
    return found


def run(command: Sequence[object], failure: str) -> None:
    """Run a program.

    Raises:
        SetupError: its exit status is not 0; the message begins with `failure`.
    """
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        said = " ".join(done.stdout.split("\n")[-6:]).strip()
        raise SetupError(f"{failure}: {said}")


class Progress:
    """Lines with the seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, line: str) -> None:
        """Show a line."""
        print(f"[{time.monotonic() - self._start:4.0f} s] {line}", flush=True)


def main() -> int:
    """Make the user space; exit status 2 if that cannot be done here."""
    if len(sys.argv) != 2:
        print("usage: python -m tools.arm64.user_space FOLDER", file=sys.stderr)
        return 2
    try:
        build(Path(sys.argv[1]), Progress())
    except SetupError as error:
        print(f"test-arm64: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
