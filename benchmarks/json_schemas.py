"""Answers by the schemas of the JSON-Schema-Test-Suite, at temperature 1, checked by jsonschema.

    python benchmarks/json_schemas.py build/sample-chat-int8 --answers 200

It prints how many answers are whole and how many of those are valid, and how much of a token's
time the grammar takes: the making of the mask, its use, and the step to the next state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.candidates import Candidates
from edge_demo.engine.runner import Engine
from edge_demo.text.generator import Generator
from edge_demo.text.grammar import Grammar, Grammars, GrammarSource, NoCandidateError
from edge_demo.text.sampling import Sampler
from edge_demo.text.tokenizer import Tokenizer

_CANDIDATES = 256
SCHEMAS = Path(__file__).parents[1] / "tests" / "data" / "json_schemas.json"


class Timed:
    """A grammar that notes how long it takes, and how often the candidates suffice."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self.seconds = 0.0
        self.tokens = self.missed = 0

    @property
    def ended(self) -> bool:
        """As the grammar's."""
        return self._grammar.ended

    def filter(self, logits: np.ndarray) -> np.ndarray | Candidates:
        """As the grammar's, of the likeliest tokens first, as a server does."""
        ids = np.argpartition(logits, -_CANDIDATES)[-_CANDIDATES:]
        likely = Candidates(ids.astype(np.int32), logits[ids])
        begin = time.perf_counter()
        try:
            return self._grammar.filter(likely)
        except NoCandidateError:
            self.missed += 1
            return self._grammar.filter(logits)
        finally:
            self.seconds += time.perf_counter() - begin

    def take(self, token: int) -> None:
        """As the grammar's."""
        begin = time.perf_counter()
        self._grammar.take(token)
        self.seconds += time.perf_counter() - begin
        self.tokens += 1

    def forced(self) -> list[int]:
        """As the grammar's."""
        begin = time.perf_counter()
        found = self._grammar.forced()
        self.seconds += time.perf_counter() - begin
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=400)
    arguments = parser.parse_args()

    bundle = Bundle.open(arguments.bundle)
    tokenizer = Tokenizer(bundle)
    generator = Generator(Engine(bundle), tokenizer)
    grammars = Grammars(tokenizer, bundle.vocabulary_size)
    cases = json.loads(SCHEMAS.read_text())["schemas"]
    whole, valid, cut, tokens, missed = 0, 0, 0, 0, 0
    shares, compile_s = [], []
    tried = 0
    while whole < arguments.answers and tried < 4 * arguments.answers:
        case = cases[tried % len(cases)]
        schema, seed = case["schema"], tried // len(cases)
        tried += 1
        begin = time.perf_counter()
        grammar = Timed(grammars.compile(GrammarSource("json_schema", json.dumps(schema))))
        compile_s.append(time.perf_counter() - begin)
        asked = f"Write an example of JSON for this schema: {json.dumps(schema)}"
        ids = tokenizer.encode_chat([("user", asked)])
        stream = generator.stream(
            ids,
            Sampler(temperature=1.0, top_k=64, seed=seed),
            arguments.max_tokens,
            grammar=grammar,
        )
        text = "".join(piece.text for piece in stream)
        done = stream.completion
        if grammar.tokens > 8 and done.decode_s:
            shares.append(grammar.seconds / (done.prefill_s + done.decode_s))
        tokens += grammar.tokens
        missed += grammar.missed
        if done.finish_reason != "stop":
            cut += 1
            continue
        whole += 1
        try:
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
            valid += 1
        except (jsonschema.ValidationError, ValueError) as error:
            print(f"{case['from']}, {case['description']}: {text!r}: {str(error)[:80]}")
        if sys.stderr.isatty() and tried % 10 == 0:
            print(f"{tried} answers", end="\r", file=sys.stderr)
    print(f"{len(cases)} schemas; {tried} answers, {cut} cut at {arguments.max_tokens} tokens")
    print(f"whole: {whole}, of them valid: {valid}")
    print(f"median time to compile a schema: {1000 * statistics.median(compile_s):.1f} ms")
    print(f"the grammar's share of the time, median: {100 * statistics.median(shares):.1f} %")
    print(f"tokens: {tokens:,}; all logits were needed for {missed:,}")
    return 0 if valid == whole else 1


if __name__ == "__main__":
    sys.exit(main())
