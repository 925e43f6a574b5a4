"""Comparing two bundles: the figures by hand on small arrays, the whole against a slow computation."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from edge_demo.errors import RequestError
from edge_demo.evaluate.compare import MeanWithError, as_table, check_comparable, compare, summarize
from edge_demo.evaluate.perplexity import kl_divergence, token_log_probabilities
from tests.edge_demo.bundle_files import copy_bundle, edit_manifest, rewrite
from tests.models import VOCABULARY_SIZE, chat_tokenizer_model

BOS = 2
LN2 = math.log(2)


def near(value, error):
    return MeanWithError(pytest.approx(value, abs=1e-6), pytest.approx(error, abs=1e-6))


def test_the_figures_of_four_positions_worked_out_by_hand():
    """Right token's probabilities 1/2, 1/4, 1/2, 1/4 and 1/4, 1/4, 1/2, 1/2; three positions less 1."""
    found = summarize(
        np.array([LN2, 2 * LN2, LN2, 2 * LN2]),
        np.array([2 * LN2, 2 * LN2, LN2, LN2]),
        np.array([2.0, 0.0, 7.0, 1.0]),
        np.array([True, True, False, True]),
    )
    assert found.positions == 4
    assert found.reference_perplexity == near(2.828427, 0.565952)
    assert found.perplexity == near(2.828427, 0.565952)
    assert found.log_ratio == near(0, 0.282976)
    assert found.kl == near(2.5, 1.554563)
    assert found.kl_quantiles == tuple(
        (share, pytest.approx(value))
        for share, value in ((0.5, 1.5), (0.9, 5.5), (0.95, 6.25), (0.99, 6.85), (0.999, 6.985), (1, 7))
    )  # fmt: skip
    assert found.probability_difference == near(0, 0.102062)
    assert found.rms_probability_difference == near(0.176777, 0.051031)
    assert found.same_top_token == near(0.75, 0.25)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(11, 60), st.integers(0, 999))
def test_standard_errors_are_those_of_llama_cpps_sums(count, seed):
    rng = np.random.default_rng(seed)
    base, nll = rng.gamma(2, 1.5, (2, count))
    found = summarize(base, nll, rng.random(count), rng.random(count) < 0.9)

    def uncertainty(x):
        return math.sqrt(((x * x).sum() / count - (x.sum() / count) ** 2) / (count - 1))

    covariance = ((nll * base).mean() - nll.mean() * base.mean()) / (count - 1)
    ratio = math.sqrt(uncertainty(nll) ** 2 + uncertainty(base) ** 2 - 2 * covariance)
    difference = np.exp(-nll) - np.exp(-base)
    rms = math.sqrt((difference**2).mean())
    share = found.same_top_token.value
    assert found.log_ratio.error == pytest.approx(ratio)
    assert found.perplexity.error == pytest.approx(math.exp(nll.mean()) * uncertainty(nll))
    assert found.probability_difference.error == pytest.approx(uncertainty(difference))
    assert found.rms_probability_difference == MeanWithError(
        pytest.approx(rms), pytest.approx(0.5 / rms * uncertainty(difference**2))
    )
    assert found.same_top_token.error == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))


def test_divergences_worked_out_by_hand():
    quarter = np.array([[0.0, math.log(3)], [5.0, 5.0], [0.0, math.log(3)]], np.float32)
    half = np.array([[0.0, 0.0], [-7.0, -7.0], [10.0, 10 + math.log(3)]], np.float32)
    # 1/4 ln(1/2) + 3/4 ln(3/2)
    assert kl_divergence(quarter, half) == pytest.approx([0.1308120, 0, 0], abs=1e-6)
    # 1/2 ln 2 + 1/2 ln(2/3)
    assert kl_divergence(half[:1], quarter[:1]) == pytest.approx([0.1438410], abs=1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 50), st.sampled_from([1e-3, 1.0, 30.0, 1e4]), st.integers(0, 99))  # fmt: skip
def test_divergences_are_those_of_the_definition_and_none_is_negative(rows, size, spread, seed):
    p, q = (np.random.default_rng(seed).normal(size=(2, rows, size)) * spread).astype(np.float32)
    log_p, log_q = (
        x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), axis=1, keepdims=True)
        for x in (p, q)
    )
    found = kl_divergence(p, q)
    assert found.dtype == np.float64 and found.shape == (rows,)
    np.testing.assert_allclose(found, (np.exp(log_p) * (log_p - log_q)).sum(1), 1e-9, 1e-9)
    assert (found > -1e-9).all()
    np.testing.assert_allclose(kl_divergence(p, p), 0, atol=1e-12)


