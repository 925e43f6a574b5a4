"""llama.cpp for the boards' processors, cross-compiled from llama-cpp-python's source."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools.arm64.user_space import PROCESSORS, Processor, make, program, run

VERSION = "0.3.36"  # of llama-cpp-python
_RUN = Path(__file__).with_name("llama_run.cpp")
_CC, _CXX = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"
_OFF = (
    "BUILD_SHARED_LIBS", "GGML_NATIVE", "GGML_OPENMP", "LLAMA_CURL", "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_COMMON",
)  # fmt: skip
_GGML = ("ggml", "ggml-cpu", "ggml-base")
FORMATS = {"Q4_0": 2, "Q8_0": 7}  # `enum llama_ftype` of llama.h


def architecture(processor: Processor) -> str:
    """What a compiler may use, as `-march` takes it."""
    return "armv8.2-a+fp16+dotprod" if processor.dot_product else "armv8-a"


def build(folder: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """Make what is not there yet: a static program for each processor.

    Args:
        folder: to make it in.
        say: shown a line before each step that takes seconds.

    Returns:
        The processor's name to its program.

    Raises:
        SetupError: a program is missing, a download failed, or a source did not compile.
    """
    compiler = program(_CXX, "g++-aarch64-linux-gnu")
    source, programs = folder.resolve() / "source", folder.resolve() / "programs"
    make(source, (VERSION,), lambda new: _fetch(new, say))
    (top,) = source.glob("llama_cpp_python-*/vendor/llama.cpp")
    architectures = {processor.name: architecture(processor) for processor in PROCESSORS}
    made_from = (VERSION, *architectures.values(), _RUN.read_text())
    make(programs, made_from, lambda new: _compile(new, top, compiler, architectures, say))
    return {name: programs / name for name in architectures}


def formats_of(
    sample: Path, folder: Path, words: Sequence[object], say: Callable[[str], None]
) -> dict[str, Path]:
    """The sample's file and what llama.cpp makes of it, made where it is not there yet.

    Args:
        sample: a GGUF file in Q4_K_M.
        folder: to make the others in.
        words: that start a program of `build`, which the emulator may run.
        say: shown a line before each step that takes seconds.

    Returns:
        The name of a format to its file.

    Raises:
        SetupError: llama.cpp could not write a format.
    """
    files = {"Q4_K_M": sample}
    for name, number in FORMATS.items():
        made_from = (VERSION, str(sample.stat().st_size))

        def quantize(new: Path, name: str = name, number: int = number) -> None:
            say(f"writing the sample in {name} (minutes)")
            new.mkdir(parents=True, exist_ok=True)
            out = new / f"{name}.gguf"
            run([*words, sample, number, out], f"llama.cpp could not write {name}")

        make(folder.resolve() / name, made_from, quantize)
        files[name] = folder.resolve() / name / f"{name}.gguf"
    return files


def _compile(
    new: Path,
    top: Path,
    compiler: str,
    architectures: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Only ggml is compiled for an architecture; the rest is the same for all of them."""
    cmake, ninja = program("cmake", "cmake"), program("ninja", "ninja-build")
    options = [f"-D{option}=OFF" for option in _OFF]
    options += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    options += [f"-DCMAKE_C_COMPILER={_CC}", f"-DCMAKE_CXX_COMPILER={_CXX}"]
    options += ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    llama = None
    for name, march in architectures.items():
        say(f"compiling {'ggml' if llama else 'llama.cpp'} for {march} (minutes)")
        built = new / f"{name}.build"
        own = f"-DGGML_CPU_ARM_ARCH={march}"
        run([cmake, "-S", top, "-B", built, *options, own], "cmake failed")
        target = "ggml" if llama else "llama"
        run([ninja, "-C", built, f"-j{os.cpu_count() or 1}", target], f"{target} did not compile")
        llama = llama or built / "src" / "libllama.a"
        ggml = [built / "ggml" / "src" / f"lib{part}.a" for part in _GGML]
        group = ["-Wl,--start-group", llama, *ggml, "-Wl,--end-group", "-lpthread", "-ldl", "-lm"]
        flags = ["-O2", "-std=c++17", "-static", "-I", top / "include", "-I", top / "ggml/include"]
        run([compiler, *flags, _RUN, *group, "-o", new / name], f"{_RUN.name} did not compile")
    for name in architectures:
        shutil.rmtree(new / f"{name}.build")


def _fetch(new: Path, say: Callable[[str], None]) -> None:
    say(f"fetching llama.cpp's source: llama-cpp-python {VERSION} (70 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--no-binary=llama-cpp-python", f"llama-cpp-python=={VERSION}", "--dest", new]
    run(command, "pip could not fetch llama-cpp-python")
    (archive,) = new.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(new, filter="data")
    archive.unlink()
