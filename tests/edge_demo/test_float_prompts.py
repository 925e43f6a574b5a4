"""Prompts in float32 against one plain pass of the same graph, and where they are run so."""

from __future__ import annotations

import dataclasses
import platform

import numpy as np
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.device.memory_limits import MemoryLimit
from edge_demo.engine import float_prompts, memory
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import BundleError, EdgeError
from tests.edge_demo.bundle_files import copy_bundle
from tests.edge_demo.conftest import interrupted_runs, short_boundaries
from tests.models import GENERATIONS, VOCABULARY_SIZE, WINDOW

CHUNK = 8
FEWEST = 3
PLAIN_AMD = "processor : 0\nflags\t\t: fpu sse2 avx2 fma\n"
ZEN_3 = (
    "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\n"
    "model name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 fma\n"
)
PI_4 = "processor : 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv(float_prompts.VARIABLE, "1")
    monkeypatch.setattr(float_prompts, "FEWEST", FEWEST)


@pytest.fixture(scope="module", params=GENERATIONS)
def bundle(request, tiny_bundles):
    return Bundle.open(tiny_bundles / f"{request.param}-int8")


@pytest.fixture(scope="module")
def plain_pass(bundle, tmp_path_factory):
    """All tokens at once through the graph in float32, as any other graph is run."""
    folder = copy_bundle(bundle.path, tmp_path_factory.mktemp("plain") / "bundle")
    (folder / "float.onnx").write_bytes(float_prompts.graph_in_float(bundle))
    graph = dataclasses.replace(bundle.engine, file="float.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(float_prompts.VARIABLE, "0")
        engine = Engine(dataclasses.replace(bundle, path=folder, engine=graph), threads=1)

    def run(ids):
        engine.rewind(0)
        engine.prefill(ids)
        return engine.snapshot()

    return run


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, length).tolist()


def furthest(found, expected, tokens):
    """Greatest difference in what the first tokens left, in units of its standard deviation."""
    return max(
        np.abs(found.filled[name] - array)[:, :, :tokens].max() / array.std()
        for name, array in expected.filled.items()
    )


# --- the same as in one pass ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Engine, CandidateEngine])
@pytest.mark.parametrize(
    "length", [FEWEST + 2, WINDOW - 1, WINDOW, WINDOW + 1, CHUNK, CHUNK + 1, 2 * CHUNK + FEWEST + 1]
)
def test_a_prompt_leaves_what_one_pass_in_float32_leaves(bundle, plain_pass, asked, kind, length):
    """But for its last token, which is run as those that follow are."""
    ids = text(length)
    with short_boundaries(step=16, slack=100, chunk=CHUNK):
        engine = kind(bundle, threads=1)
        engine.prefill(ids)
        rounded = Engine(bundle, threads=1)
        rounded._prompts = None
        rounded.prefill(ids)
        expected = plain_pass(ids)
        assert engine.tokens == ids
        assert furthest(engine.snapshot(), expected, length - 1) < 1e-4
        if platform.machine() == "x86_64":  # ARM without dot products does not round either
            assert furthest(rounded.snapshot(), expected, length - 1) > 1e-3


def test_the_logits_after_it_are_near_and_the_next_steps_go_on_from_it(bundle, plain_pass, asked):
    ids = text(40)
    engine, again = Engine(bundle, threads=1), Engine(bundle, threads=1)
    engine.prefill(ids[:30])
    again.restore(plain_pass(ids[:29]))
    again.decode(ids[29])
    for token in ids[30:]:
        found, expected = engine.decode(token), again.decode(token)
        assert np.abs(found - expected).max() < 0.05 * expected.std()


def test_fewer_tokens_are_run_as_they_are_decoded(bundle, asked):
    ids = text(FEWEST)
    found, expected = Engine(bundle, threads=1), Engine(bundle, threads=1)
    expected._prompts = None
    np.testing.assert_array_equal(found.prefill(ids), expected.prefill(ids))
    assert found._prompts is not None


def test_progress_is_called_for_every_token_once(bundle, asked):
    told = []
    with short_boundaries(step=16, slack=5, chunk=CHUNK):
        engine = Engine(bundle, threads=1)
        engine.prefill(text(2 * CHUNK), on_progress=lambda *counts: told.append(counts))
    assert told == [(8, 16), (15, 16), (16, 16)]


def test_after_ctrl_c_it_goes_on_as_if_nothing_had_been(bundle, asked):
    """A window's buffer may have moved on by then, so what it held is run again."""
    ids = text(60)
    with short_boundaries(step=16, slack=5, chunk=CHUNK):
        engine, expected = Engine(bundle, threads=1), Engine(bundle, threads=1)
        engine.prefill(ids[:30])
        with interrupted_runs():
            engine.prefill(ids[30:])
        assert engine.tokens == ids[:30]
        expected.prefill(ids[:30])
        np.testing.assert_array_equal(engine.prefill(ids[30:]), expected.prefill(ids[30:]))


