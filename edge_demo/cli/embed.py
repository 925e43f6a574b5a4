"""Runs `edge-demo embed`: vectors of texts."""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_demo.argument_parser import ArgumentParser
from edge_demo.cli import options
from edge_demo.cli.text_files import read_text
from edge_demo.errors import EdgeError, RequestError, sentence

if TYPE_CHECKING:
    import numpy as np

TEXT = "Turn texts into vectors with the bundle of an embedder, such as EmbeddingGemma's."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `embed`."""
    options.add_bundle(parser)
    options.add_engine(parser)
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="text to embed")
    if isinstance(parser, ArgumentParser):
        parser.goes_on = "texts"
    parser.add_argument("--file", metavar="FILE", help="UTF-8 file of texts, one a line")
    parser.add_argument(
        "--prompt-name",
        metavar="NAME",
        help="what the texts are for, such as query or document: puts the model's prompt for it "
        "before each (default: the model's default; EmbeddingGemma has none)",
    )
    parser.add_argument(
        "--dimensions",
        type=options.positive,
        metavar="N",
        help="numbers of a vector: the first ones, made length 1 again (default: all)",
    )
    parser.add_argument(
        "--truncate",
        action="store_true",
        help="cut a text that is too long; without this it is an error",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE.npy",
        help="write the vectors as an array of numpy, float32 (texts, dimensions)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Embed texts; without `-o` each vector is a line of numbers."""
    texts = _texts(arguments)
    from edge_demo.bundle.reader import Bundle
    from edge_demo.cli.answering import open_tokenizer
    from edge_demo.device.memory_limits import peak_rss_bytes
    from edge_demo.engine.embedder import Embedder
    from edge_demo.text.embedding import EmbeddingTokens, check_dimensions, cut

    start = time.perf_counter()
    bundle = Bundle.open(arguments.bundle)
    check_dimensions(bundle.require_embedder(), arguments.dimensions)
    tokenizer = open_tokenizer(bundle)
    embedder = Embedder(bundle, arguments.threads, arguments.force)
    tokens = EmbeddingTokens(embedder.spec, tokenizer, embedder.longest)
    rows = tokens.of_texts(texts, arguments.prompt_name, arguments.truncate)
    load_s = time.perf_counter() - start
    start = time.perf_counter()
    vectors = cut(_vectors(embedder, rows, quiet=arguments.json), arguments.dimensions)
    seconds = time.perf_counter() - start
    count = sum(map(len, rows))
    if arguments.output is not None:
        _write(arguments.output, vectors)
    report: dict[str, Any] = {
        "model": bundle.name,
        "dimensions": vectors.shape[1],
        "prompt_name": arguments.prompt_name or embedder.spec.default_prompt_name,
        "tokens": [len(ids) for ids in rows],
        "timings": {"load_s": load_s, "embed_s": seconds, "tokens_per_s": count / seconds},
        "peak_rss_bytes": peak_rss_bytes(),
    }
    _print(arguments, vectors, report)
    return 0


def _texts(arguments: argparse.Namespace) -> list[str]:
    """The texts, of the command line or of a file."""
    if (arguments.file is None) == (not arguments.texts):
        raise RequestError("give texts to embed, or a file of them with --file, one of both")
    if arguments.file is None:
        return arguments.texts
    lines = read_text(arguments.file).removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines]


def _vectors(embedder: Any, rows: list[list[int]], quiet: bool) -> np.ndarray:
    """The vectors of rows, with progress on stderr where it takes long."""
    import numpy as np

    from edge_demo.cli.terminal import Progress

    embedder.check(rows)
    progress, done = Progress("text", vanishes=True), 0
    found = np.empty((len(rows), embedder.spec.dimensions), np.float32)
    for members, vectors in embedder.in_steps(rows):
        found[members] = vectors
        done += len(members)
        if not quiet:
            progress(done, len(rows))
    return found


def _write(path: str, vectors: np.ndarray) -> None:
    import numpy as np

    from edge_demo.durable import write_whole

    data = io.BytesIO()
    np.save(data, vectors, allow_pickle=False)
    try:
        write_whole(Path(path), [data.getbuffer()])
    except OSError as error:
        raise EdgeError(f"{path} cannot be written: {sentence(error)}") from error


def _print(arguments: argparse.Namespace, vectors: np.ndarray, report: dict[str, Any]) -> None:
    from edge_demo.cli.terminal import note
    from edge_demo.units import megabytes

    if arguments.json:
        whole = {} if arguments.output is not None else {"vectors": vectors.tolist()}
        print(json.dumps(report | whole))
        return
    if arguments.output is None:
        for vector in vectors:
            print(*vector)  # numpy writes as few digits as give the same number again
    timings = report["timings"]
    noun = "vector" if len(vectors) == 1 else "vectors"
    note(
        f"{len(vectors):,} {noun} of {report['dimensions']:,} numbers · load "
        f"{timings['load_s']:.1f} s · {sum(report['tokens']):,} tokens in "
        f"{timings['embed_s']:.2f} s, {timings['tokens_per_s']:,.0f} tokens/s · "
        f"{megabytes(report['peak_rss_bytes'])}"
    )
