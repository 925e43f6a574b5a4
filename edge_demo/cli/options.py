"""Groups of options that several commands of `edge-demo` have."""

from __future__ import annotations

import argparse
import dataclasses

from edge_demo.errors import brief

WINDOW = 512
TOO_MANY = 10**18  # of anything


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A command's sampling defaults."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float


def positive(text: str) -> int:
    """The type of an option that is a whole number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value < TOO_MANY:
        below = f" below {TOO_MANY:,}" if value else ""
        raise argparse.ArgumentTypeError(f"{brief(text, 80)!r} is not a positive number{below}")
    return value


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """The bundle, and what `add_json` adds."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the folder that export-onnx wrote")
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--debug`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    add_debug(parser)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """`--debug`, which may stand before the command or after it."""
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback of an error",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """`--force`."""
    parser.add_argument(
        "--force", action="store_true", help="run even what seems not to fit into memory"
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """What decides how a bundle is run."""
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads for an operator (default: cores)"
    )
    add_force(parser)


def add_sampling(parser: argparse.ArgumentParser, defaults: Sampling) -> None:
    """How tokens are chosen, where an answer ends, and what is guessed ahead."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        type=positive,
        default=defaults.max_tokens,
        metavar="N",
        help="the most tokens to generate (default: %(default)s)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before TEXT, wherever it comes; may be given several times "
        "(a line break: $'\\n' in bash)",
    )
    _number(group, "--temperature T", defaults.temperature, "0 is greedy")
    _number(
        group,
        "--top-k K",
        defaults.top_k,
        "choose among the K most likely; 0 is all, which takes more time and memory",
    )
    _number(
        group,
        "--top-p P",
        defaults.top_p,
        "choose among the most likely that together have probability P",
    )
    _number(group, "--min-p P", 0.0, "choose among those at least P times as likely as the first")
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    group = parser.add_argument_group(
        "penalties", "for the last tokens of prompt and answer, as llama.cpp has them"
    )
    _number(
        group,
        "--repeat-penalty R",
        1.0,
        "divide a logit above 0 by R and multiply one below 0; 1 is none",
    )
    _number(group, "--presence-penalty P", 0.0, "take P from the logit")
    _number(group, "--frequency-penalty F", 0.0, "take F from the logit for each time")
    _number(group, "--repeat-last-n N", 64, "how many tokens that is; -1 is all, 0 none")
    guesses = parser.add_argument_group(
        "guesses", "tokens guessed ahead and run at once: answers of the same probability"
    ).add_mutually_exclusive_group()
    guesses.add_argument(
        "--lookup",
        action="store_true",
        help="look up how the text went on before: sooner where an answer repeats its prompt or "
        "itself",
    )
    guesses.add_argument(
        "--draft", metavar="BUNDLE", help="ask a smaller model with the same tokenizer"
    )


def _number(group: argparse._ArgumentGroup, name: str, default: float, text: str) -> None:
    option, metavar = name.split()
    group.add_argument(
        option,
        type=type(default),
        default=default,
        metavar=metavar,
        help=f"{text} (default: %(default)s)",
    )


def add_prompt_cache(parser: argparse.ArgumentParser, what: str) -> None:
    """`--prompt-cache` and what belongs to it.

    Args:
        parser: of the command.
        what: is kept.
    """
    parser.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help=f"keep the keys and values of {what} in FILE, and begin with those that are there",
    )
    parser.add_argument(
        "--prompt-cache-ro",
        action="store_true",
        help="use the prompt cache, and do not write it",
    )


def add_batch(parser: argparse.ArgumentParser) -> None:
    """Many prompts from a file."""
    group = parser.add_argument_group("many prompts")
    group.add_argument(
        "--batch",
        metavar="FILE",
        help='prompts, one JSON object a line: {"prompt": TEXT}, or {"messages": [{"role": '
        '"user", "content": TEXT}, …]} for a tuned model, and if wanted "id" and any option '
        'above, such as "max_tokens", "stop", "top_k" or "seed"',
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
        type=positive,
        metavar="N",
        help="how many are decoded at once: 1, 2, 4, 8, 16, 32 or 64 (default: 4)",
    )


def add_windows(parser: argparse.ArgumentParser) -> None:
    """How a text is cut to be scored."""
    parser.add_argument(
        "--length",
        type=positive,
        metavar="N",
        help=f"tokens in a window, the beginning-of-sequence token included (default: {WINDOW})",
    )
    parser.add_argument("--windows", type=positive, metavar="N", help="stop after as many windows")
