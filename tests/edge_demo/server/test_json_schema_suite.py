"""Schemas of the JSON-Schema-Test-Suite, answered by the real sample at temperature 1."""

from __future__ import annotations

import json

import jsonschema
import pytest

from edge_demo.text.grammar import Grammars, GrammarSource
from edge_demo.text.sampling import Sampler
from tests.conftest import ROOT
from tests.edge_demo.conftest import generator

SUITE = json.loads((ROOT / "tests" / "data" / "json_schemas.json").read_text())["schemas"]
EVERY = 20


@pytest.fixture(scope="module")
def chat(sample_chat_bundle):
    return generator(sample_chat_bundle)


@pytest.fixture(scope="module")
def grammars(chat):
    return Grammars(chat.tokenizer, chat.engine.bundle.vocabulary_size)


def test_all_of_them_are_understood(grammars):
    for case in SUITE:
        grammars.compile(GrammarSource("json_schema", json.dumps(case["schema"])))


@pytest.mark.sample
@pytest.mark.parametrize("number", range(0, len(SUITE), EVERY))
def test_answers_are_valid(number, chat, grammars):
    schema = SUITE[number]["schema"]
    ids = chat.tokenizer.encode_chat([("user", f"Write JSON for this schema: {schema}")])
    grammar = grammars.compile(GrammarSource("json_schema", json.dumps(schema)))
    stream = chat.stream(ids, Sampler(temperature=1.0, seed=number), 60, grammar=grammar)
    text = "".join(piece.text for piece in stream)
    if stream.completion.finish_reason == "stop":
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    else:  # cut, but right so far
        assert stream.completion.finish_reason == "length" and not grammar.ended
