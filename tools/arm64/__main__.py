"""`python -m tools.arm64 BUNDLES`: the device's side, on the processors of two boards, emulated.

BUNDLES is a folder that holds `tiny-bundles` and those of `tools.arm64.bundles`, made here; `make
test-arm64` makes them. `--part command`, a minute of it, needs the first only: what the
processors have, and the command on a small bundle. The exit status is 1 if anything failed, 2 if
nothing can run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edge_demo.units import megabytes
from tools.arm64 import agree, instructions, serve
from tools.arm64.bundles import BUNDLES, BoardBundle, check_made
from tools.arm64.observe import Observation
from tools.arm64.user_space import (
    PROCESSORS,
    ROOT,
    Processor,
    Progress,
    SetupError,
    UserSpace,
    build,
)

PARTS = ("command", "server", "sample", "tests")
# They start a process for nearly every test, which takes minutes there; `check_command` starts one.
_LEFT_OUT = ("test_commands.py", "test_terminal.py")
_ONLY_WHERE_EXPORTED = ("keras", "tensorflow", "jax", "torch", "onnx", "gemma_keras", "export")


class Checks:
    """Keeps what failed and shows everything.

    Args:
        say: shown a line for each check.

    Attributes:
        failures: the lines of those that failed.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.failures: list[str] = []

    def __call__(self, good: bool, line: str) -> None:
        """One check."""
        self._say(f"{'ok  ' if good else 'FAIL'}  {line}")
        if not good:
            self.failures.append(line)


def check_instructions(space: UserSpace, processor: Processor, check: Checks) -> None:
    """The emulated processor has what the real one has, and no more."""
    for name in instructions.INSTRUCTIONS:
        command = [space.python(processor), "-m", "tools.arm64.instructions", name]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | space.environment(), capture_output=True
        )
        lacks = name in instructions.NEWER and not processor.dot_product
        check(
            done.returncode == (-signal.SIGILL if lacks else 0),
            f"{processor.name}: {name} {'is refused' if done.returncode else 'runs'}",
        )


def check_command(space: UserSpace, processor: Processor, bundles: Path, check: Checks) -> None:
    """`edge-demo generate` as a user starts it, its restart with huge pages included."""
    command = ["-m", "edge_demo.cli.main", "generate", bundles / "tiny-bundles" / "gemma3-fp32"]
    command += ["--prompt", "The boat went down the river", "--max-tokens", "12", "--json"]
    reports = []
    for python, more in ((sys.executable, {}), (space.python(processor), space.environment())):
        done = subprocess.run(
            [python, *command], cwd=ROOT, env=os.environ | more, capture_output=True, text=True
        )
        if done.returncode or done.stderr:
            check(False, f"{processor.name}: edge-demo generate says {done.stderr.strip()!r}")
            return
        reports.append(json.loads(done.stdout))
    same = all(reports[0][key] == reports[1][key] for key in ("prompt_ids", "ids", "text"))
    check(same, f"{processor.name}: edge-demo generate says what it says here")


def check_server(space: UserSpace, processor: Processor, bundles: Path, check: Checks) -> None:
    """`edge-demo serve` answers as it does here."""
    bundle = bundles / "tiny-bundles" / "long-chat"
    try:
        here = serve.answers(Path(sys.executable), {}, bundle)
        there = serve.answers(space.python(processor), space.environment(server=True), bundle)
    except serve.ServerError as error:
        check(False, f"{processor.name}: edge-demo serve: {error}")
        return
    for name, answer in here.items():
        check(there[name] == answer, f"{processor.name}: edge-demo serve gives {name} as here")


def check_tests(
    space: UserSpace, processor: Processor, bundles: Path, tests: list[str], check: Checks
) -> None:
    """The tests of `edge_demo`, there, on bundles made here; lines begin with the processor."""
    command = [space.python(processor), "-m", "pytest", "-v", "-m", "not sample and not limits"]
    command += ["-p", "no:cacheprovider", *tests]
    command += [f"--ignore=tests/edge_demo/{name}" for name in _LEFT_OUT]
    handed_over = {"GEMMA_TEST_BUNDLES": str(bundles), "GEMMA_TEST_PART": "device"}
    environment = os.environ | space.environment(tests=True) | handed_over
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        shown = None
        for line in running.stdout or ():
            passed = re.search(r" PASSED +\[ *(\d+)%\]$", line)
            if passed is None or passed[1] != shown:  # of the many that pass one for each percent
                print(f"{processor.name}  {line}", end="", flush=True)
                shown = passed[1] if passed else shown
    check(running.returncode == 0, f"{processor.name}: {' '.join(tests)}")


