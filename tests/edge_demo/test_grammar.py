"""Answers that keep to a form: what the grammar allows, and no more."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.candidates import Candidates
from edge_demo.errors import RequestError
from edge_demo.text.grammar import LONGEST, Grammars, GrammarSource, NoCandidateError
from edge_demo.text.sampling import Sampler
from tests.edge_demo.conftest import generator

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "likes": {"type": "array", "items": {"enum": ["tea", "rain"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
GIVEN = GrammarSource("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def chat(tiny_bundles):
    return generator(tiny_bundles / "chat")


@pytest.fixture(scope="module")
def grammars(chat):
    return Grammars(chat.tokenizer, chat.engine.bundle.vocabulary_size)


@pytest.mark.parametrize("seed", range(12))
def test_a_random_model_answers_by_the_schema(chat, grammars, seed):
    sampler = Sampler(temperature=1.0, seed=seed)
    ids = chat.tokenizer.encode("Tell me.")
    stream = chat.stream(ids, sampler, 400, grammar=grammars.compile(GIVEN))
    text = "".join(piece.text for piece in stream)
    found = json.loads(text)
    assert stream.completion.finish_reason == "stop" and text == stream.completion.text
    assert set(found) == {"name", "age", "likes"} and len(found["name"]) <= 8
    assert 0 <= found["age"] <= 99 and set(found["likes"]) <= {"tea", "rain"}


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        (GrammarSource("regex", r"[a-f]{3}-\d\d"), r"[a-f]{3}-\d\d"),
        (GrammarSource("lark", 'start: "yes" | "no" " way"'), "yes|no way"),
        (GrammarSource("json_schema", '{"enum": ["wet", "dry"]}'), '"wet"|"dry"'),
    ],
)
def test_other_forms(chat, grammars, source, pattern):
    for seed in range(5):
        stream = chat.stream(
            chat.tokenizer.encode("So?"), Sampler(temperature=1.0, seed=seed), 60,
            grammar=grammars.compile(source),
        )  # fmt: skip
        assert re.fullmatch(pattern, "".join(piece.text for piece in stream))


def test_only_what_is_allowed_is_left_of_logits_and_of_candidates(chat, grammars):
    tokenizer = chat.tokenizer
    grammar = grammars.compile(GrammarSource("regex", "[ab]"))
    logits = np.zeros(tokenizer.num_pieces, np.float32)
    allowed = np.flatnonzero(np.isfinite(grammar.filter(logits)))
    assert {tokenizer.piece_bytes(int(i)) for i in allowed} == {b"a", b"b"}
    others = np.setdiff1d(np.arange(tokenizer.num_pieces), allowed)[:20]
    some = np.array([*others, allowed[0]], np.int64)
    found = grammar.filter(Candidates(some, np.arange(len(some), dtype=np.float32)))
    assert found.ids.tolist() == [allowed[0]] and found.logits.tolist() == [len(some) - 1]
    with pytest.raises(NoCandidateError):
        grammar.filter(Candidates(others, np.zeros(len(others), np.float32)))
    grammar.take(int(allowed[0]))
    assert grammar.ended


def test_what_has_no_choice_is_forced(chat, grammars):
    grammar = grammars.compile(GrammarSource("json_schema", '{"const": {"a": "stone"}}'))
    assert chat.tokenizer.decode(grammar.forced()) == '{"a": "stone"}'


@pytest.mark.parametrize(
    "source",
    [
        GrammarSource("json_schema", "{"),
        GrammarSource("json_schema", "3"),
        GrammarSource("json_schema", '{"type": "nonsense"}'),
        GrammarSource("json_schema", '{"$ref": "https://example.org/schema"}'),
        GrammarSource("regex", "(("),
        GrammarSource("lark", "start: nothing"),
        GrammarSource("regex", "a" * (LONGEST + 1)),
    ],
    ids=lambda source: f"{source.kind} {source.text[:20]}",
)
def test_what_is_no_grammar_is_refused(grammars, source):
    with pytest.raises(RequestError, match=source.kind):
        grammars.compile(source)


def test_generate_by_a_schema(run_json, run, refused, tiny_bundles, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    asked = ("generate", tiny_bundles / "chat", "--prompt", "Tell me.", "--json-schema", file)
    found = run_json(*asked, "--max-tokens", 400, "--temperature", 1, "--seed", 3)
    assert set(json.loads(found["text"])) == {"name", "age", "likes"}
    status, out, err = run(*asked, "--max-tokens", 3)
    assert status == 0 and "cut before its end" in err and out.startswith("Tell me.{")
    file.write_text("{")
    refused(*asked, names=["json_schema"])
    refused(*asked[:-1], tmp_path / "none", names=["none"])
    refused(*asked, "--lookup", names=["--lookup"])


def test_the_table_is_of_the_bundle(tiny_bundles, chat):
    bundle = Bundle.open(tiny_bundles / "chat")
    grammars = Grammars(chat.tokenizer, bundle.vocabulary_size)
    grammars.prepare()
    assert grammars._made.vocab_size == bundle.vocabulary_size
    assert set(chat.tokenizer.spec.stop) == set(grammars._made.eos_tokens)
