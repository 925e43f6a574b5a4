"""`edge-demo`: generate, chat, bench, score, compare and inspect a bundle, or look at the device.

Nothing heavy is imported before it is known that it will be used, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from edge_demo import bench_command, commands, huge_pages
from edge_demo.errors import EdgeError, RequestError
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
    if isinstance(error, (EdgeError, OSError)) and str(error):
        return str(error)
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
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


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

    def engine_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--threads",
            type=_positive,
            metavar="N",
            help="threads for an operator (default: cores)",
        )
        force_option(sub)

    def force_option(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--force", action="store_true", help="run even what seems not to fit into memory"
        )

    def sampling_options(sub: argparse.ArgumentParser, defaults: Sampling) -> None:
        group = sub.add_argument_group("sampling")
        group.add_argument(
            "--max-tokens",
            type=_positive,
            default=defaults.max_tokens,
            metavar="N",
            help="the most tokens to generate (default: %(default)s)",
        )
        group.add_argument(
            "--temperature",
            type=float,
            default=defaults.temperature,
            metavar="T",
            help="0 is greedy (default: %(default)s)",
        )
        group.add_argument(
            "--top-k",
            type=int,
            default=defaults.top_k,
            metavar="K",
            help="choose among the K most likely; 0 is all (default: %(default)s)",
        )
        group.add_argument(
            "--top-p",
            type=float,
            default=defaults.top_p,
            metavar="P",
            help="choose among the most likely that together have probability P "
            "(default: %(default)s)",
        )
        group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
        guesses = sub.add_argument_group(
            "guesses", "tokens guessed ahead and run at once: answers of the same probability"
        ).add_mutually_exclusive_group()
        guesses.add_argument(
            "--lookup",
            action="store_true",
            help="look up how the text went on before: sooner where an answer repeats its prompt "
            "or itself",
        )
        guesses.add_argument(
            "--draft", metavar="BUNDLE", help="ask a smaller model with the same tokenizer"
        )

    def prompt_cache_options(sub: argparse.ArgumentParser, what: str) -> None:
        sub.add_argument(
            "--prompt-cache",
            metavar="FILE",
            help=f"keep the keys and values of {what} in FILE, and begin with those that are there",
        )
        sub.add_argument(
            "--prompt-cache-ro",
            action="store_true",
            help="use the prompt cache, and do not write it",
        )

    sub = command("generate", commands.run_generate, "Continue a prompt.")
    sub.add_argument("--prompt", metavar="TEXT", help="what to continue (default: read stdin)")
    engine_options(sub)
    sampling_options(sub, Sampling(128, 0.0, 0, 1.0))
    prompt_cache_options(sub, "the prompt")
    group = sub.add_argument_group("many prompts")
    group.add_argument(
        "--batch",
        metavar="FILE",
        help='prompts, one JSON object a line: {"prompt": TEXT}, and if wanted "id", "max_tokens", '
        '"temperature", "top_k", "top_p", "seed"',
    )
    group.add_argument(
        "--out",
        metavar="FILE",
        help="where their answers go, one JSON object a line, in the same order; the same command "
        "again goes on after those that are there",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="begin anew, whatever --out has already"
    )
    group.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="how many are decoded at once: 1, 2, 4, 8, 16, 32 or 64 (default: 4)",
    )

    sub = command(
        "chat", commands.run_chat, "Talk in turns, or, with a base model, continue text in turns."
    )
    sub.add_argument(
        "--system",
        metavar="TEXT",
        default="",
        help="what an instruction-tuned model is told before the first message",
    )
    engine_options(sub)
    sampling_options(sub, Sampling(512, 1.0, 64, 0.95))
    prompt_cache_options(sub, "the --system text, or of the first message without one,")

    sub = command(
        "bench", bench_command.run, "Measure prefill, decode, load time and memory, in a table."
    )
    bench_command.add_options(sub)
    force_option(sub)

    def window_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--length",
            type=_positive,
            metavar="N",
            help="tokens in a window, the beginning-of-sequence token included (default: "
            f"{commands.WINDOW})",
        )
        sub.add_argument(
            "--windows", type=_positive, metavar="N", help="stop after as many windows"
        )

    sub = command(
        "score", commands.run_score, "Perplexity of a text, by windows, or accuracy on HellaSwag."
    )
    engine_options(sub)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="UTF-8 text")
    what.add_argument(
        "--hellaswag", metavar="FILE", help="HellaSwag tasks as text, six lines a task"
    )
    window_options(sub)
    sub.add_argument(
        "--stride",
        type=_positive,
        metavar="N",
        help="tokens from one window to the next (default: half the length)",
    )
    sub.add_argument(
        "--tasks", type=_positive, metavar="N", help="stop after as many HellaSwag tasks"
    )

    sub = command(
        "compare",
        commands.run_compare,
        "How far a bundle's predictions are from a reference's: KL divergence, perplexities.",
        ("reference", "the bundle to compare with, usually exported as fp32"),
    )
    engine_options(sub)
    sub.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    window_options(sub)

    sub = command("inspect", commands.run_inspect, "Show what a bundle holds.")
    sub.add_argument("--verify", action="store_true", help="compare every file with its SHA-256")

    text = "What this device is, what fits on it, and how fast that may be."
    sub = subparsers.add_parser("doctor", help=text, description=text)
    sub.add_argument("bundles", metavar="BUNDLE", nargs="*", help="bundles to judge too")
    sub.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    debug_option(sub)
    sub.set_defaults(run=_run_doctor)
    return parser


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A command's sampling defaults."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
