"""Runs `edge-demo score`: perplexity of a text, or accuracy on HellaSwag."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from edge_demo.cli import options
from edge_demo.cli.text_files import read_text
from edge_demo.errors import RequestError

if TYPE_CHECKING:
    from edge_demo.engine.runner import Engine
    from edge_demo.text.tokenizer import Tokenizer

TEXT = "Measure the perplexity of a text, or the accuracy on HellaSwag."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `score`."""
    options.add_bundle(parser)
    options.add_engine(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="UTF-8 text file")
    what.add_argument(
        "--hellaswag",
        metavar="FILE",
        help="file of HellaSwag tasks in llama.cpp's text form, six lines per task",
    )
    options.add_windows(parser)
    parser.add_argument(
        "--stride",
        type=options.positive,
        metavar="N",
        help="number of tokens from one window to the next (default: half the window length)",
    )
    parser.add_argument(
        "--tasks", type=options.positive, metavar="N", help="maximum number of HellaSwag tasks"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure the perplexity of a text, or the accuracy on HellaSwag."""
    text_options = {name: getattr(arguments, name) for name in ("length", "stride", "windows")}
    if arguments.hellaswag is not None:
        _refuse_options(text_options, "--text")
        return _score_hellaswag(arguments)
    _refuse_options({"tasks": arguments.tasks}, "--hellaswag")

    from edge_demo.cli.terminal import Progress, as_json
    from edge_demo.evaluate.perplexity import score

    text = read_text(arguments.text)
    engine, tokenizer = _load_for_scoring(arguments)
    length = arguments.length or options.WINDOW
    result = score(
        engine,
        tokenizer.spec.bos,
        tokenizer.encode(text, bos=False),
        length,
        arguments.stride or max(1, length // 2),
        arguments.windows,
        Progress("window"),
    )
    if arguments.json:
        print(as_json({"perplexity": result.perplexity} | dataclasses.asdict(result)))
        return 0
    print(
        f"perplexity {result.perplexity:.4f}  (nll {result.nll:.5f} nats a token, "
        f"{result.tokens:,} tokens, {result.windows:,} windows)"
    )
    return 0


def _load_for_scoring(arguments: argparse.Namespace) -> tuple[Engine, Tokenizer]:
    from edge_demo.bundle.reader import Bundle
    from edge_demo.engine.runner import Engine
    from edge_demo.text.tokenizer import Tokenizer

    bundle = Bundle.open(arguments.bundle)
    return Engine(bundle, arguments.threads, force=arguments.force), Tokenizer(bundle)


def _refuse_options(given: dict[str, int | None], belong_to: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise RequestError(f"--{name} is only valid with {belong_to}; remove it")


def _score_hellaswag(arguments: argparse.Namespace) -> int:
    from edge_demo.cli.terminal import Progress
    from edge_demo.evaluate.hellaswag import hellaswag, read_tasks

    tasks = read_tasks(arguments.hellaswag, read_text(arguments.hellaswag))
    engine, tokenizer = _load_for_scoring(arguments)
    result = hellaswag(engine, tokenizer, tasks[: arguments.tasks], Progress("task"))
    if arguments.json:
        report = {"accuracy": result.value, "error": result.error, "interval": result.interval}
        print(json.dumps(report | dataclasses.asdict(result)))
        return 0
    least, most = result.interval
    print(
        f"HellaSwag {result.value:.2%} ± {100 * result.error:.2f} %  (95 % interval "
        f"{least:.2%} to {most:.2%}; {result.correct:,} of {result.tasks:,} tasks, mean "
        "log-probability of an ending's tokens)"
    )
    return 0
