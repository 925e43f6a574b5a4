"""What each command of `edge-demo` does and shows; `edge_demo.cli` reads their arguments.

A command imports what it uses when it runs. It returns the exit status.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from edge_demo.errors import RequestError

if TYPE_CHECKING:
    from edge_demo.bundle import Bundle
    from edge_demo.engine import Engine
    from edge_demo.generator import Generation, Generator
    from edge_demo.prompt_cache_option import PromptCacheOption
    from edge_demo.sampling import Sampler
    from edge_demo.speculate import Drafter
    from edge_demo.tokenizer import Tokenizer

INTERRUPTED = 130
WINDOW = 512


# --- generate and chat --------------------------------------------------------------------------


def _sampler(arguments: argparse.Namespace) -> Sampler:
    from edge_demo.sampling import Sampler

    return Sampler(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)


def _drafter(arguments: argparse.Namespace, bundle: Bundle) -> Drafter | None:
    from edge_demo.speculate import DraftModel, PromptLookup, check_draft

    if arguments.draft is None:
        return PromptLookup() if arguments.lookup else None

    from edge_demo.bundle import Bundle
    from edge_demo.generator import engine_for
    from edge_demo.sampling import Sampler

    draft = Bundle.open(arguments.draft)
    check_draft(bundle, draft)
    return DraftModel(engine_for(draft, Sampler(), arguments.threads))


def _load(arguments: argparse.Namespace, sampler: Sampler) -> tuple[Bundle, Generator, float]:
    start = time.perf_counter()
    from edge_demo.bundle import Bundle
    from edge_demo.generator import Generator, engine_for
    from edge_demo.tokenizer import Tokenizer

    bundle = Bundle.open(arguments.bundle)
    engine = engine_for(bundle, sampler, arguments.threads)
    generator = Generator(engine, Tokenizer(bundle))
    return bundle, generator, time.perf_counter() - start


def _prompt_cache(arguments: argparse.Namespace) -> PromptCacheOption:
    from edge_demo.prompt_cache_option import PromptCacheOption

    return PromptCacheOption(arguments.prompt_cache, arguments.prompt_cache_ro)


def run_generate(arguments: argparse.Namespace) -> int:
    """Continue a prompt, or those of a file."""
    if arguments.batch is not None:
        others = ("prompt", "prompt_cache", "prompt_cache_ro", "lookup", "draft")
        _refuse_with(arguments, others, "does not go with --batch; leave it out")

        from edge_demo.batch_command import run_batch

        return run_batch(arguments)
    of_batch = ("out", "overwrite", "batch_size")
    _refuse_with(arguments, of_batch, "goes with --batch FILE only; leave it out")

    from edge_demo.generator import Generation
    from edge_demo.terminal import Progress, note, show

    sampler = _sampler(arguments)
    cache = _prompt_cache(arguments)
    prompt = arguments.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise RequestError("give a prompt with --prompt, or on stdin")
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    bundle, generator, load_s = _load(arguments, sampler)
    drafter = _drafter(arguments, bundle)
    generation = Generation(generator.tokenizer.encode(prompt))
    pieces = generator.stream(
        generation.prompt_ids,
        sampler,
        arguments.max_tokens,
        generation,
        drafter,
        Progress("prompt token", vanishes=True),
        on_held=lambda held: cache.save_prompt(generator.engine, held),
    )
    status = 0
    generator.engine.check(generation.prompt_ids)
    cache.load(generator.engine)
    try:
        for number, piece in enumerate(pieces):
            if not arguments.json:
                show(piece if number else prompt + piece)
    except KeyboardInterrupt:
        status = INTERRUPTED
    if arguments.json:
        print(json.dumps(_report(generation, load_s, cache)))
    else:
        show("\n")
        note(_summary(generation, load_s))
    cache.tell()
    return status


def _refuse_with(arguments: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(arguments, name) not in (None, False):
            raise RequestError(f"--{name.replace('_', '-')} {why}")


def _report(generation: Generation, load_s: float, cache: PromptCacheOption) -> dict[str, Any]:
    from edge_demo.rooms import peak_rss_bytes

    return {
        "prompt_ids": generation.prompt_ids,
        "ids": generation.ids,
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "reused_tokens": generation.reused_tokens,
        "prompt_cache": cache.report,
        "timings": {
            "load_s": load_s,
            "ttft_s": generation.prefill_s,
            "prefill_tokens_per_s": generation.prefill_tokens_per_s,
            "decode_tokens_per_s": generation.decode_tokens_per_s,
        },
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _summary(generation: Generation, load_s: float) -> str:
    from edge_demo.rooms import peak_rss_bytes
    from edge_demo.terminal import megabytes

    speed = generation.decode_tokens_per_s
    parts = [
        f"load {load_s:.1f} s",
        f"first token {generation.prefill_s:.1f} s",
        f"{speed:.0f} tokens/s" if speed else f"{len(generation.ids)} tokens",
        megabytes(peak_rss_bytes()),
    ]
    return " · ".join(parts)


def run_chat(arguments: argparse.Namespace) -> int:
    """Talk in turns."""
    from edge_demo.generator import Generation
    from edge_demo.terminal import Progress, note, show

    sampler = _sampler(arguments)
    cache = _prompt_cache(arguments)
    bundle, generator, load_s = _load(arguments, sampler)
    tuned = bundle.tokenizer.chat is not None
    if arguments.system and not tuned:
        raise RequestError(
            f"{bundle.name} is a base model: it has no place for --system; leave it out"
        )
    system_ids = generator.tokenizer.encode_system(arguments.system) if arguments.system else []
    if system_ids:
        generator.engine.check(system_ids)
    cache.load(generator.engine)
    if system_ids and generator.prepare(system_ids) < len(system_ids):
        cache.save(generator.engine)
        cache.tell()
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
    drafter = _drafter(arguments, bundle)
    while True:
        message = _read_turn()
        if message is None:
            return 0
        if not message.strip():
            continue
        turns.append(("user", message))
        if tuned:
            ids = generator.tokenizer.encode_chat(turns, arguments.system)
        else:
            ids = generator.tokenizer.encode("".join(text for _, text in turns))
        generation = Generation(ids)
        told = Progress("prompt token", vanishes=True)
        keeps = len(turns) == 1 and not system_ids
        pieces = generator.stream(
            ids,
            sampler,
            arguments.max_tokens,
            generation,
            drafter,
            told,
            on_held=(lambda held: cache.save_prompt(generator.engine, held)) if keeps else None,
            goes_on=True,
        )
        try:
            for piece in pieces:
                if not arguments.json:
                    show(piece)
        except KeyboardInterrupt:
            pass
        except RequestError as error:
            turns.pop()
            note(f"{error}. The last message was left out.")
            continue
        if arguments.json:
            print(json.dumps(_report(generation, load_s, cache)), flush=True)
        else:
            show("\n")
            note(f"[{generation.finish_reason}] {len(generation.ids)} tokens")
        cache.tell()
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


def run_score(arguments: argparse.Namespace) -> int:
    """Perplexity of a text, or accuracy on HellaSwag."""
    text_options = {name: getattr(arguments, name) for name in ("length", "stride", "windows")}
    if arguments.hellaswag is not None:
        _refuse_options(text_options, "--text")
        return _score_hellaswag(arguments)
    _refuse_options({"tasks": arguments.tasks}, "--hellaswag")

    from edge_demo.score import score
    from edge_demo.terminal import Progress

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


def run_compare(arguments: argparse.Namespace) -> int:
    """How far a bundle is from a reference."""
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
        arguments.length or WINDOW,
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
