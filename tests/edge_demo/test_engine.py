"""The engine against one plain pass of the interchange graph, which onnxruntime runs alone."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.manifest import RopeSpec
from edge_demo.bundle.reader import Bundle
from edge_demo.engine import runner as engine_module
from edge_demo.engine.kv_cache import KVCache, rope_table
from edge_demo.engine.runner import Engine
from edge_demo.errors import RequestError
from tests.conftest import ROOT
from tests.edge_demo.conftest import interrupted_runs, short_boundaries
from tests.edge_demo.make_bundles import SHORT_CONTEXT
from tests.models import GENERATIONS, VOCABULARY_SIZE, WINDOW

STEP, SLACK, PREFILL_CHUNK, SCORE_CHUNK = 8, 3, 5, 3
CONTEXT = 128
TOLERANCE = 1e-4
# Around the window, the chunks and the steps in which the buffers grow.
LENGTHS = sorted(
    {
        n + d
        for n in (WINDOW, WINDOW + SLACK, PREFILL_CHUNK, STEP, 2 * STEP, 2 * WINDOW, 40)
        for d in (-1, 0, 1)
    }
)


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    """Boundaries that a text of a few tokens crosses."""
    with (
        short_boundaries(STEP, SLACK, PREFILL_CHUNK),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(engine_module, "_SCORE_CHUNK", SCORE_CHUNK)
        yield


class Interchange:
    """`model.onnx`, run as any runtime would."""

    def __init__(self, path):
        self.path = path
        self.session = ort.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
        shapes = {i.name: i.shape for i in self.session.get_inputs()}
        self.past = {n: s for n, s in shapes.items() if n.startswith("past_key_values.")}

    def empty(self, batch):
        return {n: np.zeros((batch, h, 0, d), np.float32) for n, (_, h, _, d) in self.past.items()}

    def step(self, ids, past):
        """Logits `(batch, sequence, vocabulary)` and the grown past."""
        ids = np.array(ids, np.int64)
        total = next(iter(past.values())).shape[2] + ids.shape[1]
        mask = np.ones((len(ids), total), np.int64)
        outputs = dict(
            zip(
                [o.name for o in self.session.get_outputs()],
                self.session.run(None, {"input_ids": ids, "attention_mask": mask, **past}),
                strict=True,
            )
        )
        return outputs["logits"], {
            n: outputs[n.replace("past_key_values", "present")] for n in past
        }

    def logits(self, ids):
        """Of one pass over one text, `(length, vocabulary)`."""
        return self.step([ids], self.empty(1))[0][0]


@pytest.fixture(scope="module", params=[f"{g}-{k}" for g in GENERATIONS for k in ("fp32", "board")])
def models(request, tiny_bundles):
    """An engine and the plain graph over the same weights."""
    path = tiny_bundles / request.param
    return Engine(Bundle.open(path), threads=1), Interchange(path)


@pytest.fixture
def short_engine(tiny_bundles):
    return Engine(Bundle.open(tiny_bundles / "short"), threads=1)


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, length).tolist()


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def all_logits(engine, ids):
    return np.concatenate(list(engine.all_logits(ids)))


# --- the same logits, however a text is cut -------------------------------------------------------

STEPS = st.one_of(
    st.tuples(st.just("prefill"), st.integers(1, 20)),
    st.tuples(st.just("score"), st.integers(1, 20)),
    st.tuples(st.just("decode"), st.integers(1, 4)),
    st.tuples(st.just("rewind"), st.floats(0, 1)),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps=st.lists(STEPS, min_size=2, max_size=9), seed=st.integers(0, 1000))
def test_any_course_gives_the_logits_of_one_plain_pass(models, steps, seed):
    engine, plain = models
    engine.rewind(0)
    tokens = []
    for number, (step, amount) in enumerate(steps):
        if step == "rewind":
            tokens = tokens[: round(amount * len(tokens))]
            engine.rewind(len(tokens))
            continue
        new = text(min(amount, CONTEXT - len(tokens)), [seed, number])
        if not new:
            continue
        if step == "prefill":
            rows = engine.prefill(new)[None]
        elif step == "score":
            rows = all_logits(engine, new)
        else:
            rows = np.stack([engine.decode(token).copy() for token in new])
        tokens += new
        assert engine.tokens == tokens
        assert_close(rows, plain.logits(tokens)[-len(rows) :])


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_and_single_steps_agree_at_every_boundary(models, length):
    engine, plain = models
    ids = text(length + 1)
    expected = plain.logits(ids)
    engine.rewind(0)
    assert_close(engine.prefill(ids[:length]), expected[-2])
    assert_close(engine.decode(ids[-1]), expected[-1])
    engine.rewind(0)
    for token, row in zip(ids, expected, strict=True):
        assert_close(engine.decode(token), row)


def test_a_whole_context_fits_and_the_last_logits_are_right(models):
    engine, plain = models
    ids = text(CONTEXT)
    engine.rewind(0)
    engine.prefill(ids[:-1])
    assert_close(engine.decode(ids[-1]), plain.logits(ids)[-1])


def test_int8_engine_agrees_with_its_interchange_graph_and_follows_fp32(tiny_bundles, models):
    _, exact = models
    path = tiny_bundles / exact.path.name.replace("fp32", "int8")
    engine, plain = Engine(Bundle.open(path), threads=1), Interchange(path)
    ids = text(40)
    found, same, near = all_logits(engine, ids), plain.logits(ids), exact.logits(ids)
    assert np.abs(found - same).mean() < 0.02 * near.std()
    assert np.abs(found - near).mean() < 0.08 * near.std()


# onnxruntime's attention takes one token at a time when a batch of more than one has a past.
@pytest.mark.parametrize("batch, cuts", [(1, [6, 7, 8, 20, 21]), (2, range(6, 30)), (2, [])])
def test_interchange_graph_grows_its_past_and_agrees_with_the_engine(models, batch, cuts):
    engine, plain = models
    rows = [text(30, seed) for seed in range(batch)]
    past, found = plain.empty(batch), []
    for first, end in itertools.pairwise([0, *cuts, 30]):
        logits, past = plain.step([row[first:end] for row in rows], past)
        found.append(logits)
    for row, logits in zip(rows, np.concatenate(found, axis=1), strict=True):
        engine.rewind(0)
        assert_close(logits, all_logits(engine, row))


def test_two_engines_do_not_see_each_others_tokens(tiny_bundles):
    path = tiny_bundles / "gemma3-fp32"
    bundle, plain = Bundle.open(path), Interchange(path)
    engines = [Engine(bundle, threads=1) for _ in range(2)]
    texts = [text(30, seed) for seed in (3, 4)]
    expected = [plain.logits(ids) for ids in texts]
    for engine, ids in zip(engines, texts, strict=True):
        engine.prefill(ids[:10])
    for i in range(10, 30):
        for engine, ids, rows in zip(engines, texts, expected, strict=True):
            assert_close(engine.decode(ids[i]), rows[i])


def test_threads_do_not_change_the_logits(tiny_bundles):
    bundle = Bundle.open(tiny_bundles / "gemma3-fp32")
    one, two = (Engine(bundle, threads).prefill(text(40)) for threads in (1, 2))
    assert_close(one, two)


def test_logits_of_prefill_are_not_overwritten_by_what_follows(models):
    engine, _ = models
    engine.rewind(0)
    logits = engine.prefill(text(20))
    before = logits.copy()
    engine.decode(5)
    engine.prefill(text(20, 1))
    np.testing.assert_array_equal(logits, before)


# --- what is refused, and that nothing is lost ----------------------------------------------------


@pytest.mark.parametrize("method", ["prefill", "score", "decode"])
def test_overflow_is_refused_with_both_counts_and_loses_nothing(short_engine, tiny_bundles, method):
    ids = text(SHORT_CONTEXT)
    held = SHORT_CONTEXT if method == "decode" else 10
    short_engine.prefill(ids[:held])
    run = {
        "prefill": lambda: short_engine.prefill(ids[:7]),
        "score": lambda: all_logits(short_engine, ids[:7]),
        "decode": lambda: short_engine.decode(ids[0]),
    }[method]
    with pytest.raises(RequestError, match=r"\b17 tokens\b.*\bholds 16\b"):
        run()
    assert short_engine.tokens == ids[:held]
    short_engine.rewind(held - 1)
    expected = Interchange(tiny_bundles / "short").logits(ids)
    assert_close(short_engine.decode(ids[held - 1]), expected[held - 1])
    if held < SHORT_CONTEXT:
        assert_close(short_engine.prefill(ids[held:]), expected[-1])


@pytest.mark.parametrize("bad", [-1, VOCABULARY_SIZE, 1 << 40])
@pytest.mark.parametrize("place", [0, 3, 11])
def test_an_id_outside_the_vocabulary_is_refused_before_anything_runs(short_engine, bad, place):
    short_engine.prefill(text(2))
    ids = text(12)
    ids[place] = bad
    for run in (short_engine.prefill, lambda ids: all_logits(short_engine, ids)):
        with pytest.raises(RequestError, match=f"token id {bad} .*vocabulary of {VOCABULARY_SIZE}"):
            run(ids)
    with pytest.raises(RequestError, match="vocabulary"):
        short_engine.decode(bad)
    assert short_engine.tokens == text(2)


def test_an_empty_prompt_is_refused(short_engine):
    for run in (short_engine.prefill, lambda ids: all_logits(short_engine, ids)):
        with pytest.raises(RequestError, match="empty"):
            run([])
    assert short_engine.tokens == []


@pytest.mark.parametrize("length", [-1, 4])
def test_a_rewind_to_tokens_it_does_not_hold_is_refused(short_engine, length):
    short_engine.prefill(text(3))
    with pytest.raises(ValueError, match=f"cannot rewind 3 tokens to {length}"):
        short_engine.rewind(length)
    assert short_engine.tokens == text(3)


def test_scores_left_in_the_middle_leave_the_tokens_that_were_run(models):
    engine, plain = models
    engine.rewind(0)
    ids = text(10)
    next(engine.all_logits(ids))
    assert engine.tokens == ids[:SCORE_CHUNK]
    assert_close(engine.prefill(ids[SCORE_CHUNK:]), plain.logits(ids)[-1])


@pytest.mark.parametrize("held", range(1, 2 * (WINDOW + SLACK) + 1))
@pytest.mark.parametrize("new", [1, PREFILL_CHUNK, 3 * PREFILL_CHUNK])
def test_a_run_that_is_interrupted_is_as_if_it_had_not_been(models, held, new):
    """Ctrl-C is noticed when onnxruntime returns: then the buffers have the new tokens already."""
    engine, plain = models
    ids = text(held + new + 1)
    engine.rewind(0)
    engine.prefill(ids[:held])
    with interrupted_runs():
        if new == 1:
            engine.decode(7)
        else:
            engine.prefill(text(new, seed=1))
    assert engine.tokens == ids[:held]
    assert_close(engine.decode(ids[held]), plain.logits(ids[: held + 1])[-1])
    assert_close(engine.prefill(ids[held + 1 :]), plain.logits(ids)[-1])


# --- buffers and tables ---------------------------------------------------------------------------


def test_buffers_grow_in_steps_and_end_at_the_context(short_engine):
    windows = short_engine.cache_bytes  # of one size, whatever the context
    assert windows > 0
    sizes = []
    for token in text(SHORT_CONTEXT):
        short_engine.decode(token)
        sizes.append(short_engine.cache_bytes - windows)
    assert sizes[:STEP] == [sizes[0]] * STEP
    assert sizes[STEP:] == [2 * sizes[0]] * (SHORT_CONTEXT - STEP)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.integers(0, 1000))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_growing_keeps_what_was_written(tiny_bundles, lengths, seed):
    bundle = Bundle.open(tiny_bundles / "gemma3-fp32")
    cache = KVCache(bundle.engine, bundle.ropes, bundle.windows, 100)
    windowed = {s.name for s in bundle.engine.inputs if s.shape[2:3] == ("window_capacity.0",)}
    assert 0 < len(windowed) < len(cache.buffers)
    rng = np.random.default_rng(seed)
    written: dict[str, np.ndarray] = {}
    for length in lengths:
        before = cache.capacity
        assert cache.reserve(length) == (length > before)
        assert max(length, before) <= cache.capacity <= 100
        for name, array in written.items():
            np.testing.assert_array_equal(cache.buffers[name][:, :, :before], array)
        for name, buffer in cache.buffers.items():
            if name in windowed:
                assert buffer.shape == (1, 2, WINDOW + SLACK, 32)
                continue
            assert buffer.shape == (1, 2, cache.capacity, 32)
            buffer[:] = rng.random(buffer.shape)
            written[name] = buffer.copy()
        assert {len(table) for table in cache.tables.values()} == {cache.capacity}


@pytest.mark.parametrize("theta, scale", [(10_000.0, 1.0), (1_000_000.0, 8.0), (100.0, 1.0)])
def test_rotary_tables_are_the_papers(theta, scale):
    cos, sin = rope_table(RopeSpec("rope.0", theta, scale, 128), 600)
    angles = np.arange(600)[:, None] * theta ** -(np.arange(128) / 128) / scale
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=1e-4)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=1e-4)


# --- what a device has to install -----------------------------------------------------------------


def test_no_module_of_edge_demo_imports_what_a_device_does_not_have():
    code = """
import importlib, pkgutil, sys
import edge_demo
names = [m.name for m in pkgutil.walk_packages(edge_demo.__path__, "edge_demo.")]
for name in names:
    importlib.import_module(name)
for name in edge_demo.__all__:
    getattr(edge_demo, name)
print(*names)
print(*sorted({m.split(".")[0] for m in sys.modules}))
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    names, loaded = (line.split() for line in result.stdout.splitlines())
    assert {"edge_demo.engine.runner", "edge_demo.cli.main", "edge_demo.evaluate.speed"} <= set(
        names
    )
    heavy = {
        "gemma_keras", "export", "keras", "keras_hub", "keras_nlp", "tensorflow", "jax", "torch",
        "onnx", "onnx_ir", "tf2onnx", "gguf", "transformers", "safetensors", "google", "rich",
    }  # fmt: skip
    assert not heavy & set(loaded)
    assert {"onnxruntime", "numpy", "sentencepiece"} <= set(loaded)
