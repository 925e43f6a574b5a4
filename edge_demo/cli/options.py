"""Option groups that several commands of `edge-demo` share."""

from __future__ import annotations

import argparse
import dataclasses

from edge_demo.errors import brief
from edge_demo.text.ranges import RANGES, range_text

WINDOW = 512
TOO_MANY = 10**18  # for any option


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A command's sampling defaults."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float


def positive(text: str) -> int:
    """The argparse type of an option that is a whole number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value < TOO_MANY:
        below = f" below {TOO_MANY:,}" if value > 0 else ""
        raise argparse.ArgumentTypeError(
            f"{brief(text, 80)!r} is not a positive whole number{below}"
        )
    return value


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Adds the bundle and the options of `add_json`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the folder that export-onnx wrote")
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json` and `--debug`."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    add_debug(parser)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Adds `--debug`, which is valid before or after the command."""
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback of an error",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """`--force`."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="run the bundle even if it does not seem to fit into memory",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Adds the options that decide how a bundle is run."""
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="number of threads per operator (default: physical cores)",
    )
    add_force(parser)


def add_sampling(parser: argparse.ArgumentParser, defaults: Sampling) -> None:
    """Adds the options for sampling, stop texts and speculative decoding."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        type=positive,
        default=defaults.max_tokens,
        metavar="N",
        help="maximum number of tokens to generate (default: %(default)s)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop the answer before TEXT; can be given several times (in bash a line break is "
        "$'\\n')",
    )
    _number(group, "--temperature T", defaults.temperature, "0 means greedy decoding")
    _number(
        group,
        "--top-k K",
        defaults.top_k,
        "sample from the K most likely tokens; 0 means all tokens, which takes more time "
        "and memory",
    )
    _number(
        group,
        "--top-p P",
        defaults.top_p,
        "sample from the most likely tokens whose probabilities sum to P",
    )
    _number(
        group,
        "--min-p P",
        0.0,
        "sample from tokens at least P times as likely as the most likely one",
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="random seed; the same seed gives the same text"
    )
    group = parser.add_argument_group(
        "penalties", "lower the logits of the last tokens of prompt and answer, as in llama.cpp"
    )
    _number(
        group,
        "--repeat-penalty R",
        1.0,
        "divide positive logits by R and multiply negative logits by R; 1 means no penalty",
    )
    _number(group, "--presence-penalty P", 0.0, "subtract P from the logit of a token that occurs")
    _number(
        group,
        "--frequency-penalty F",
        0.0,
        "subtract F from the logit for each occurrence of the token",
    )
    _number(
        group,
        "--repeat-last-n N",
        64,
        "number of last tokens that are penalized; -1 means all, 0 means none",
    )
    guesses = parser.add_argument_group(
        "speculative decoding",
        "guess tokens and verify them in one step; the output distribution stays the same",
    ).add_mutually_exclusive_group()
    guesses.add_argument(
        "--lookup",
        action="store_true",
        help="guess from earlier text (n-gram lookup); faster if the answer repeats parts of "
        "the prompt or of itself",
    )
    guesses.add_argument(
        "--draft", metavar="BUNDLE", help="guess with a smaller model that has the same tokenizer"
    )


def _number(group: argparse._ArgumentGroup, name: str, default: float, text: str) -> None:
    option, metavar = name.split()
    setting = option.removeprefix("--").replace("-", "_")
    bounds = f"{range_text(setting)}; " if setting in RANGES else ""
    group.add_argument(
        option,
        type=type(default),
        default=default,
        metavar=metavar,
        help=f"{text} ({bounds}default: %(default)s)",
    )


def add_prompt_cache(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds `--prompt-cache` and `--prompt-cache-ro`.

    Args:
        parser: of the command.
        what: the text whose keys and values are stored.
    """
    parser.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help=f"store the keys and values of {what} in FILE, and reuse them at the next start",
    )
    parser.add_argument(
        "--prompt-cache-ro",
        action="store_true",
        help="read the prompt cache, but do not write it",
    )


def add_batch(parser: argparse.ArgumentParser) -> None:
    """Adds the options for many prompts from a file."""
    group = parser.add_argument_group("many prompts")
    group.add_argument(
        "--batch",
        metavar="FILE",
        help='file of prompts, one JSON object per line: {"prompt": TEXT}, or {"messages": '
        '[{"role": "user", "content": TEXT}, …]} for an instruction-tuned model. Optional '
        'keys are "id" and the options above, such as "max_tokens", "stop", "top_k" or '
        '"seed"',
    )
    group.add_argument(
        "--out",
        metavar="FILE",
        help="file for the answers, one JSON object per line, in the same order. If the run was "
        "interrupted, the same command continues after the last answer",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="overwrite --out instead of continuing it"
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="number of prompts decoded at once: 1, 2, 4, 8, 16, 32 or 64 (default: 4)",
    )


def add_windows(parser: argparse.ArgumentParser) -> None:
    """Adds the options that split a text into windows."""
    parser.add_argument(
        "--length",
        type=positive,
        metavar="N",
        help="window length in tokens, including the beginning-of-sequence token (default: "
        f"{WINDOW})",
    )
    parser.add_argument("--windows", type=positive, metavar="N", help="maximum number of windows")
