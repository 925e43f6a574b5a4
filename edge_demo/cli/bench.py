"""Runs `edge-demo bench` and prints its table in the form of llama-bench (llama.cpp)."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_demo.cli import options
from edge_demo.errors import RequestError, brief
from edge_demo.units import megabytes

if TYPE_CHECKING:
    from edge_demo.bundle.reader import Bundle
    from edge_demo.device.boards import Board
    from edge_demo.device.hardware import Device
    from edge_demo.evaluate.speed import BenchReport

TEXT = "Measure prefill speed, decode speed, load time and memory."
_MOST_REPEATS = 10_000

_LONGEST_NAME = 255  # bytes, on common file systems


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `bench`, named as in llama-bench where it has them."""
    options.add_bundle(parser)
    for short, name, default, text in (
        (
            "-p",
            "--prompt-tokens",
            [512],
            "time the prefill of N prompt tokens (pp); 0 skips this test",
        ),
        ("-n", "--decode-tokens", [128], "time the generation of N tokens (tg); 0 skips this test"),
        (
            "-d",
            "--depth",
            [0],
            "number of tokens in the context before each test; they are not timed",
        ),
        ("-t", "--threads", [None], "number of threads per operator"),
    ):
        shown = "physical cores" if default == [None] else default[0]
        parser.add_argument(
            short,
            name,
            type=_counts,
            default=default,
            metavar="N[,N…]",
            help=f"{text} (default: {shown})",
        )
    parser.add_argument(
        "-r",
        "--repeats",
        type=_repeats,
        default=5,
        metavar="N",
        help="number of times each test is run (default: %(default)s)",
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=("md", "csv", "json"),
        default="md",
        help="output format: a Markdown table, CSV, or the JSON that --json prints (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--share",
        metavar="FILE",
        help="also write the measurements to a file that you can send: without names, paths or "
        "addresses",
    )
    options.add_force(parser)


def _counts(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [-1]
    if min(values) < 0 or max(values) >= options.TOO_MANY:
        raise argparse.ArgumentTypeError(
            f"{brief(text, 80)!r} is not a whole number from 0, or several with commas between"
        )
    return list(dict.fromkeys(values))


def _repeats(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
    if not 1 <= value <= _MOST_REPEATS:
        raise argparse.ArgumentTypeError(
            f"{brief(text, 80)!r} is not a whole number from 1 to {_MOST_REPEATS:,}"
        )
    return value


def run(arguments: argparse.Namespace) -> int:
    """Measure a bundle."""
    from edge_demo.bundle.reader import Bundle
    from edge_demo.cli.terminal import Progress, show
    from edge_demo.device import hardware
    from edge_demo.device.boards import board_named
    from edge_demo.evaluate.speed import BenchCase, run_tests

    tests = [
        BenchCase(kind, tokens, depth)
        for depth in arguments.depth
        for kind, counts in (("pp", arguments.prompt_tokens), ("tg", arguments.decode_tokens))
        for tokens in counts
        if tokens
    ]
    if 0 in arguments.threads:
        raise RequestError("threads must be positive, not 0")
    bundle = Bundle.open(arguments.bundle)
    bundle.require_generator()
    if arguments.share is not None:
        _check_place(Path(arguments.share))
    report = run_tests(
        bundle, tests, arguments.threads, arguments.repeats, Progress("run"), arguments.force
    )
    looked = hardware.look()
    output = "json" if arguments.json else arguments.output
    if output == "json":
        print(json.dumps(as_json(bundle, report, arguments.repeats)))
    elif output == "csv":
        show(as_csv(bundle, report))
    else:
        lines = [as_markdown(bundle, report), "", _beside(report)]
        board = board_named(looked.board)
        if board is not None:
            lines.append(_assumed(board, bundle))
        show("\n".join(lines) + "\n")
    if arguments.share is not None:  # after the table: a full disk does not take it away
        text = json.dumps(to_share(bundle, report, arguments.repeats, looked), indent=1) + "\n"
        _write(Path(arguments.share), text)
    return 0


def _check_place(path: Path) -> None:
    """Refuse before minutes of measuring what could not be written after them."""
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise RequestError(f"{brief(str(path))!r} is too long for the name of a file")
    if path.exists() or path.is_symlink():
        raise RequestError(f"{path} already exists; choose another file for --share")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"{path} cannot be written: its folder does not exist")


def _write(path: Path, text: str) -> None:
    from edge_demo.durable import write_whole

    try:
        write_whole(path, [text.encode()])
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from error


def to_share(bundle: Bundle, report: BenchReport, repeats: int, looked: Device) -> dict[str, Any]:
    """Returns the measurements with what is known of the device, and nothing about its owner.

    The model's name is left out: it may hold a path or a person's name. Its sizes say which it is.
    """
    import platform
    from importlib import metadata

    from edge_demo.device.boards import board_named

    board = board_named(looked.board)
    device = {
        "board": looked.board if board else None,
        "processor": looked.processor,
        "machine": looked.machine,
        "cores": looked.cores,
        "instructions": looked.instructions,
        "page_bytes": looked.page_bytes,
        "huge_pages": looked.huge_pages,
    }
    measured = as_json(bundle, report, repeats)
    del measured["model"]
    config = bundle.manifest["model"]["config"]
    return {
        "device": device,
        "assumed": None if board is None else dataclasses.asdict(board),
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": metadata.version("onnxruntime"),
        },
        "target": bundle.target,
        "layers": len(config["layers"]),
        "hidden_dim": config["hidden_dim"],
        "vocabulary_size": bundle.vocabulary_size,
        "bytes_per_token": _read(bundle),
        "measured": measured,
    }