def check_sample(
    space: UserSpace,
    processors: Iterable[Processor],
    bundles: Path,
    wanted: tuple[BoardBundle, ...],
    options: list[str],
    say: Callable[[str], None],
    check: Checks,
) -> None:
    """The real bundles: what is computed here and there, side by side."""
    with tempfile.TemporaryDirectory(dir=space.folder) as folder:

        def observe(
            name: str, python: Path, bundle: str, more: dict[str, str]
        ) -> Observation | None:
            say(f"{name}: running {bundle}")
            place = Path(folder, f"{name}-{bundle}")
            command = [python, "-m", "tools.arm64.observe", bundles / bundle, place]
            # what is remembered of checked files is remembered for this run only
            environment = os.environ | {"XDG_CACHE_HOME": folder} | more
            done = subprocess.run([*command, *options], cwd=ROOT, env=environment)
            if done.returncode:
                check(False, f"{name}: {bundle} ended with status {done.returncode}")
                return None
            return Observation.read(place)

        observed = dict.fromkeys((BUNDLES[0], *wanted))  # what is lost is measured from float32
        here = {b: observe("here", Path(sys.executable), b.folder, {}) for b in observed}
        for processor in processors:
            for bundle in filter(lambda b: b.suits(processor), wanted):
                ours = here[bundle]
                theirs = observe(
                    processor.name, space.python(processor), bundle.folder, space.environment()
                )
                if ours is not None and theirs is not None:
                    _judge(processor, bundle, ours, theirs, here[BUNDLES[0]], check)


def _judge(
    processor: Processor,
    bundle: BoardBundle,
    here: Observation,
    there: Observation,
    exact: Observation | None,
    check: Checks,
) -> None:
    name = f"{processor.name}, {bundle.recipe}"
    found = agree.compare(here, there)
    clear = sum(margin > 2 * found.noise for row in here.margins for margin in row)
    parting = "".join(
        f"; answer {answer} parts at token {token}, margin {margin:.3f}"
        for answer, token, margin in found.partings
    )
    check(
        not bundle.exact or not found.clear_partings,
        f"{name}: {found.same} of {found.tokens} greedy tokens as here{parting}; {clear} are "
        "clearer than twice the noise",
    )
    line = (
        f"{name}: greatest logit difference {found.noise:.2g}, mean KL {found.kl:.2g} nats, "
        f"same top token {found.same_top_token:.1%}, over {len(here.logits)} positions"
    )
    if exact is not None and exact is not here:
        rounding = agree.mean_kl(exact, here), agree.mean_kl(exact, there)
        line += f"; against fp32: {rounding[0]:.2g} here, {rounding[1]:.2g} there"
    check(found.kl <= bundle.most_kl, line)
    strangers = sorted(set(there.modules) & set(_ONLY_WHERE_EXPORTED))
    check(not strangers, f"{name}: imports nothing of an export {strangers or ''}".rstrip())
    check(
        there.machine == "aarch64" and there.onnxruntime == here.onnxruntime,
        f"{name}: {there.machine}, onnxruntime {there.onnxruntime}; peak memory "
        f"{megabytes(there.generate_bytes)}, the emulator's own included (here "
        f"{megabytes(here.generate_bytes)})",
    )


def main() -> int:
    """Build the user space and run everything."""
    parser = argparse.ArgumentParser(prog="python -m tools.arm64", description=__doc__)
    parser.add_argument("bundles", type=Path, help="the folder that holds the bundles")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "arm64", help="user space")
    names = [processor.name for processor in PROCESSORS]
    parser.add_argument("--processor", choices=names, action="append", help="default: all")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    folders = [bundle.folder for bundle in BUNDLES]
    parser.add_argument("--bundle", choices=folders, action="append", help="default: all")
    parser.add_argument(
        "--tests", nargs="+", default=["tests/edge_demo"], metavar="PATH", help="of them, these"
    )
    parser.add_argument("--max-tokens", type=int, default=16, help="of each greedy answer")
    parser.add_argument("--positions", type=int, default=64, help="of the text compared")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    say = Progress()
    check = Checks(say)
    processors = [p for p in PROCESSORS if p.name in (arguments.processor or names)]
    parts = arguments.part or PARTS
    bundles = arguments.bundles.resolve()
    wanted = tuple(b for b in BUNDLES if b.folder in (arguments.bundle or folders))
    try:
        if "sample" in parts:
            check_made(bundles, "test-arm64", wanted)
        if {"command", "server", "tests"} & set(parts) and not (bundles / "tiny-bundles").exists():
            raise SetupError(f"{bundles} holds no tiny-bundles; make test-arm64 makes them")
        space = build(arguments.folder, say)
    except SetupError as error:
        print(f"test-arm64: {error}", file=sys.stderr)
        return 2
    if "command" in parts:
        for processor in processors:
            check_instructions(space, processor, check)
            check_command(space, processor, bundles, check)
    if "server" in parts:
        for processor in processors:
            check_server(space, processor, bundles, check)
    if "sample" in parts:
        options = ["--max-tokens", str(arguments.max_tokens)]
        options += ["--positions", str(arguments.positions), "--threads", str(arguments.threads)]
        check_sample(space, processors, bundles, wanted, options, say, check)
    if "tests" in parts:
        say("the tests of edge_demo, on all processors at once (over an hour)")

        def run_tests(processor: Processor) -> None:
            check_tests(space, processor, bundles, arguments.tests, check)

        with ThreadPoolExecutor() as pool:  # a test uses one core
            list(pool.map(run_tests, processors))
    for line in check.failures:
        print(f"test-arm64: failed: {line}", file=sys.stderr)
    say("failed" if check.failures else f"all is well on {', '.join(p.board for p in processors)}")
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())
