"""`edge-demo`: generate, chat, embed, serve, measure or inspect a bundle, check the device.

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

from edge_demo.argument_parser import ArgumentParser
from edge_demo.cli import (
    bench,
    chat,
    compare,
    doctor,
    embed,
    generate,
    guard_eval,
    inspect,
    install_service,
    options,
    score,
    serve,
)
from edge_demo.cli.terminal import complain
from edge_demo.device import huge_pages
from edge_demo.errors import INTERRUPTED, EdgeError, RequestError, sentence

# A file each: `TEXT` says what it does, `add_options` what it takes, `run` returns the exit status.
_COMMANDS = (
    *(generate, chat, embed, serve, bench, score, compare, guard_eval),
    *(inspect, doctor, install_service),
)

# Packages that single commands need, and the extras that bring them.
_OF_EXTRAS = {"starlette": "serve", "uvicorn": "serve", "llguidance": "grammar"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit status 0, 1 for a failure, 2 for a bad request, 130 for Ctrl-C."""
    _prepare_streams()
    arguments = _parser().parse_args(argv)
    try:
        if argv is None and huge_pages.of_use() and _runs_well_in_huge_pages(arguments):
            huge_pages.restart_with_huge_pages()
        run: Callable[[argparse.Namespace], int] = arguments.run
        status = run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
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
    if isinstance(error, ModuleNotFoundError) and error.name in _OF_EXTRAS:
        extra = _OF_EXTRAS[error.name]
        return f"{error.name} is not installed; run: pip install 'gemma-keras[{extra}]'"
    return unexpected(error)


def _runs_well_in_huge_pages(arguments: argparse.Namespace) -> bool:
    """Whether the command reads much memory, and there is enough of it for whole huge pages."""
    if arguments.command in ("inspect", "install-service"):
        return False
    if arguments.command == "doctor":  # measures what the others have
        return True
    from edge_demo.engine.memory import is_short

    return not is_short(arguments.bundle)


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
    parser = ArgumentParser(
        prog="edge-demo", description="Run a Gemma bundle on this device, with onnxruntime."
    )

    options.add_debug(parser)
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        help="show the versions of edge-demo, onnxruntime and Python",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for command in _COMMANDS:
        name = command.__name__.rpartition(".")[2].replace("_", "-")
        sub = subparsers.add_parser(name, help=command.TEXT, description=command.TEXT)
        command.add_options(sub)
        sub.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
