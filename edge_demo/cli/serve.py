"""`edge-demo serve`: a server that OpenAI's clients speak to."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_demo.cli import guard_options, options
from edge_demo.errors import RequestError, sentence

if TYPE_CHECKING:
    from edge_demo.bundle.reader import Bundle
    from edge_demo.server.http.access import Access
    from edge_demo.server.http.guarding import Guarding
    from edge_demo.server.protocol.vertex import Vertex
    from edge_demo.text.tokenizer import Tokenizer

TEXT = "Serve a bundle to programs that speak OpenAI's protocol."
_KEY_VARIABLE = "EDGE_DEMO_API_KEY"
_LONGEST_KEYS = 1 << 16  # bytes of the file
_MOST_CACHE_MB = 256


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `serve` takes."""
    options.add_bundle(parser)
    options.add_engine(parser)
    group = parser.add_argument_group("who may ask")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s)"
    )
    group.add_argument(
        "--port", type=_port, default=8080, metavar="N", help="0 for any (default: %(default)s)"
    )
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"file of API keys, one a line; one key can be in the environment as {_KEY_VARIABLE}",
    )
    group.add_argument(
        "--allow-anyone",
        action="store_true",
        help="listen at other addresses than this machine's own without an API key",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of this machine; can be given several times",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages of ORIGIN, such as https://chat.example, may ask; can be given several times",
    )
    group.add_argument(
        "--vertex",
        action="store_true",
        help="be a container of Vertex AI: AIP_HTTP_PORT, AIP_HEALTH_ROUTE and AIP_PREDICT_ROUTE "
        "in the environment decide, and its gateway says who may ask",
    )
    group = parser.add_argument_group("how much")
    group.add_argument(
        "--parallel",
        type=options.positive,
        default=4,
        metavar="N",
        help="number of answers decoded at once: 1, 2, 4, 8, 16, 32 or 64 (default: %(default)s)",
    )
    group.add_argument(
        "--queue",
        type=options.positive,
        default=32,
        metavar="N",
        help="number of prompts that may wait for their turn (default: %(default)s)",
    )
    group.add_argument(
        "--max-tokens",
        type=options.positive,
        metavar="N",
        help="maximum number of tokens of an answer (default: as the context holds)",
    )
    group.add_argument(
        "--cache-mb",
        type=_not_negative,
        metavar="MB",
        help="memory for keys and values of earlier prompts; 0 keeps none (default: a quarter of "
        f"what is free, at most {_MOST_CACHE_MB})",
    )
    group.add_argument(
        "--drain-s",
        type=options.positive,
        default=30,
        metavar="S",
        help="seconds that begun answers have after SIGTERM (default: %(default)s)",
    )
    guard_options.add_guard(parser)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text[:9]) > 65535:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a port between 0 and 65535")
    return int(text)


def _not_negative(text: str) -> int:
    return 0 if text == "0" else options.positive(text)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    vertex = _vertex() if arguments.vertex else None
    host, port = ("0.0.0.0", vertex.port) if vertex else (arguments.host, arguments.port)
    keys = _keys(arguments.api_key_file)
    if not (keys or arguments.allow_anyone or vertex or _is_loopback(host)):
        raise RequestError(
            f"anyone in the network could use a server at {host}; give API keys with "
            "--api-key-file, or say --allow-anyone"
        )
    from edge_demo.bundle.reader import Bundle
    from edge_demo.cli.answering import open_tokenizer
    from edge_demo.cli.terminal import note
    from edge_demo.engine.batch_decoder import check_rows
    from edge_demo.server.http.access import Access, host_names
    from edge_demo.server.http.serving import listen, url_of
    from edge_demo.server.http.serving import run as serve
    from edge_demo.server.http.watchdog import notify

    check_rows(arguments.parallel, "--parallel")
    guard_options.check_guard(arguments)
    sock = listen(host, port)
    try:
        bundle = Bundle.open(arguments.bundle)
        tokenizer = open_tokenizer(bundle)
        access = Access(
            keys,
            host_names(host, arguments.allow_host),
            tuple(arguments.cors_origin),
            behind_gateway=vertex is not None,
        )
        if bundle.embedder is not None:
            app = _embedder_app(arguments, bundle, tokenizer, access)
        else:
            app = _generator_app(arguments, bundle, tokenizer, access, vertex)

        def started() -> None:
            url = url_of(sock)
            note(f"{bundle.name} ({bundle.recipe}) at {url}/v1 · Ctrl-C ends")
            if arguments.json:
                print(json.dumps({"url": url, "model": bundle.name}), flush=True)
            notify("READY=1")

        serve(app, sock, arguments.drain_s, started)
    finally:
        sock.close()
    return 0


