"""What each command of `edge-demo` does and shows; `edge_demo.cli` reads their arguments.

A command imports what it uses when it runs. It returns the exit status.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from edge_demo.errors import RequestError
from edge_demo.options import WINDOW

if TYPE_CHECKING:
    from edge_demo.engine import Engine
    from edge_demo.tokenizer import Tokenizer

INTERRUPTED = 130


def run_score(arguments: argparse.Namespace) -> int:
    """Perplexity of a text, or accuracy on HellaSwag."""
    text_options = {name: getattr(arguments, name) for name in ("length", "stride", "windows")}
    if arguments.hellaswag is not None:
        _refuse_options(text_options, "--text")
        return _score_hellaswag(arguments)
    _refuse_options({"tasks": arguments.tasks}, "--hellaswag")

    from edge_demo.score import score
    from edge_demo.terminal import Progress, as_json

    text = _read_text(arguments.text)
    engine, tokenizer = _load_for_scoring(arguments)
    length = arguments.length or WINDOW
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
    from edge_demo.bundle import Bundle
    from edge_demo.engine import Engine
    from edge_demo.tokenizer import Tokenizer

    bundle = Bundle.open(arguments.bundle)
    return Engine(bundle, arguments.threads), Tokenizer(bundle)


def _refuse_options(options: dict[str, int | None], belong_to: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise RequestError(f"--{name} goes with {belong_to} only; leave it out")


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise RequestError(f"the text {path} is not a file") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"the text {path} is not UTF-8: {error}") from error


def _score_hellaswag(arguments: argparse.Namespace) -> int:
    from edge_demo.hellaswag import hellaswag, read_tasks
    from edge_demo.terminal import Progress

    tasks = read_tasks(arguments.hellaswag, _read_text(arguments.hellaswag))
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


def run_compare(arguments: argparse.Namespace) -> int:
    """How far a bundle is from a reference."""
    from edge_demo.bundle import Bundle
    from edge_demo.compare import as_table, check_comparable, compare
    from edge_demo.engine import Engine
    from edge_demo.terminal import Progress, as_json, show
    from edge_demo.tokenizer import Tokenizer

    text = _read_text(arguments.text)
    bundles = [Bundle.open(path) for path in (arguments.reference, arguments.bundle)]
    check_comparable(*bundles)
    reference, engine = (Engine(bundle, arguments.threads) for bundle in bundles)
    tokenizer = Tokenizer(bundles[0])
    (result,) = compare(
        reference,
        [engine],
        tokenizer.spec.bos,
        tokenizer.encode(text, bos=False),
        arguments.length or WINDOW,
        arguments.windows,
        Progress("window"),
    )
    if arguments.json:
        names = ("reference", "bundle")
        who = {n: {"name": b.name, "recipe": b.recipe} for n, b in zip(names, bundles, strict=True)}
        print(as_json(who | dataclasses.asdict(result)))
        return 0
    kinds = " against ".join(f"{b.name} {b.recipe}" for b in reversed(bundles))
    show(f"{kinds}, {result.windows:,} windows of {result.length:,} tokens\n")
    show(as_table(result) + "\n")
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    """Show what a bundle holds."""
    from edge_demo.bundle import Bundle
    from edge_demo.inspect import describe
    from edge_demo.terminal import show

    bundle = Bundle.open(arguments.bundle)
    if arguments.verify:
        bundle.verify(use_memory=False)
    if arguments.json:
        print(json.dumps(dict(bundle.manifest)))
    else:
        show(describe(bundle, verified=arguments.verify) + "\n")
    return 0