def _assumed(board: Board, bundle: Bundle) -> str:
    return f"{board}: at most {board.bytes_per_s / _read(bundle):.0f} tokens/s by memory"


def _read(bundle: Bundle) -> int:
    from edge_demo.bundle.graph_weights import bytes_per_token

    graph = bundle.candidates or bundle.engine
    return bytes_per_token(bundle.path / graph.file)


def as_markdown(bundle: Bundle, report: BenchReport) -> str:
    """Returns the table: one row per test, with speeds as mean ± standard deviation."""
    rows = [("model", "size", "threads", "test", "t/s")]
    for row in _rows(bundle, report):
        speed = f"{row['mean']:.2f} ± {row['deviation']:.2f}"
        rows.append((row["model"], row["size"], str(row["threads"]), row["test"], speed))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    left = (True, False, False, False, False)

    def line(cells: tuple[str, ...]) -> str:
        padded = (
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(cells, widths, left, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        "-" * (width + 2) if is_left else "-" * (width + 1) + ":"
        for width, is_left in zip(widths, left, strict=True)
    )
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])])


def as_csv(bundle: Bundle, report: BenchReport) -> str:
    """Returns the same as CSV: sizes in bytes, speeds unrounded."""
    out = io.StringIO()
    names = ("model", "bytes", "threads", "test", "depth", "mean", "deviation")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([row[name] for name in names] for row in _rows(bundle, report))
    return out.getvalue()


def as_json(bundle: Bundle, report: BenchReport, repeats: int) -> dict[str, Any]:
    """Returns one object: general values, the first speeds by name, and every test."""
    prompt, decode = report.first("pp"), report.first("tg")
    return {
        "model": bundle.name,
        "recipe": bundle.recipe,
        "weights_bytes": bundle.files[bundle.weights][0],
        "load_s": report.load_s,
        "ttft_s": _mean(prompt.seconds) if prompt else None,
        "prefill_tokens_per_s": prompt.mean if prompt else None,
        "decode_tokens_per_s": decode.mean if decode else None,
        "prompt_tokens": prompt.test.tokens if prompt else None,
        "decode_tokens": decode.test.tokens if decode else None,
        "repeats": repeats,
        "peak_rss_bytes": report.peak_rss_bytes,
        "celsius": report.celsius,
        "throttled": report.throttled,
        "tests": [
            {
                "test": timing.test.name,
                "kind": timing.test.kind,
                "tokens": timing.test.tokens,
                "depth": timing.test.depth,
                "threads": timing.threads,
                "tokens_per_s": {"mean": timing.mean, "deviation": timing.deviation},
                "seconds": list(timing.seconds),
            }
            for timing in report.timings
        ],
    }


def _rows(bundle: Bundle, report: BenchReport) -> list[dict[str, Any]]:
    size = bundle.files[bundle.weights][0]
    return [
        {
            "model": f"{bundle.name} {bundle.recipe}",
            "bytes": size,
            "size": megabytes(size),
            "threads": timing.threads,
            "test": timing.test.name,
            "depth": timing.test.depth,
            "mean": timing.mean,
            "deviation": timing.deviation,
        }
        for timing in report.timings
    ]


def _beside(report: BenchReport) -> str:
    prompt = report.first("pp")
    parts = [f"load {report.load_s:.2f} s"]
    if prompt:
        depth = f" at depth {prompt.test.depth:,}" if prompt.test.depth else ""
        parts.append(
            f"first token {_mean(prompt.seconds):.2f} s after {prompt.test.tokens:,} tokens{depth}"
        )
    parts.append(f"peak memory {megabytes(report.peak_rss_bytes)}")
    if report.celsius is not None:
        parts.append(f"up to {report.celsius:.0f} °C")
    if report.throttled is not None:
        parts.append(report.throttled)
    return " · ".join(parts)


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
