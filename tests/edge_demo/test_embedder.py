"""The engine of embedders: batches, what it refuses, bundles with mistakes, memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.device.memory_limits import MemoryLimit
from edge_demo.engine import embedder as module
from edge_demo.engine import embedder_memory, memory
from edge_demo.engine.embedder import Embedder, batches
from edge_demo.engine.runner import Engine
from edge_demo.errors import BundleError, EdgeError, RequestError, TooLittleMemoryError
from edge_demo.text.embedding import EmbeddingTokens, cut
from edge_demo.text.tokenizer import Tokenizer
from tests.edge_demo.bundle_files import copy_bundle, edit_manifest, rewrite
from tests.models import TEXT

TEXTS = TEXT.split("\n")
LONGEST = 120


@pytest.fixture(scope="module")
def path(tiny_bundles):
    return tiny_bundles / "embedder-fp32"


@pytest.fixture(scope="module")
def embedder(path):
    return Embedder(Bundle.open(path), threads=1)


@pytest.fixture(scope="module")
def tokens(embedder):
    return EmbeddingTokens(embedder.spec, Tokenizer(embedder.bundle), embedder.longest)


# --- vectors -------------------------------------------------------------------------------------


def test_a_text_is_what_it_is_alone(embedder, tokens):
    rows = tokens.of_texts([*TEXTS, "", *TEXTS])
    together = embedder.vectors(rows)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    for ids, vector in zip(rows, together, strict=True):
        np.testing.assert_allclose(embedder.vectors([ids])[0], vector, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_integers_do_not_depend_on_what_else_is_run(tiny_bundles, tokens):
    embedder = Embedder(Bundle.open(tiny_bundles / "embedder-int8"), threads=1)
    rows = tokens.of_texts(TEXTS)
    alone = np.concatenate([embedder.vectors([ids]) for ids in rows])
    np.testing.assert_allclose(embedder.vectors(rows), alone, atol=2e-3)


def test_the_order_of_tokens_counts_and_tokens_ahead_too(embedder, tokens):
    (ids,) = tokens.of_texts(["The gardener waters the trees."])
    assert len(ids) > 6
    for place in (1, len(ids) - 2):
        changed = [*ids[:place], 200, *ids[place + 1 :]]
        assert np.abs(embedder.vectors([ids]) - embedder.vectors([changed])).max() > 1e-3
    turned = [ids[0], *reversed(ids[1:-1]), ids[-1]]
    assert np.abs(embedder.vectors([ids]) - embedder.vectors([turned])).max() > 1e-3


def test_no_texts(embedder):
    assert embedder.vectors([]).shape == (0, 40)


@given(lengths=st.lists(st.integers(1, 700), max_size=60), at_once=st.sampled_from([64, 128, 512]))
def test_batches_hold_every_text_once_and_little_padding(lengths, at_once):
    found = list(batches(lengths, at_once))
    assert sorted(i for members in found for i in members) == list(range(len(lengths)))
    for members in found:
        own = [lengths[i] for i in members]
        assert len(own) == 1 or len(own) * max(own) <= at_once
        assert max(own) <= min(own) * 1.25 + 8


# --- texts ---------------------------------------------------------------------------------------


def test_white_space_is_left_out_and_control_tokens_are_text(tokens):
    assert tokens.of_texts([" \na boat\t "]) == tokens.of_texts(["a boat"])
    (ids,) = tokens.of_texts(["<eos><bos>"])
    assert ids[0] == 2 and ids[-1] == 1 and not {1, 2} & set(ids[1:-1])


def test_prompts_are_put_before_texts(tokens):
    whole = tokens.of_texts(["task: search result | query: a boat"])
    assert tokens.of_texts(["a boat"], "query") == whole
    with pytest.raises(RequestError, match="no prompt 'title'; this model has: document, query"):
        tokens.of_texts(["a"], "title")


def test_a_default_prompt_is_used_where_no_other_is_asked_for(path, tmp_path):
    folder = copy_bundle(path, tmp_path / "bundle")
    edit_manifest(folder, lambda m: m["embedder"].update(default_prompt_name="query"))
    bundle = Bundle.open(folder)
    tokens = EmbeddingTokens(bundle.require_embedder(), Tokenizer(bundle), LONGEST)
    assert tokens.of_texts(["a"]) == tokens.of_texts(["a"], "query")


def test_a_text_that_is_too_long_is_refused_with_counts(tokens):
    long = TEXT[:200] * 3
    count = len(tokens.of_texts([TEXT[:20]])[0])
    assert count < LONGEST
    with pytest.raises(RequestError) as refused:
        tokens.of_texts(["a", long, long])
    for words in ("text 2 of 3 has", "the model takes 120", "1 more are too long", "truncate"):
        assert words in str(refused.value)
    short, cut_off, _ = tokens.of_texts(["a", long, long], truncate=True)
    assert len(cut_off) == LONGEST and cut_off[-1] == 1 and len(short) == 3


def test_tokens_may_have_their_beginning_and_end(tokens):
    for ids in ([5, 6], [2, 5, 6], [5, 6, 1], [2, 5, 6, 1]):
        assert tokens.of_ids([ids]) == [[2, 5, 6, 1]]
    assert tokens.of_ids([[2]]) == tokens.of_ids([[1]]) == [[2, 1]]


def test_cut_vectors_have_length_1():
    vectors = np.array([[3, 4, 12], [0, 0, 1]], np.float32)
    np.testing.assert_allclose(cut(vectors, 2), [[0.6, 0.8], [0, 0]])
    assert cut(vectors, None) is vectors and cut(vectors, 3) is vectors


# --- what cannot be run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[]], "text 1 of 1 has 0 tokens"),
        ([[2, 1], [5] * (LONGEST + 1)], "text 2 of 2 has 121 tokens; it must have 1 to 120"),
        ([[2, 300]], "token id 300 is outside the vocabulary of 300"),
        ([[2, -1]], "token id -1 is outside"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_run_are_refused(embedder, rows, words):
    with pytest.raises(RequestError, match=words):
        embedder.vectors(rows)


def test_each_kind_of_bundle_refuses_what_the_other_does(path, tiny_bundles):
    with pytest.raises(RequestError, match="embeds texts and generates none"):
        Engine(Bundle.open(path))
    with pytest.raises(RequestError, match="generates text and embeds none"):
        Embedder(Bundle.open(tiny_bundles / "gemma3-fp32"))
    with pytest.raises(RequestError, match="threads must be 1 to 1,024"):
        Embedder(Bundle.open(path), threads=2000)


def test_weights_that_give_no_numbers_are_told(path, tmp_path):
    folder = copy_bundle(path, tmp_path / "bundle")
    bundle = Bundle.open(folder)
    weights = bytearray((folder / bundle.weights).read_bytes())
    offset = bundle.embedding.parts["rows"].offset + 7 * 4 * bundle.embedding.width
    weights[offset : offset + 4] = np.float32(np.nan).tobytes()
    rewrite(folder, bundle.weights, bytes(weights))
    embedder = Embedder(Bundle.open(folder))
    assert np.isfinite(embedder.vectors([[2, 5, 1]])).all()
    with pytest.raises(EdgeError, match="numbers that are not finite"):
        embedder.vectors([[2, 7, 1]])


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(kind="poet"),
        lambda m: m.update(kind=3),
        lambda m: m.update(embedder=None),
        lambda m: m["embedder"].update(dimensions=None),
        lambda m: m["embedder"].update(dimensions=0),
        lambda m: m["embedder"].update(dimensions="40"),
        lambda m: m["embedder"].update(eos=-1),
        lambda m: m["embedder"].update(pooling="cls"),
        lambda m: m["embedder"].update(num_heads=1 << 60),
        lambda m: m["embedder"].update(projections=[[96]]),
        lambda m: m["embedder"].update(prompts=["a"]),
        lambda m: m["embedder"].update(prompts={"a": 1}),
        lambda m: m["embedder"].update(prompts={"a": "x" * 5000}),
        lambda m: m["embedder"].update(prompts={str(i): "" for i in range(300)}),
        lambda m: m["embedder"].update(default_prompt_name="none of them"),
    ],
)
def test_an_entry_with_a_mistake_is_damage(path, tmp_path, edit):
    folder = copy_bundle(path, tmp_path / "bundle")
    edit_manifest(folder, edit)
    with pytest.raises(BundleError, match=r"bundle\.json is damaged"):
        Bundle.open(folder)


def test_a_graph_of_another_contract_is_refused(path, tmp_path):
    folder = copy_bundle(path, tmp_path / "bundle")
    edit_manifest(folder, lambda m: m["embedder"].update(dimensions=39))
    with pytest.raises(BundleError, match="'sentence_embedding' is missing, unexpected"):
        Embedder(Bundle.open(folder))
    folder = copy_bundle(path, tmp_path / "another")
    graph = onnx.load(folder / "engine.onnx", load_external_data=False)
    graph.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.INT32
    rewrite(folder, "engine.onnx", graph.SerializeToString())
    with pytest.raises(BundleError):
        Embedder(Bundle.open(folder))


# --- memory --------------------------------------------------------------------------------------


def test_more_tokens_take_more_memory(path):
    bundle = Bundle.open(path)
    small, large = (embedder_memory.estimate(bundle, tokens) for tokens in (30, 60))
    # scores grow by the square
    assert large.logits == 4 * small.logits and large.cache == 0
    assert large.resident > small.resident


def test_too_little_memory_is_said_before_anything_is_loaded(path, monkeypatch):
    room = MemoryLimit("on this device", "resident", 1000)
    monkeypatch.setattr(memory, "memory_limits", lambda: [room])
    monkeypatch.setattr(module.sessions, "open_session", None)
    with pytest.raises(TooLittleMemoryError, match=r"needs about .* on this device.*--force"):
        Embedder(Bundle.open(path))


def test_a_text_alone_can_be_too_long_for_the_memory(path, monkeypatch):
    embedder = Embedder(Bundle.open(path))
    monkeypatch.setattr(embedder, "_at_once", 64)
    needed = embedder_memory.estimate(embedder.bundle, 119)
    needed = dataclasses.replace(needed, weights=0, copied_from=0)
    room = MemoryLimit("on this device", "resident", needed.resident)
    monkeypatch.setattr(memory, "memory_limits", lambda: [room])
    monkeypatch.setattr(memory, "read_sizes", lambda text: {})
    assert len(embedder.vectors([[5] * 119])) == 1
    with pytest.raises(TooLittleMemoryError, match="a text of 120 tokens needs about"):
        embedder.vectors([[5] * 120])
