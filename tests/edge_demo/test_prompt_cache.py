"""Keys and values in a file: going on from them is going on, and nothing else is taken for them."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.engine import cache_size, memory
from edge_demo.engine.kv_cache import _resident as resident_places
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import RequestError
from edge_demo.text.prompt_cache import CacheError, PromptCache
from tests.conftest import ROOT
from tests.edge_demo.bundle_files import copy_bundle, edit_manifest
from tests.edge_demo.conftest import interrupted_runs, short_boundaries
from tests.models import GENERATIONS, VOCABULARY_SIZE, WINDOW

STEP, SLACK, PREFILL_CHUNK = 8, 3, 5
CONTEXT = 128
LENGTHS = sorted(
    {
        n + d
        for n in (WINDOW, WINDOW + SLACK, PREFILL_CHUNK, STEP, 2 * STEP, 2 * WINDOW + SLACK, 40)
        for d in (-1, 0, 1)
    }
)


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    with short_boundaries(STEP, SLACK, PREFILL_CHUNK):
        yield


@pytest.fixture(
    scope="module", params=[(g, r) for g in GENERATIONS for r in ("fp32", "int8", "int8-cache")]
)
def pairs(request, tiny_bundles):
    """Two engines of each kind."""
    bundle = Bundle.open(tiny_bundles / "-".join(request.param))
    return {kind: [kind(bundle, threads=1) for _ in range(2)] for kind in (Engine, CandidateEngine)}


@pytest.fixture
def engine(tiny_bundles):
    return Engine(Bundle.open(tiny_bundles / "gemma3-fp32"), threads=1)


@pytest.fixture
def tiny(tiny_bundles):
    return tiny_bundles / "gemma3-int8"


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, length).tolist()


def hold(engine, ids):
    engine.rewind(0)
    engine.prefill(ids)


def rows(engine, ids, cut):
    """What comes, to the bit, when some tokens are run at once and the others one by one."""

    def bits(found):
        if isinstance(engine, CandidateEngine):
            return found.ids.tobytes(), found.logits.tobytes()
        return found.tobytes()

    # at once: the next call uses the arrays again
    first = [bits(engine.prefill(ids[:cut]))] if cut else []
    return first + [bits(engine.decode(token)) for token in ids[cut:]]


def left_over(folder):
    return [name for name in os.listdir(folder) if name.endswith(".partial")]


# --- going on is going on ------------------------------------------------------------------------


def check_going_on(engines, path, held, new, cut, rewound=0):
    plain, loaded = engines
    hold(plain, text(held + rewound))
    plain.rewind(held)
    PromptCache(path).save(plain)
    hold(loaded, text(31, seed=9))  # what is held before makes no difference
    assert PromptCache(path).load(loaded) == held
    assert loaded.tokens == plain.tokens == text(held + rewound)[:held]
    ids = text(new, seed=1)
    assert rows(plain, ids, cut) == rows(loaded, ids, cut)


@pytest.mark.parametrize("kind", [Engine, CandidateEngine])
@pytest.mark.parametrize("held", LENGTHS)
def test_logits_are_equal_to_the_bit_at_every_boundary(pairs, tmp_path, kind, held):
    check_going_on(pairs[kind], tmp_path / "p", held, 2 * (WINDOW + SLACK), WINDOW)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    held=st.integers(1, 60), new=st.integers(1, 30), cut=st.integers(0, 30), back=st.integers(0, 20)
)
def test_logits_are_equal_to_the_bit_whatever_was_run_and_taken_back(
    pairs, tmp_path_factory, held, new, cut, back
):
    path = tmp_path_factory.getbasetemp() / "any.cache"
    check_going_on(pairs[Engine], path, held, new, min(cut, new), back)


@pytest.mark.parametrize("held", LENGTHS)
def test_both_kinds_of_engine_share_a_file(pairs, tmp_path, held):
    for saver, goes_on in ((Engine, CandidateEngine), (CandidateEngine, Engine)):
        hold(pairs[saver][0], text(held))
        PromptCache(tmp_path / "p").save(pairs[saver][0])
        plain, loaded = pairs[goes_on]
        hold(plain, text(held))
        PromptCache(tmp_path / "p").load(loaded)
        ids = text(20, seed=1)
        assert rows(plain, ids, 9) == rows(loaded, ids, 9)


def test_a_fresh_engine_goes_on_and_can_go_back(engine, tiny_bundles, tmp_path):
    hold(engine, text(50))
    PromptCache(tmp_path / "p").save(engine)
    fresh = Engine(Bundle.open(tiny_bundles / "gemma3-fp32"), threads=1)
    PromptCache(tmp_path / "p").load(fresh)
    for back in (49, 48, 20, 0):
        engine.rewind(back)
        fresh.rewind(back)
        assert rows(engine, text(12, back), 5) == rows(fresh, text(12, back), 5)
        engine.rewind(back)
        fresh.rewind(back)


def test_a_whole_context_can_be_kept(engine, tmp_path):
    hold(engine, text(CONTEXT))
    PromptCache(tmp_path / "p").save(engine)
    engine.rewind(0)
    assert PromptCache(tmp_path / "p").load(engine) == CONTEXT
    with pytest.raises(RequestError, match="129 tokens"):
        engine.decode(3)


def test_what_an_interrupted_run_left_is_not_kept(engine, tmp_path):
    hold(engine, text(20))
    with interrupted_runs():
        engine.prefill(text(5, seed=3))
    PromptCache(tmp_path / "p").save(engine)
    expected = rows(engine, text(9, seed=1), 4)
    assert PromptCache(tmp_path / "p").load(engine) == 20
    assert rows(engine, text(9, seed=1), 4) == expected


def test_only_what_windows_still_hold_is_written(engine, tmp_path):
    for length in (5, 100):
        hold(engine, text(length))
        PromptCache(tmp_path / "p").save(engine)
        header = read_header(tmp_path / "p")
        places = {e["shape"][2] for n, e in header.items() if n.startswith("past")}
        resident = length if length == 5 else resident_places(length, WINDOW)
        assert places == {length, resident} and resident <= WINDOW + SLACK


def test_safetensors_reads_the_file(engine, tmp_path):
    safe_open = pytest.importorskip("safetensors").safe_open  # no device has it

    hold(engine, text(20))
    PromptCache(tmp_path / "p").save(engine)
    with safe_open(tmp_path / "p", "numpy") as file:
        assert file.get_tensor("tokens").tolist() == text(20)
        for name, array in engine.snapshot().filled.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


# --- what is not taken for it --------------------------------------------------------------------


def read_header(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])


def rewrite(path, change, arrays=lambda data: data):
    """Change header and arrays, and give them the right checksum."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), arrays(bytearray(data[8 + length :]))
    header["__metadata__"]["crc32"] = f"{zlib.crc32(body):08x}"
    change(header)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)