def _guarding(
    arguments: argparse.Namespace, bundle: Bundle, tokenizer: Tokenizer
) -> Guarding | None:
    """The guard of the options; errors as `open_guard`, or both models do not fit into memory."""
    if arguments.guard is None:
        return None
    from edge_demo.bundle.reader import Bundle
    from edge_demo.engine.two_models import check_both_fit
    from edge_demo.server.http.guarding import Guarding

    of_guard = Bundle.open(arguments.guard)
    graph = bundle.candidates or bundle.engine
    check_both_fit(bundle, graph, 1 + arguments.parallel, of_guard, arguments.force)
    guard = guard_options.open_guard(arguments, of_guard, several=True)
    on, every = arguments.guard_on, arguments.guard_every
    return Guarding(guard, tokenizer, on, every, arguments.queue)


def _generator_app(
    arguments: argparse.Namespace,
    bundle: Bundle,
    tokenizer: Tokenizer,
    access: Access,
    vertex: Vertex | None,
) -> Any:
    from edge_demo.engine.runner import CandidateEngine, Engine
    from edge_demo.server.http.app import make_app
    from edge_demo.server.worker.worker import Worker

    guarding = _guarding(arguments, bundle, tokenizer)
    kind = Engine if bundle.candidates is None else CandidateEngine
    engine = kind(bundle, arguments.threads, 1 + arguments.parallel, arguments.force)
    worker = Worker(
        engine,
        tokenizer,
        arguments.parallel,
        arguments.queue,
        _cache_bytes(arguments.cache_mb),
        arguments.threads,
        arguments.force,
    )
    most = min(arguments.max_tokens or bundle.context_length, bundle.context_length)
    return make_app(bundle, tokenizer, worker, access, most, vertex, guarding)


def _embedder_app(
    arguments: argparse.Namespace, bundle: Bundle, tokenizer: Tokenizer, access: Access
) -> Any:
    from edge_demo.engine.embedder import Embedder
    from edge_demo.server.http.embedding import make_embedder_app
    from edge_demo.server.worker.embedding_worker import EmbeddingWorker

    for name, given in (
        ("--max-tokens", arguments.max_tokens is not None),
        ("--cache-mb", arguments.cache_mb is not None),
        ("--vertex", arguments.vertex),
        ("--guard", arguments.guard is not None),
    ):
        if given:
            raise RequestError(
                f"{name} is for bundles that generate text, and {bundle.name} embeds texts; "
                "leave it out"
            )
    embedder = Embedder(bundle, arguments.threads, arguments.force)
    worker = EmbeddingWorker(embedder, arguments.queue)
    return make_embedder_app(embedder, tokenizer, worker, access)


def _cache_bytes(megabytes: int | None) -> int:
    if megabytes is not None:
        return megabytes * 10**6
    from edge_demo.device.memory_limits import free_memory

    free = free_memory()
    most = _MOST_CACHE_MB * 10**6
    return most if free is None else min(most, free // 4)


def _vertex() -> Vertex:
    from edge_demo.server.protocol.errors import Refusal
    from edge_demo.server.protocol.vertex import Vertex

    try:
        return Vertex.of(os.environ)
    except Refusal as refusal:
        raise RequestError(str(refusal)) from None


def _keys(path: str | None) -> tuple[str, ...]:
    keys = [os.environ.get(_KEY_VARIABLE, "").strip()]
    if path is not None:
        try:
            with Path(path).open("rb") as file:
                data = file.read(_LONGEST_KEYS + 1)
            if len(data) > _LONGEST_KEYS:
                raise RequestError(f"the file of API keys is larger than {_LONGEST_KEYS:,} bytes")
            keys += [line.strip() for line in data.decode().splitlines()]
        except (OSError, ValueError) as error:
            raise RequestError(f"the file of API keys cannot be read: {sentence(error)}") from None
    found = tuple(key for key in keys if key)
    if path is not None and len(found) == (1 if keys[0] else 0):
        raise RequestError(f"the file of API keys {path} has none")
    return found


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
