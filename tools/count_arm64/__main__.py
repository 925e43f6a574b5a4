"""`python -m tools.count_arm64 BUNDLES`: instructions per token on two emulated boards.

BUNDLES is a folder that holds those of `tools.arm64.bundles` but fp32; `make count-arm64` makes
them. llama.cpp runs the same model, which it writes in its own formats. One thread on both sides;
the greedy choice is counted with each token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from edge_demo.bundle.graph_weights import ARM, bytes_per_token
from edge_demo.bundle.reader import Bundle
from edge_demo.device.boards import BOARDS, Board
from edge_demo.errors import EdgeError
from edge_demo.units import megabytes
from gemma_keras.checkpoints.opening.sample import sample_path
from tools.arm64 import user_space
from tools.arm64.bundles import BUNDLES, check_made
from tools.arm64.user_space import PROCESSORS, ROOT, Processor, Progress, SetupError, UserSpace
from tools.count_arm64 import counts, emulator, llama
from tools.count_arm64.plan import Plan

COUNTED = tuple(bundle for bundle in BUNDLES if bundle.recipe != "fp32")


def count_bundle(
    emulated: emulator.Emulator,
    space: UserSpace,
    processor: Processor,
    bundle: Path,
    plan: Plan,
) -> dict[str, float]:
    """Instructions by name, as `Plan` names them, and `peak_bytes`, the emulator's own included.

    Raises:
        SetupError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found, names = Path(folder, "counts"), Path(folder, "names")
        words = ["-m", "tools.count_arm64.device", bundle.resolve(), names, *plan.words()]
        command, environment = emulated.python(space, processor, found, words)
        # one thread counts; what is remembered of checked files is remembered for this run
        more = {"OPENBLAS_NUM_THREADS": "1", "XDG_CACHE_HOME": folder}
        done = subprocess.run(
            command, cwd=ROOT, env={**environment, **more}, capture_output=True, text=True
        )
        if done.returncode:
            raise SetupError(f"{bundle} did not run on {processor.name}: {done.stderr[-500:]}")
        said = json.loads(names.read_text())
        by_name = counts.by_name(said["names"], counts.read_totals(found))
        return {**by_name, "peak_bytes": said["peak_bytes"]}


def count_llama(
    emulated: emulator.Emulator, processor: Processor, program: Path, gguf: Path, plan: Plan
) -> dict[str, float]:
    """The same of llama.cpp.

    Raises:
        SetupError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "counts")
        command = emulated.command(processor, found, program, gguf.resolve(), *plan.words())
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise SetupError(f"{gguf} did not run on {processor.name}: {done.stderr[-500:]}")
        lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
        names = [line[2] if len(line) == 3 else "" for line in lines if line[:1] == ["mark"]]
        (peak,) = (int(line[1]) for line in lines if line[:1] == ["peak"])
        return {**counts.by_name(names, counts.read_totals(found)), "peak_bytes": peak}


def figures(found: Mapping[str, float], plan: Plan) -> dict[str, float]:
    """Millions of instructions: a token, a prompt token, and thousands for a position of context.

    Our engine runs the last token of a prompt alone, so that is left out of a prompt's share.
    """
    shallow, deep = (found[plan.token_name(depth)] for depth in (plan.shallow, plan.depth))
    longest = max(plan.prompts)
    return {
        "token": shallow / 1e6,
        "prompt": (found[plan.prompt_name(longest)] - shallow) / (longest - 1) / 1e6,
        "position": (deep - shallow) / (plan.depth - plan.shallow) / 1e3,
        "peak": found["peak_bytes"],
    }


def bound(board: Board, read: int, instructions: float) -> float:
    """The most tokens a second: what memory and what the cores allow, whichever is less."""
    return min(board.bytes_per_s / read, board.instructions_per_s / instructions)


def row(name: str, read: int, processor: Processor, found: Mapping[str, float]) -> str:
    """A line of the table."""
    own = [board for board in BOARDS if board.dot_products == processor.dot_product]
    bounds = ", ".join(f"{b.name} {bound(b, read, found['token'] * 1e6):.0f}" for b in own)
    return (
        f"| {name} | {processor.name} | {read / 1e6:.0f} | {found['token']:.0f} | "
        f"{found['prompt']:.1f} | {found['position']:.0f} | {megabytes(int(found['peak']))} | "
        f"{bounds} |"
    )


HEAD = (
    "| format | processor | MB a token | M instructions a token | a prompt token | k a position | "
    "peak memory | tokens/s at most |\n|---|---|--:|--:|--:|--:|--:|---|"
)


def main() -> int:
    """Build what is needed and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.count_arm64", description=__doc__)
    parser.add_argument("bundles", type=Path, help="the folder that holds the bundles")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "count-arm64")
    parser.add_argument("--processor", choices=[p.name for p in PROCESSORS], action="append")
    folders = [bundle.folder for bundle in COUNTED]
    parser.add_argument("--bundle", choices=folders, action="append", help="default: all")
    parser.add_argument("--no-llama", action="store_true", help="count our side only")
    arguments = parser.parse_args()
    say, plan = Progress(), Plan()
    processors = [p for p in PROCESSORS if p.name in (arguments.processor or [p.name])]
    wanted = tuple(b for b in COUNTED if b.folder in (arguments.bundle or folders))
    rows = []
    try:
        check_made(arguments.bundles, "count-arm64", wanted)
        emulated = emulator.build(arguments.folder, say)
        space = user_space.build(ROOT / "build" / "arm64", say, emulated.qemu)
        for counted in wanted:
            bundle = arguments.bundles / counted.folder
            opened = Bundle.open(bundle)
            graph = opened.candidates or opened.engine
            read = bytes_per_token(bundle / graph.file, ARM[0])
            for processor in filter(counted.suits, processors):
                say(f"{counted.recipe} on {processor.name} (minutes)")
                found = count_bundle(emulated, space, processor, bundle, plan)
                rows.append(row(counted.recipe, read, processor, figures(found, plan)))
        if not arguments.no_llama:
            rows += _count_ggufs(arguments.folder, emulated, processors, plan, say)
    except (SetupError, EdgeError) as error:
        print(f"count-arm64: {error}", file=sys.stderr)
        return 2
    print(HEAD, *rows, "", *map(str, BOARDS), sep="\n")
    return 0


def _count_ggufs(
    folder: Path,
    emulated: emulator.Emulator,
    processors: list[Processor],
    plan: Plan,
    say: Callable[[str], None],
) -> list[str]:
    programs = llama.build(folder / "llama", say)
    newest = next(processor for processor in PROCESSORS if processor.dot_product)
    words = [*emulated.qemu, "-cpu", newest.name, programs[newest.name]]
    ggufs = llama.formats_of(sample_path(), folder / "llama", words, say)
    rows = []
    for name, gguf in ggufs.items():
        for processor in processors:
            say(f"llama.cpp's {name} on {processor.name} (minutes)")
            found = count_llama(emulated, processor, programs[processor.name], gguf, plan)
            read, counted = os.path.getsize(gguf), figures(found, plan)
            rows.append(row(f"llama.cpp {name}", read, processor, counted))
    return rows


if __name__ == "__main__":
    sys.exit(main())