# --- on bundles ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines(tiny_bundles):
    return [
        Engine(Bundle.open(tiny_bundles / f"gemma3-{recipe}"), threads=1)
        for recipe in ("fp32", "int8")
    ]


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, length).tolist()


def slow_tables(engines, ids, length, num_windows):
    """nll of both, KL and agreement, `(windows, length)` each, from whole logits in float64."""
    rows = []
    for window in range(num_windows):
        first = window * (length - 1)
        targets = ids[first : first + length]
        logs = []
        for engine in engines:
            engine.rewind(0)
            logits = np.concatenate(list(engine.all_logits([BOS, *targets[:-1]])))
            logits = logits.astype(np.float64)
            logs.append(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        p, q = logs
        here = np.arange(length)
        kl = (np.exp(p) * (p - q)).sum(axis=1)
        rows.append([-p[here, targets], -q[here, targets], kl, p.argmax(1) == q.argmax(1)])
    return [np.stack([row[i] for row in rows]) for i in range(4)]


def compared(reference, engine, *arguments):
    (found,) = compare(reference, [engine], *arguments)
    return found


@pytest.mark.parametrize(("length", "first"), [(100, 50), (33, 16), (4, 2)])
def test_a_comparison_is_that_of_the_slow_computation(engines, length, first):
    windows = 3
    ids = text(windows * (length - 1) + length - 1)  # one token short of another window
    told = []
    found = compared(*engines, BOS, ids, length, None, lambda *step: told.append(step))
    assert (found.windows, found.length) == (windows, length)
    assert told == [(1, 3), (2, 3), (3, 3)]
    tables = slow_tables(engines, ids, length, windows)
    for part, start in ((found.all_positions, 0), (found.second_halves, first)):
        expected = summarize(*(table[:, start:].ravel() for table in tables))
        assert part.positions == windows * (length - start)
        for name in ("perplexity", "reference_perplexity", "log_ratio", "kl", "same_top_token"):
            a, b = getattr(part, name), getattr(expected, name)
            assert (a.value, a.error) == pytest.approx((b.value, b.error), rel=1e-4, abs=1e-6)
        assert part.kl_quantiles == tuple(
            (share, pytest.approx(value, abs=1e-5)) for share, value in expected.kl_quantiles
        )
        assert part.kl.value > 1e-5


def test_a_bundle_is_no_distance_from_itself(tiny_bundles, engines):
    twin = Engine(Bundle.open(tiny_bundles / "gemma3-fp32"), threads=1)
    found = compared(engines[0], twin, BOS, text(80), 40).second_halves
    assert found.same_top_token == MeanWithError(1.0, 0.0)
    assert found.perplexity == found.reference_perplexity
    assert found.log_ratio == found.probability_difference == MeanWithError(0.0, 0.0)
    assert found.rms_probability_difference == MeanWithError(0.0, 0.0)
    assert abs(found.kl.value) < 1e-12 and found.kl_quantiles[-1][1] < 1e-12


def test_several_are_compared_at_once_as_each_alone(tiny_bundles, engines):
    reference, engine = engines
    other = Engine(Bundle.open(tiny_bundles / "gemma3-int8"), threads=1)
    both = compare(reference, [engine, other], BOS, text(80), 40)
    assert both == [compared(reference, engine, BOS, text(80), 40)] * 2


def test_only_the_first_windows_count_when_asked(engines):
    part = compared(*engines, BOS, text(200), 20, 2)
    assert part == compared(*engines, BOS, text(200)[:39], 20)


def test_no_more_than_a_chunk_of_each_is_held(engines, monkeypatch):
    sizes = []

    def watched(p, targets):
        sizes.append(len(p))
        return token_log_probabilities(p, targets)

    monkeypatch.setattr("edge_demo.evaluate.compare.token_log_probabilities", watched)
    compared(*engines, BOS, text(128), 128, 1)
    assert sizes == [64, 64, 64, 64]  # reference and bundle in turn


@pytest.mark.parametrize(
    ("ids", "length", "message"),
    [
        ([], 10, "has 0 tokens"),
        ([5] * 9, 10, "has 9 tokens; a window of 10 needs 10"),
        ([5] * 200, 129, "of 129 tokens does not fit; give --length 4 to 128"),
        ([5] * 9, 3, "of 3 tokens does not fit; give --length 4 to 128"),
    ],
)
def test_what_cannot_be_compared_is_refused(engines, ids, length, message):
    with pytest.raises(RequestError, match=message):
        compared(*engines, BOS, ids, length)


def test_bundles_of_other_models_are_refused(tiny_bundles, tmp_path):
    reference = Bundle.open(tiny_bundles / "gemma3-fp32")
    check_comparable(reference, Bundle.open(tiny_bundles / "gemma3-int8"))
    with pytest.raises(RequestError, match="tokenizers"):
        check_comparable(reference, Bundle.open(tiny_bundles / "chat"))
    with pytest.raises(RequestError, match="vocabularies of 300 and 301"):
        check_comparable(
            reference, SimpleNamespace(path=tmp_path, vocabulary_size=301, tokenizer=None)
        )


# --- the command ---------------------------------------------------------------------------------

KEYS = {
    "positions", "reference_perplexity", "perplexity", "log_ratio", "kl", "kl_quantiles",
    "probability_difference", "rms_probability_difference", "same_top_token",
}  # fmt: skip


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The gardener waters the young trees – before the sun is high.\n" * 5)
    return path


def test_compare_reports_what_python_finds(tiny_bundles, engines, words, run, run_json):
    both = (tiny_bundles / "gemma3-fp32", tiny_bundles / "gemma3-int8")
    arguments = ("compare", *both, "--text", words, "--length", 40, "--windows", 2, "--threads", 1)
    report = run_json(*arguments)
    assert report["reference"] == {"name": "tiny-gemma3", "recipe": "fp32"}
    assert report["bundle"] == {"name": "tiny-gemma3", "recipe": "int8"}
    from edge_demo.text.tokenizer import Tokenizer

    ids = Tokenizer(engines[0].bundle).encode(words.read_text(), bos=False)
    expected = compared(*engines, BOS, ids, 40, 2)
    assert (report["windows"], report["length"]) == (2, 40)
    for name in ("all_positions", "second_halves"):
        part = getattr(expected, name)
        assert set(report[name]) == KEYS
        assert report[name]["positions"] == part.positions
        assert report[name]["kl"] == {
            "value": pytest.approx(part.kl.value),
            "error": pytest.approx(part.kl.error),
        }
        assert [share for share, _ in report[name]["kl_quantiles"]] == [.5, .9, .95, .99, .999, 1]  # fmt: skip
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert "tiny-gemma3 int8 against tiny-gemma3 fp32, 2 windows of 40 tokens" in out
    assert as_table(expected).splitlines()[1] in out
    for label in ("perplexity", "ln of", "median", "99.9 %", "greatest", "RMS", "same top token"):
        assert label in out


def test_compare_refuses_in_a_sentence(tiny_bundles, words, refused, tmp_path):
    fp32, int8 = tiny_bundles / "gemma3-fp32", tiny_bundles / "gemma3-int8"
    with_text = ("--text", words, "--length", 40)
    refused("compare", fp32, names=["BUNDLE", "--text"])
    refused("compare", fp32, int8, "--text", tmp_path / "no", names=["not a file"])
    (tmp_path / "empty").write_bytes(b"")
    refused("compare", fp32, int8, "--text", tmp_path / "empty", "--length", 40, names=["0 tokens"])
    (tmp_path / "short").write_text("The boat")
    short = ("--text", tmp_path / "short", "--length", 40)
    refused("compare", fp32, int8, *short, names=["a window of 40 needs 40"])
    refused("compare", fp32, int8, "--text", words, names=["512 tokens", "4 to 128"])
    refused("compare", fp32, tiny_bundles / "chat", *with_text, names=["different tokenizers"])
    refused("compare", tmp_path / "nowhere", int8, *with_text, names=["does not exist"])
    other = copy_bundle(int8, tmp_path / "other")
    rewrite(other, "tokenizer.model", chat_tokenizer_model())
    refused("compare", fp32, other, *with_text, names=["different tokenizers"])
    edit_manifest(other, lambda m: m["model"].update(vocabulary_size=299))
    edit_manifest(other, lambda m: m["embedding"].update(rows=299))
    refused("compare", fp32, other, *with_text, names=["300 and 299"])


@pytest.mark.sample
def test_the_sample_loses_little_as_int8(sample_bundle, run_json):
    """Against itself, which costs no second export; `make check` measures int8 when it exports."""
    arguments = ("--text", "LICENSE", "--length", 64, "--windows", 1)
    report = run_json("compare", sample_bundle, sample_bundle, *arguments)
    assert report["second_halves"]["positions"] == 32
    assert abs(report["all_positions"]["kl"]["value"]) < 1e-6
    assert json.dumps(report)
