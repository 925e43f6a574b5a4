"""`edge-demo`: generate, chat, bench, score, compare and inspect a bundle, or look at the device.

Nothing heavy is imported before it is known that it will be used, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from edge_demo import bench_command, chat_command, commands, generate_command, huge_pages, options
from edge_demo.errors import EdgeError, RequestError, brief, sentence
from edge_demo.terminal import complain


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit status 0, 1 for a failure, 2 for a bad request, 130 for Ctrl-C."""
    _prepare_streams()
    arguments = _parser().parse_args(argv)
    try:
        if argv is None and huge_pages.of_use() and _runs_well_in_huge_pages(arguments):
            huge_pages.restart_with_huge_pages()
        _heed_force(arguments)
        run: Callable[[argparse.Namespace], int] = arguments.run
        status = run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return commands.INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        _drop_unwritten()
        return 1
    except Exception as error:
        if getattr(arguments, "debug", False):
            traceback.print_exc()
        complain(_sentence(error))
        if not isinstance(error, EdgeError):
            _drop_unwritten()
        return 2 if isinstance(error, RequestError) else 1


def _sentence(error: Exception) -> str:
    """Why a command ends."""
    if isinstance(error, MemoryError):
        return str(error) or "out of memory"
    if isinstance(error, (EdgeError, OSError)) and sentence(error):
        return sentence(error)
    from edge_demo.unexpected import PACKAGES, unexpected

    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        return f"{error.name} is not installed; run: pip install gemma-keras"
    return unexpected(error)


def _runs_well_in_huge_pages(arguments: argparse.Namespace) -> bool:
    """Whether the command reads much memory, and there is enough of it for whole huge pages."""
    if arguments.run is commands.run_inspect:
        return False
    if arguments.run is _run_doctor:  # measures what the others have
        return True
    from edge_demo.memory import is_short

    return not is_short(arguments.bundle)


def _heed_force(arguments: argparse.Namespace) -> None:
    if getattr(arguments, "force", False):
        from edge_demo.memory import FORCE

        os.environ[FORCE] = "1"


def _run_doctor(arguments: argparse.Namespace) -> int:
    from edge_demo.doctor import run

    return run(arguments)


def _prepare_streams() -> None:
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started us has closed it
            setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def _drop_unwritten() -> None:
    """Forget output that cannot be written, which Python would try again, and complain, at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {brief(message)}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """Looks the versions up when they are asked for, and not before."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        found = []
        for name in ("gemma-keras", "onnxruntime"):
            try:
                found.append(version(name))
            except PackageNotFoundError:
                found.append("of unknown version")
        print(f"edge-demo {found[0]} (onnxruntime {found[1]}, Python {platform.python_version()})")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="edge-demo", description="Run a Gemma bundle on this device, with onnxruntime."
    )

    def debug_option(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,  # may stand before the command or after it
            help="show the traceback of an error",
        )

    debug_option(parser)
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show the version and what it runs on"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *before: tuple[str, str]
    ):
        sub = subparsers.add_parser(name, help=text, description=text)
        for argument, what in before:
            sub.add_argument(argument, metavar=argument.upper(), help=what)
        sub.add_argument("bundle", metavar="BUNDLE", help="the folder that export-onnx wrote")
        sub.add_argument("--json", action="store_true", help="print one JSON object, for programs")
        debug_option(sub)
        sub.set_defaults(run=run)
        return sub

    sub = command("generate", generate_command.run, "Continue a prompt.")
    sub.add_argument(
        "-p", "--prompt", metavar="TEXT", help="what to continue (default: read stdin)"
    )
    options.add_engine(sub)
    options.add_sampling(sub, options.Sampling(128, 0.0, 0, 1.0))
    options.add_prompt_cache(sub, "the prompt")
    options.add_batch(sub)

    sub = command(
        "chat", chat_command.run, "Talk in turns, or, with a base model, continue text in turns."
    )
    chat_command.add_options(sub)
    options.add_engine(sub)
    options.add_sampling(sub, options.Sampling(512, 1.0, 64, 0.95))
    options.add_prompt_cache(sub, "the --system text, or of the first message without one,")

    sub = command(
        "bench", bench_command.run, "Measure prefill, decode, load time and memory, in a table."
    )
    bench_command.add_options(sub)
    options.add_force(sub)

    sub = command(
        "score", commands.run_score, "Perplexity of a text, by windows, or accuracy on HellaSwag."
    )
    options.add_engine(sub)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="UTF-8 text")
    what.add_argument(
        "--hellaswag", metavar="FILE", help="HellaSwag tasks as text, six lines a task"
    )
    options.add_windows(sub)
    sub.add_argument(
        "--stride",
        type=options.positive,
        metavar="N",
        help="tokens from one window to the next (default: half the length)",
    )
    sub.add_argument(
        "--tasks", type=options.positive, metavar="N", help="stop after as many HellaSwag tasks"
    )

    sub = command(
        "compare",
        commands.run_compare,
        "How far a bundle's predictions are from a reference's: KL divergence, perplexities.",
        ("reference", "the bundle to compare with, usually exported as fp32"),
    )
    options.add_engine(sub)
    sub.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    options.add_windows(sub)

    sub = command("inspect", commands.run_inspect, "Show what a bundle holds.")
    sub.add_argument("--verify", action="store_true", help="compare every file with its SHA-256")

    text = "What this device is, what fits on it, and how fast that may be."
    sub = subparsers.add_parser("doctor", help=text, description=text)
    sub.add_argument("bundles", metavar="BUNDLE", nargs="*", help="bundles to judge too")
    sub.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    debug_option(sub)
    sub.set_defaults(run=_run_doctor)
    return parser


if __name__ == "__main__":
    sys.exit(main())