@pytest.fixture(scope="module")
def kept(tiny_bundles, tmp_path_factory):
    """An engine, a good file of 20 tokens, and the logits after one more."""
    engine = Engine(Bundle.open(tiny_bundles / "gemma3-fp32"), threads=1)
    hold(engine, text(20))
    path = tmp_path_factory.mktemp("kept") / "good"
    PromptCache(path).save(engine)
    return engine, path, rows(engine, [5], 0)


def refused(engine, path, match):
    """The file is refused, and what the engine held is held still."""
    hold(engine, text(6, seed=4))
    with pytest.raises((CacheError, RequestError), match=match) as error:
        PromptCache(path).load(engine)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert engine.tokens == text(6, seed=4)
    after = rows(engine, text(3, seed=5), 1)
    hold(engine, text(6, seed=4))
    assert rows(engine, text(3, seed=5), 1) == after


@settings(max_examples=300, deadline=None, derandomize=True)
@given(place=st.one_of(st.floats(0, 1), st.integers(0, 4000)), bit=st.integers(0, 7))
def test_any_changed_bit_is_noticed(kept, place, bit):
    engine, good, _ = kept
    data = bytearray(good.read_bytes())
    offset = place if isinstance(place, int) else int(place * (len(data) - 1))
    data[offset] ^= 1 << bit
    damaged = good.with_name("damaged")
    damaged.write_bytes(data)
    refused(
        engine, damaged, "damaged|not a prompt cache|version|bundle|onnxruntime|processor|context"
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.03, 0.5, 0.999])
def test_a_file_that_ends_early_or_late_is_noticed(kept, tmp_path, share):
    engine, good, _ = kept
    data = good.read_bytes()
    (tmp_path / "p").write_bytes(data[: 1 + int(share * len(data))])
    refused(engine, tmp_path / "p", "damaged|not a prompt cache")
    (tmp_path / "p").write_bytes(data + data[: 1 + int(share * len(data))])
    refused(engine, tmp_path / "p", "damaged")


