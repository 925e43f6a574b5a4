"""Runs `edge-demo doctor`: shows the device, the models that fit, and their expected speed."""

from __future__ import annotations

import argparse
import json

from edge_demo.cli import options

TEXT = "Show this device's hardware, which models fit, and their expected speed."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `doctor`."""
    parser.add_argument(
        "bundles", metavar="BUNDLE", nargs="*", help="bundles to check against this device"
    )
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Report on the device, and on the given bundles."""
    from edge_demo.bundle.reader import Bundle
    from edge_demo.cli.device_report import describe, examine
    from edge_demo.cli.terminal import show

    bundles = [Bundle.open(path) for path in arguments.bundles]
    report = examine(bundles)
    if arguments.json:
        print(json.dumps(report))
    else:
        show(describe(report) + "\n")
    return 0
