"""The options of `serve` and `chat` that put a guard beside a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from edge_demo.cli import options
from edge_demo.errors import RequestError

if TYPE_CHECKING:
    from edge_demo.bundle.reader import Bundle
    from edge_demo.guard.decisions import Guard
    from edge_demo.guard.judge import Judge

_EVERY = 64
_CACHE_MB = 64  # of keys and values of texts that are judged in turns


def add_thresholds(group: argparse._ArgumentGroup) -> None:
    """Adds `--guard-policy` and `--guard-threshold`."""
    group.add_argument(
        "--guard-policy",
        action="append",
        metavar="POLICY",
        help="dangerous, harassment, hate or sexual; can be given several times (default: all)",
    )
    group.add_argument(
        "--guard-threshold",
        action="append",
        default=[],
        metavar="P",
        help="probability from which on a text violates a policy, as 0.4, or as hate=0.4 for one "
        "policy; can be given several times (default: 0.5)",
    )


def add_guard(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a guard."""
    group = parser.add_argument_group(
        "guard", "have another model judge messages and answers, as ShieldGemma does"
    )
    group.add_argument("--guard", metavar="BUNDLE", help="bundle of the guard")
    group.add_argument(
        "--guard-on",
        choices=("input", "output", "both"),
        default="both",
        help="what is judged: the user's last message, the answer, or both (default: %(default)s)",
    )
    add_thresholds(group)
    group.add_argument(
        "--guard-every",
        type=options.positive,
        default=_EVERY,
        metavar="N",
        help="tokens of an answer that are held back until they are judged (default: %(default)s)",
    )
    group.add_argument(
        "--guard-log",
        metavar="FILE",
        help="add a JSON line to FILE for each decision, without the text",
    )
    group.add_argument(
        "--guard-log-text", action="store_true", help="put the text into the lines of --guard-log"
    )


def check_guard(arguments: argparse.Namespace) -> None:
    """Refuse options that are not valid, before anything is loaded.

    Raises:
        RequestError: a threshold or a policy is wrong, or an option has no effect.
    """
    from edge_demo.guard.decisions import read_thresholds

    read_thresholds(arguments.guard_threshold, arguments.guard_policy)
    if arguments.guard_log_text and arguments.guard_log is None:
        raise RequestError("--guard-log-text is only valid with --guard-log")
    for name in ("guard_log", "guard_policy", "guard_threshold"):
        if arguments.guard is None and getattr(arguments, name):
            raise RequestError(f"--{name.replace('_', '-')} is only valid with --guard")


def open_judge(
    arguments: argparse.Namespace, bundle: Bundle, cache_bytes: int = 0
) -> tuple[Judge, dict[str, float]]:
    """A judge for the policies of the options, and their thresholds.

    Args:
        arguments: of the command.
        bundle: of the guard.
        cache_bytes: as of `Judge`.

    Raises:
        BundleError: the bundle cannot be a guard, or as `Engine`.
        EdgeError: there is not enough memory.
    """
    from edge_demo.cli.answering import open_tokenizer
    from edge_demo.engine.runner import Engine
    from edge_demo.guard.decisions import policies_of, read_thresholds
    from edge_demo.guard.judge import Judge

    thresholds = read_thresholds(arguments.guard_threshold, arguments.guard_policy)
    tokenizer = open_tokenizer(bundle)
    engine = Engine(bundle, arguments.threads, force=arguments.force)
    return Judge(engine, tokenizer, policies_of(thresholds), cache_bytes), thresholds


def open_guard(arguments: argparse.Namespace, bundle: Bundle, several: bool = False) -> Guard:
    """The guard of the options; errors as `open_judge` and `DecisionLog`.

    Args:
        arguments: of the command.
        bundle: of the guard.
        several: whether it judges several answers in turns.
    """
    from edge_demo.guard.decisions import Guard
    from edge_demo.guard.log import DecisionLog

    log = None
    if arguments.guard_log is not None:
        log = DecisionLog(arguments.guard_log, arguments.guard_log_text)
    judge, thresholds = open_judge(arguments, bundle, _CACHE_MB * 10**6 if several else 0)
    return Guard(judge, thresholds, log)