CRAFTED = {
    "token outside": (lambda h: None, "outside the vocabulary"),
    "negative token": (lambda h: None, "outside the vocabulary"),
    "not a number": (lambda h: None, "not finite"),
    "version": (lambda h: h["__metadata__"].update(format_version="1"), "format version '1'"),
    "bundle": (lambda h: h["__metadata__"].update(bundle="0" * 64), "another bundle"),
    "onnxruntime": (lambda h: h["__metadata__"].update(onnxruntime="1.0"), "onnxruntime '1.0'"),
    "processor": (lambda h: h["__metadata__"].update(processor="x86_64 486"), "another processor"),
    "no prompt_run": (lambda h: h["__metadata__"].pop("run_as_prompt"), "how its tokens were run"),
    "long prompt_run": (
        lambda h: h["__metadata__"].update(run_as_prompt="21 of 30 tokens"),
        "more tokens than the file holds",
    ),
    "no tokens": (lambda h: h["tokens"].update(shape=[0]), "no tokens"),
    "true tokens": (lambda h: h["tokens"].update(shape=[True]), "no tokens"),
    "half a token": (lambda h: h["tokens"].update(shape=[20.5]), "no tokens"),
    "too many tokens": (lambda h: h["tokens"].update(shape=[1 << 40]), "the context of 128"),
    "other count": (lambda h: h["tokens"].update(shape=[21]), "arrays"),
    "other type": (lambda h: h["tokens"].update(dtype="I64"), "arrays"),
    "array missing": (lambda h: h.pop("past_key_values.0.key"), "arrays"),
    "array more": (lambda h: h.update(more=h["tokens"]), "arrays"),
    "overlap": (lambda h: h["tokens"].update(data_offsets=[4, 84]), "arrays"),
    "no metadata": (lambda h: h["__metadata__"].pop("bundle"), "another bundle"),
    "list": (lambda h: h.update(tokens=[]), "its header"),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_what_somebody_made_up_is_refused(kept, tmp_path, case):
    engine, good, _ = kept
    (tmp_path / "p").write_bytes(good.read_bytes())
    change, match = CRAFTED[case]

    def arrays(data):
        if case == "token outside":
            data[:4] = VOCABULARY_SIZE.to_bytes(4, "little")
        if case == "negative token":
            data[:4] = (-1).to_bytes(4, "little", signed=True)
        if case == "not a number":
            data[80:84] = np.float32(np.nan).tobytes()
        return data

    rewrite(tmp_path / "p", change, arrays)
    refused(engine, tmp_path / "p", match)


def test_a_made_up_file_that_is_as_ours_is_taken(kept, tmp_path):
    """Guards the cases above: their checksum and layout are right."""
    engine, good, expected = kept
    (tmp_path / "p").write_bytes(good.read_bytes())
    rewrite(tmp_path / "p", lambda header: None)
    assert PromptCache(tmp_path / "p").load(engine) == 20
    assert rows(engine, [5], 0) == expected


@pytest.mark.parametrize("what", ["weights", "graph", "rotary base", "window"])
def test_a_bundle_that_differs_in_anything_that_matters_is_another(
    kept, tmp_path, what, tiny_bundles
):
    _, good, _ = kept
    bundle = copy_bundle(tiny_bundles / "gemma3-fp32", tmp_path / "bundle")

    def edit(manifest):
        if what in ("weights", "graph"):
            name = manifest["weights"] if what == "weights" else "engine.onnx"
            manifest["files"][name]["sha256"] = "0" * 64
        elif what == "window":
            manifest["windows"][0]["length"] += 1
        else:
            manifest["ropes"][0]["theta"] += 1

    same = Bundle.open(bundle).fingerprint
    assert same == Bundle.open(tiny_bundles / "gemma3-fp32").fingerprint
    assert same == read_header(good)["__metadata__"]["bundle"]
    edit_manifest(bundle, edit)
    assert Bundle.open(bundle).fingerprint != same


# --- the file ------------------------------------------------------------------------------------


def test_the_file_is_its_owners_and_a_link_stays_one(engine, tmp_path):
    hold(engine, text(9))
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for _ in range(2):
        PromptCache(tmp_path / "link").save(engine)
        assert (tmp_path / "link").is_symlink()
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_an_empty_file_is_none_yet(engine, tmp_path):
    (tmp_path / "p").touch()
    assert PromptCache(tmp_path / "p").load(engine) == 0


SAVE_AGAIN_AND_AGAIN = """
import sys
from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from edge_demo.text.prompt_cache import PromptCache
engines = {length: Engine(Bundle.open(sys.argv[1]), threads=1) for length in (40, 90)}
for length, engine in engines.items():
    engine.prefill(list(range(length)))
while True:  # nothing but writing, so that most kills come while it writes
    for length, engine in engines.items():
        PromptCache(sys.argv[2]).save(engine)
        print(length, flush=True)
"""


def test_a_writer_that_is_killed_at_any_time_leaves_a_good_file(tiny_bundles, tmp_path):
    # with the sizes of windows that the other process has
    engine = load_afresh = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_size, "SLACK", 256)
        engine = Engine(Bundle.open(tiny_bundles / "gemma3-fp32"), threads=1)
        load_afresh = PromptCache(tmp_path / "p").load
        pauses = np.random.default_rng(0).random(100)
        found_left_over = 0
        for kills, pause in enumerate(pauses):
            if kills >= 12 and found_left_over:
                break
            process = subprocess.Popen(
                [sys.executable, "-c", SAVE_AGAIN_AND_AGAIN, tiny_bundles / "gemma3-fp32", tmp_path / "p"],
                cwd=ROOT, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert process.stdout.readline() == b"40\n"
            start = time.monotonic()
            assert process.stdout.readline() == b"90\n"
            time.sleep(pause * (time.monotonic() - start))  # within the next round, fast or slow
            process.kill()
            assert process.wait() == -signal.SIGKILL
            process.stdout.close()
            found_left_over += len(left_over(tmp_path))
            assert len(left_over(tmp_path)) <= 1
            assert load_afresh(engine) in (40, 90)
            assert engine.tokens == list(range(len(engine.tokens)))
        assert found_left_over  # else no kill came while it wrote
        PromptCache(tmp_path / "p").save(engine)
        assert os.listdir(tmp_path) == ["p"]


# --- the real model ------------------------------------------------------------------------------


@pytest.mark.sample
def test_the_real_model_goes_on_to_the_bit(sample_bundle, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_size, "SLACK", 256)
        patch.setattr(memory, "CHUNKS", (512,))
        bundle = Bundle.open(sample_bundle)
        plain, loaded = (CandidateEngine(bundle, threads=1) for _ in range(2))
        ids = np.random.default_rng(0).integers(3, 200_000, 830).tolist()
        plain.prefill(ids[:800])  # beyond the window and its slack
        PromptCache(tmp_path / "p").save(plain)
        assert PromptCache(tmp_path / "p").load(loaded) == 800
        assert rows(plain, ids[800:], 20) == rows(loaded, ids[800:], 20)
