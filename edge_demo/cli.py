"""`edge-demo`: generate, chat, bench, score, compare and inspect a bundle.

Nothing heavy is imported before it is known that it will be used, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from edge_demo.errors import EdgeError, RequestError
from edge_demo.huge_pages import restart_with_huge_pages
from edge_demo.terminal import complain

if TYPE_CHECKING:
    from edge_demo.bundle import Bundle
    from edge_demo.engine import Engine
    from edge_demo.generator import Generation, Generator
    from edge_demo.sampling import Sampler
    from edge_demo.speculate import Drafter
    from edge_demo.tokenizer import Tokenizer

INTERRUPTED = 130
_WINDOW = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit status 0, 1 for a failure, 2 for a bad request, 130 for Ctrl-C."""
    _prepare_streams()
    arguments = _parser().parse_args(argv)
    if argv is None and arguments.run is not _inspect:  # a process of its own, with an engine
        restart_with_huge_pages()
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        status = run(arguments)
        sys.stdout.flush()
        return status
    except EdgeError as error:
        complain(error)
        return 2 if isinstance(error, RequestError) else 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        _drop_unwritten()
        return 1
    except (OSError, MemoryError) as error:
        complain(error if str(error) else "out of memory")
        _drop_unwritten()
        return 1


def _prepare_streams() -> None:
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started us has closed it
            setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def _drop_unwritten() -> None:
    """Forget output that cannot be written, which Python would try again, and complain, at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="edge-demo", description="Run a Gemma bundle on this device, with onnxruntime."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *before: tuple[str, str]
    ):
        sub = commands.add_parser(name, help=text, description=text)
        for argument, what in before:
            sub.add_argument(argument, metavar=argument.upper(), help=what)
        sub.add_argument("bundle", metavar="BUNDLE", help="the folder that export-onnx wrote")
        sub.add_argument("--json", action="store_true", help="print one JSON object, for programs")
        sub.set_defaults(run=run)
        return sub

    def engine_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--threads",
            type=_positive,
            metavar="N",
            help="threads for an operator (default: cores)",
        )

    def sampling_options(sub: argparse.ArgumentParser, defaults: Sampling) -> None:
        group = sub.add_argument_group("sampling")
        group.add_argument(
            "--max-tokens",
            type=_positive,
            default=defaults.max_tokens,
            metavar="N",
            help="the most tokens to generate (default: %(default)s)",
        )
        group.add_argument(
            "--temperature",
            type=float,
            default=defaults.temperature,
            metavar="T",
            help="0 is greedy (default: %(default)s)",
        )
        group.add_argument(
            "--top-k",
            type=int,
            default=defaults.top_k,
            metavar="K",
            help="choose among the K most likely; 0 is all (default: %(default)s)",
        )
        group.add_argument(
            "--top-p",
            type=float,
            default=defaults.top_p,
            metavar="P",
            help="choose among the most likely that together have probability P "
            "(default: %(default)s)",
        )
        group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
        sub.add_argument(
            "--lookup",
            action="store_true",
            help="guess tokens by looking up how the text went on before: answers of the same "
            "probability, sooner where they repeat the prompt or themselves",
        )

    sub = command("generate", _generate, "Continue a prompt.")
    sub.add_argument("--prompt", metavar="TEXT", help="what to continue (default: read stdin)")
    engine_options(sub)
    sampling_options(sub, Sampling(128, 0.0, 0, 1.0))

    sub = command("chat", _chat, "Talk in turns, or, with a base model, continue text in turns.")
    engine_options(sub)
    sampling_options(sub, Sampling(512, 1.0, 64, 0.95))

    sub = command("bench", _bench, "Measure load time, prefill, decode and memory.")
    engine_options(sub)
    sub.add_argument("--prompt-tokens", type=_positive, default=512, metavar="N")
    sub.add_argument("--decode-tokens", type=_positive, default=64, metavar="N")
    sub.add_argument("--repeats", type=_positive, default=3, metavar="N")

    def window_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--length",
            type=_positive,
            metavar="N",
            help="tokens in a window, the beginning-of-sequence token included (default: "
            f"{_WINDOW})",
        )
        sub.add_argument(
            "--windows", type=_positive, metavar="N", help="stop after as many windows"
        )

    sub = command("score", _score, "Perplexity of a text, by windows, or accuracy on HellaSwag.")
    engine_options(sub)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="UTF-8 text")
    what.add_argument(
        "--hellaswag", metavar="FILE", help="HellaSwag tasks as text, six lines a task"
    )
    window_options(sub)
    sub.add_argument(
        "--stride",
        type=_positive,
        metavar="N",
        help="tokens from one window to the next (default: half the length)",
    )
    sub.add_argument(
        "--tasks", type=_positive, metavar="N", help="stop after as many HellaSwag tasks"
    )

    sub = command(
        "compare",
        _compare,
        "How far a bundle's predictions are from a reference's: KL divergence, perplexities.",
        ("reference", "the bundle to compare with, usually exported as fp32"),
    )
    engine_options(sub)
    sub.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    window_options(sub)

    sub = command("inspect", _inspect, "Show what a bundle holds.")
    sub.add_argument("--verify", action="store_true", help="compare every file with its SHA-256")
    return parser


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A command's sampling defaults."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


# --- generate and chat --------------------------------------------------------------------------


def _sampler(arguments: argparse.Namespace) -> Sampler:
    from edge_demo.sampling import Sampler

    return Sampler(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)


def _drafter(arguments: argparse.Namespace) -> Drafter | None:
    from edge_demo.speculate import PromptLookup

    return PromptLookup() if arguments.lookup else None


def _load(arguments: argparse.Namespace, sampler: Sampler) -> tuple[Bundle, Generator, float]:
    start = time.perf_counter()
    from edge_demo.bundle import Bundle
    from edge_demo.generator import Generator, engine_for
    from edge_demo.tokenizer import Tokenizer

    bundle = Bundle.open(arguments.bundle)
    engine = engine_for(bundle, sampler, arguments.threads)
    generator = Generator(engine, Tokenizer(bundle))
    return bundle, generator, time.perf_counter() - start


def _generate(arguments: argparse.Namespace) -> int:
    from edge_demo.generator import Generation
    from edge_demo.terminal import note, show

    sampler = _sampler(arguments)
    prompt = arguments.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise RequestError("give a prompt with --prompt, or on stdin")
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    _, generator, load_s = _load(arguments, sampler)
    generation = Generation(generator.tokenizer.encode(prompt))
    pieces = generator.stream(
        generation.prompt_ids, sampler, arguments.max_tokens, generation, _drafter(arguments)
    )
    status = 0
    generator.engine.admit(generation.prompt_ids)
    if not arguments.json:
        show(prompt)
    try:
        for piece in pieces:
            if not arguments.json:
                show(piece)
    except KeyboardInterrupt:
        status = INTERRUPTED
    if arguments.json:
        print(json.dumps(_report(generation, load_s)))
    else:
        show("\n")
        note(_summary(generation, load_s))
    return status


def _report(generation: Generation, load_s: float) -> dict[str, Any]:
    from edge_demo.bench import peak_rss_bytes

    return {
        "prompt_ids": generation.prompt_ids,
        "ids": generation.ids,
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "timings": {
            "load_s": load_s,
            "ttft_s": generation.prefill_s,
            "prefill_tokens_per_s": generation.prefill_tokens_per_s,
            "decode_tokens_per_s": generation.decode_tokens_per_s,
        },
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _summary(generation: Generation, load_s: float) -> str:
    from edge_demo.bench import peak_rss_bytes
    from edge_demo.terminal import megabytes

    speed = generation.decode_tokens_per_s
    parts = [
        f"load {load_s:.1f} s",
        f"first token {generation.prefill_s:.1f} s",
        f"{speed:.0f} tokens/s" if speed else f"{len(generation.ids)} tokens",
        megabytes(peak_rss_bytes()),
    ]
    return " · ".join(parts)


def _chat(arguments: argparse.Namespace) -> int:
    from edge_demo.generator import Generation
    from edge_demo.terminal import note, show

    sampler = _sampler(arguments)
    bundle, generator, load_s = _load(arguments, sampler)
    tuned = bundle.tokenizer.chat is not None
    note(
        f"{bundle.name} ({bundle.recipe}), "
        + (
            "instruction-tuned: answers in Gemma's turn template."
            if tuned
            else "a base model: it continues the text you write, it was not taught to answer."
        )
        + " Ctrl-C stops an answer, Ctrl-D ends."
    )
    turns: list[tuple[str, str]] = []
    drafter = _drafter(arguments)
    while True:
        message = _read_turn()
        if message is None:
            return 0
        if not message.strip():
            continue
        turns.append(("user", message))
        if tuned:
            ids = generator.tokenizer.encode_chat(turns)
        else:
            ids = generator.tokenizer.encode("".join(text for _, text in turns))
        generation = Generation(ids)
        try:
            for piece in generator.stream(ids, sampler, arguments.max_tokens, generation, drafter):
                if not arguments.json:
                    show(piece)
        except KeyboardInterrupt:
            pass
        except RequestError as error:
            turns.pop()
            note(f"{error}. The last message was left out.")
            continue
        if arguments.json:
            print(json.dumps(_report(generation, load_s)), flush=True)
        else:
            show("\n")
            note(f"[{generation.finish_reason}] {len(generation.ids)} tokens")
        turns.append(("model", generation.text))


def _read_turn() -> str | None:
    asked = sys.stdin.isatty()
    try:
        if asked and sys.stdout.isatty():
            import readline  # noqa: F401 - line editing for input()

            return input("> ")
        if asked:  # stdout is for a program
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if line:
            return line.rstrip("\n")
    except EOFError:
        pass
    except KeyboardInterrupt:
        if not asked:
            raise
        print(file=sys.stderr)
        return ""
    if asked:
        print(file=sys.stderr)
    return None


# --- measure and look ---------------------------------------------------------------------------


def _bench(arguments: argparse.Namespace) -> int:
    from edge_demo.bench import bench
    from edge_demo.bundle import Bundle
    from edge_demo.terminal import megabytes

    result = bench(
        Bundle.open(arguments.bundle),
        arguments.threads,
        arguments.prompt_tokens,
        arguments.decode_tokens,
        arguments.repeats,
    )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(result)))
        return 0
    print(f"load          {result.load_s:8.2f} s")
    print(f"first token   {result.ttft_s:8.2f} s        after {result.prompt_tokens} tokens")
    print(f"prefill       {result.prefill_tokens_per_s:8.1f} tokens/s")
    print(f"decode        {result.decode_tokens_per_s:8.1f} tokens/s")
    print(f"peak memory   {megabytes(result.peak_rss_bytes):>8}")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    text_options = {name: getattr(arguments, name) for name in ("length", "stride", "windows")}
    if arguments.hellaswag is not None:
        _refuse_options(text_options, "--text")
        return _score_hellaswag(arguments)
    _refuse_options({"tasks": arguments.tasks}, "--hellaswag")

    from edge_demo.score import score
    from edge_demo.terminal import Progress

    text = _read_text(arguments.text)
    engine, tokenizer = _load_for_scoring(arguments)
    length = arguments.length or _WINDOW
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
        print(json.dumps({"perplexity": result.perplexity} | dataclasses.asdict(result)))
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


def _compare(arguments: argparse.Namespace) -> int:
    from edge_demo.bundle import Bundle
    from edge_demo.compare import as_table, check_comparable, compare
    from edge_demo.engine import Engine
    from edge_demo.terminal import Progress, show
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
        arguments.length or _WINDOW,
        arguments.windows,
        Progress("window"),
    )
    if arguments.json:
        names = ("reference", "bundle")
        who = {n: {"name": b.name, "recipe": b.recipe} for n, b in zip(names, bundles, strict=True)}
        print(json.dumps(who | dataclasses.asdict(result)))
        return 0
    kinds = " against ".join(f"{b.name} {b.recipe}" for b in reversed(bundles))
    show(f"{kinds}, {result.windows:,} windows of {result.length:,} tokens\n")
    show(as_table(result) + "\n")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
