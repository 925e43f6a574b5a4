"""`edge-demo generate`: a prompt continued, or those of a file."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from edge_demo.cli import options
from edge_demo.errors import INTERRUPTED, EdgeError, RequestError, sentence

if TYPE_CHECKING:
    from edge_demo.text.grammar import GrammarSource

TEXT = "Continue a prompt."


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `generate` takes."""
    options.add_bundle(parser)
    parser.add_argument(
        "-p", "--prompt", metavar="TEXT", help="the prompt to continue (default: read stdin)"
    )
    parser.add_argument(
        "--json-schema",
        metavar="FILE",
        help="answer in JSON that a schema allows; needs gemma-keras[grammar]",
    )
    options.add_engine(parser)
    options.add_sampling(parser, options.Sampling(128, 0.0, 0, 1.0))
    options.add_prompt_cache(parser, "the prompt")
    options.add_batch(parser)


def run(arguments: argparse.Namespace) -> int:
    """Continue a prompt, or those of a file."""
    if arguments.batch is not None:
        others = ("prompt", "prompt_cache", "prompt_cache_ro", "lookup", "draft", "json_schema")
        _refuse_with(arguments, others, "is not valid with --batch; remove it")

        from edge_demo.cli.batch import run_batch

        return run_batch(arguments)
    of_batch = ("out", "overwrite", "batch_size")
    _refuse_with(arguments, of_batch, "is only valid with --batch FILE; remove it")
    return _continue_prompt(arguments)


def _refuse_with(arguments: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(arguments, name) not in (None, False):
            raise RequestError(f"--{name.replace('_', '-')} {why}")


def _continue_prompt(arguments: argparse.Namespace) -> int:
    from edge_demo.cli.answering import Answering
    from edge_demo.cli.terminal import Progress, note, show

    answering = Answering(arguments)
    prompt = _prompt_on_stdin() if arguments.prompt is None else arguments.prompt
    schema = _schema(arguments)
    bundle, generator, drafter = answering.load(all_logits=schema is not None)
    cache, grammar = answering.cache, None
    if schema is not None:
        from edge_demo.text.grammar import Grammars

        grammar = Grammars(generator.tokenizer, bundle.vocabulary_size).compile(schema)
    if mark := generator.tokenizer.mark_in(prompt):
        note(
            f"The prompt holds {mark}, which is tokenized as plain text, not as the token; use "
            "edge-demo chat for turns."
        )
    stream = generator.stream(
        generator.tokenizer.encode(prompt),
        answering.sampler,
        arguments.max_tokens,
        drafter,
        Progress("prompt token", vanishes=True),
        answering.stop,
        on_held=lambda held: cache.save_prompt(generator.engine, held),
        grammar=grammar,
    )
    completion = stream.completion
    status = 0
    cache.load(generator.engine)
    try:
        for number, piece in enumerate(stream):
            if not arguments.json:
                show(piece.text if number else prompt + piece.text)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except EdgeError:
        if completion.ids and not arguments.json:
            show("\n")  # what is said next begins a line
        raise
    if arguments.json:
        print(json.dumps(answering.report(completion)))
    else:
        show("\n")
        note(answering.summary(completion))
        if grammar is not None and completion.finish_reason != "stop":
            note("The JSON was cut before its end; allow more with --max-tokens.")
    cache.tell()
    return status


def _schema(arguments: argparse.Namespace) -> GrammarSource | None:
    if arguments.json_schema is None:
        return None
    _refuse_with(arguments, ("lookup", "draft"), "is not valid with --json-schema; remove it")
    from edge_demo.text.grammar import LONGEST, GrammarSource

    try:
        with open(arguments.json_schema, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except (OSError, ValueError) as error:
        raise RequestError(f"the JSON schema cannot be read: {sentence(error)}") from None
    return GrammarSource("json_schema", text)


def _prompt_on_stdin() -> str:
    if sys.stdin.isatty():
        raise RequestError("give a prompt with --prompt, or on stdin")
    prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    if not prompt.strip():
        raise RequestError(
            "stdin is empty; give a prompt on stdin, or with --prompt (--prompt '' for an "
            "empty one)"
        )
    return prompt
