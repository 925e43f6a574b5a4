"""Runs `edge-demo inspect`: shows the contents of a bundle."""

from __future__ import annotations

import argparse
import json

from edge_demo.cli import options

TEXT = "Show the contents of a bundle."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `inspect`."""
    options.add_bundle(parser)
    parser.add_argument("--verify", action="store_true", help="check the SHA-256 of every file")


def run(arguments: argparse.Namespace) -> int:
    """Show the contents of a bundle."""
    from edge_demo.bundle.reader import Bundle
    from edge_demo.cli.describe import describe
    from edge_demo.cli.terminal import show

    bundle = Bundle.open(arguments.bundle)
    if arguments.verify:
        bundle.verify(use_memory=False)
    if arguments.json:
        print(json.dumps(dict(bundle.manifest)))
    else:
        show(describe(bundle, verified=arguments.verify) + "\n")
    return 0