# --- where it is run so --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (PLAIN_AMD, True),
        (PLAIN_AMD.replace("fma", "fma avx512f avx512_vnni"), False),
        (PLAIN_AMD.replace("fma", "fma avx_vnni"), False),
        (ZEN_3, False),
        (ZEN_3.replace(": 25", ": 23"), True),
        (PI_4, False),
        (PI_4.replace("cpuid", "cpuid asimddp"), False),
        ("nonsense", False),
        (None, False),
    ],
)
def test_x86_without_vnni_prefers_it(tiny_bundles, tmp_path, monkeypatch, cpuinfo, expected):
    monkeypatch.delenv(float_prompts.VARIABLE, raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    bundle = Bundle.open(tiny_bundles / "gemma3-int8")
    assert float_prompts.preferred(bundle, file) is expected
    monkeypatch.setenv(float_prompts.VARIABLE, "0")
    assert not float_prompts.preferred(bundle, file)
    monkeypatch.setenv(float_prompts.VARIABLE, "1")
    assert float_prompts.preferred(bundle, file)
    without_integers = Bundle.open(tiny_bundles / "gemma3-fp32")
    assert not float_prompts.preferred(without_integers, file)
    monkeypatch.delenv(float_prompts.VARIABLE)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not float_prompts.preferred(bundle, file)


def test_every_product_is_told(bundle):
    before = (bundle.path / bundle.engine.file).read_bytes()
    after = float_prompts.graph_in_float(bundle)
    changed = np.flatnonzero(np.frombuffer(before, "u1") != np.frombuffer(after, "u1"))
    assert len(after) == len(before)
    layers = len(bundle.manifest["model"]["config"]["layers"])
    assert len(changed) == before.count(b"accuracy_level") == 5 * layers + 2  # the head's planes


def test_it_is_left_where_memory_would_not_hold_the_weights_twice(tiny_bundles, monkeypatch):
    monkeypatch.setenv(float_prompts.VARIABLE, "1")
    bundle = Bundle.open(tiny_bundles / "gemma3-int8")
    least = memory.estimate(bundle, bundle.engine)
    more = memory.estimate(bundle, bundle.engine, in_float=True)
    assert not least.in_float and more.in_float
    assert 0 < more.read_again < more.mapped_again
    assert more.anonymous == least.anonymous + more.multiplied_out
    assert more.peak == least.peak + more.read_again + more.multiplied_out
    for free, expected in (
        (more.resident + more.read_again, (memory.FLOAT_CHUNK, True)),
        (more.resident + more.read_again - 1, (memory.CHUNKS[0], False)),
    ):
        room = MemoryLimit("here", "resident", free)
        monkeypatch.setattr(memory, "memory_limits", lambda room=room: [room])
        monkeypatch.setattr(memory, "read_sizes", lambda text: {})
        assert memory.check_fits(bundle, bundle.engine) == expected


def test_what_other_models_hold_is_no_room_for_it(tiny_bundles, monkeypatch):
    monkeypatch.setenv(float_prompts.VARIABLE, "1")
    bundle = Bundle.open(tiny_bundles / "gemma3-int8")
    more = memory.estimate(bundle, bundle.engine, in_float=True)
    monkeypatch.setattr(memory, "read_sizes", lambda text: {"RssAnon": 10**12})
    monkeypatch.setattr(memory, "memory_limits", lambda: [MemoryLimit("here", "resident", free)])
    free = more.resident + more.read_again - more.process - memory._LIBRARIES
    assert memory.check_fits(bundle, bundle.engine)[1]
    free -= 1
    assert not memory.check_fits(bundle, bundle.engine)[1]


def test_a_graph_that_cannot_be_read_does_not_undo_what_memory_allows(
    tiny_bundles, tmp_path, monkeypatch
):
    monkeypatch.setenv(float_prompts.VARIABLE, "1")
    bundle = Bundle.open(copy_bundle(tiny_bundles / "gemma3-int8", tmp_path / "bundle"))
    file = bundle.path / "engine.onnx"
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-1000]), file.unlink):
        damage()
        assert memory.check_fits(bundle, bundle.candidates) == (memory.CHUNKS[0], False)
        with monkeypatch.context() as patch:
            patch.setattr(memory, "memory_limits", lambda: [MemoryLimit("here", "resident", 10**6)])
            patch.setattr(memory, "read_sizes", lambda text: {})
            with pytest.raises(EdgeError, match="1 MB is available here"):
                memory.check_fits(bundle, bundle.candidates)


def test_a_graph_with_other_keys_and_values_is_refused(tiny_bundles, asked):
    """Both graphs write to the same buffers, which are the other's."""
    bundle = Bundle.open(tiny_bundles / "gemma3-int8")
    other = Bundle.open(tiny_bundles / "gemma2-int8")
    for inputs in (other.engine.inputs, bundle.engine.inputs[:-1]):
        wrong = dataclasses.replace(bundle.engine, inputs=inputs)
        with pytest.raises(
            BundleError, match=r"engine\.onnx does not match (bundle\.json|the engine): '"
        ):
            CandidateEngine(dataclasses.replace(bundle, engine=wrong), threads=1)
