"""Tables with more rows than the tokenizer has pieces: ids without a piece are never generated."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as proto

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.candidates import Candidates, below
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import EdgeError
from edge_demo.text.generator import Generator, candidates_suffice, engine_for
from edge_demo.text.sampling import Sampler
from edge_demo.text.tokenizer import Tokenizer
from tests.edge_demo.bundle_files import copy_bundle, rewrite
from tests.models import VOCABULARY_SIZE

PIECES = 262  # the bytes, and little more
SETTINGS = {
    "greedy": {},
    "top-k": {"temperature": 2.0, "top_k": 200, "seed": 1},
    "all": {"temperature": 2.0, "seed": 1},
    "penalties": {"repeat_penalty": 1.2, "presence_penalty": 0.5},
}


@pytest.fixture(scope="module")
def padded(tiny_bundles, tmp_path_factory):
    """The small model with a tokenizer that lacks the last pieces."""
    folder = tmp_path_factory.mktemp("padded") / "bundle"
    bundle = copy_bundle(tiny_bundles / "gemma3-fp32", folder)
    model = proto.ModelProto.FromString((bundle / "tokenizer.model").read_bytes())
    del model.pieces[PIECES:]
    rewrite(bundle, "tokenizer.model", model.SerializeToString())
    return bundle


def answer(path, settings, kind=None):
    bundle, sampler = Bundle.open(path), Sampler(**settings)
    tokenizer = Tokenizer(bundle)
    engine = kind(bundle, 1) if kind else engine_for(bundle, sampler, 1, tokenizer)
    return Generator(engine, tokenizer).generate([2, 20, 30, 40], sampler, 60).ids


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_ids_without_a_piece_never_come(padded, tiny_bundles, settings):
    found = answer(padded, settings)
    assert len(found) == 60 and max(found) < PIECES
    assert found == answer(padded, settings, Engine)  # what is chosen among does not decide
    assert max(answer(tiny_bundles / "gemma3-fp32", settings)) >= PIECES


def test_nor_in_a_batch(padded, run, tmp_path):
    lines = [
        {"prompt": "The boat"},
        {"prompt": "A", "temperature": 2, "top_k": 200},
        {"prompt": "B"},
    ]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
    options = ("--batch", tmp_path / "in", "--out", tmp_path / "out", "--max-tokens", 40)
    assert run("generate", padded, *options)[0] == 0
    tokenizer = Tokenizer(Bundle.open(padded))
    engine = Engine(Bundle.open(padded), 1)
    for line in (tmp_path / "out").read_text().splitlines()[::2]:
        record = json.loads(line)
        ids = tokenizer.encode(lines[record["index"]]["prompt"])
        alone = Generator(engine, tokenizer).generate(ids, Sampler(), 40)
        assert record["text"] == alone.text and record["tokens"] == 40


def test_candidates_are_run_only_where_they_hold_enough_pieces(padded, tiny_bundles):
    bundle = Bundle.open(padded)
    tokenizer, without = Tokenizer(bundle), VOCABULARY_SIZE - PIECES
    assert tokenizer.num_pieces == PIECES and bundle.num_candidates == 256
    for top_k, few in ((256 - without, True), (257 - without, False)):
        sampler = Sampler(1.0, top_k)
        assert candidates_suffice(bundle, sampler, tokenizer) == few
        assert candidates_suffice(bundle, sampler) is True
    assert isinstance(engine_for(bundle, Sampler(), 1, tokenizer), CandidateEngine)


def test_what_is_below_the_number_of_pieces():
    logits = np.arange(9, dtype=np.float32)
    np.testing.assert_array_equal(below(logits, 5), logits[:5])
    found = below(Candidates(np.array([7, 2, 5, 4]), logits[:4]), 5)
    assert isinstance(found, Candidates)
    assert (found.ids.tolist(), found.logits.tolist()) == ([2, 4], [1, 3])
    with pytest.raises(EdgeError, match="none of the 4 likeliest tokens exists"):
        below(Candidates(np.array([7, 6, 5, 8]), logits[:4]), 5)
