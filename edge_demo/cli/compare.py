"""Runs `edge-demo compare`: compares a bundle's predictions with those of a reference."""

from __future__ import annotations

import argparse
import dataclasses

from edge_demo.cli import options
from edge_demo.cli.text_files import read_text

TEXT = "Compare a bundle with a reference bundle: KL divergence and perplexity."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compare`."""
    parser.add_argument(
        "reference",
        metavar="REFERENCE",
        help="the reference bundle, usually exported as fp32",
    )
    options.add_bundle(parser)
    options.add_engine(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text file")
    options.add_windows(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare a bundle with a reference."""
    from edge_demo.bundle.reader import Bundle
    from edge_demo.cli.terminal import Progress, as_json, show
    from edge_demo.engine.runner import Engine
    from edge_demo.evaluate.compare import as_table, check_comparable, compare
    from edge_demo.text.tokenizer import Tokenizer

    text = read_text(arguments.text)
    bundles = [Bundle.open(path) for path in (arguments.reference, arguments.bundle)]
    check_comparable(*bundles)
    reference, engine = (
        Engine(bundle, arguments.threads, force=arguments.force) for bundle in bundles
    )
    tokenizer = Tokenizer(bundles[0])
    (result,) = compare(
        reference,
        [engine],
        tokenizer.spec.bos,
        tokenizer.encode(text, bos=False),
        arguments.length or options.WINDOW,
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
