"""`edge-demo embed`, and what other commands say of an embedder's bundle."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.models import TEXT

TEXTS = TEXT.split("\n")


@pytest.fixture
def tiny(tiny_bundles):
    return tiny_bundles / "embedder-fp32"


def test_each_vector_is_a_line_of_numbers(run, run_json, tiny):
    status, out, err = run("embed", tiny, *TEXTS[:2])
    assert status == 0 and err.startswith("2 vectors of 40 numbers · load ") and "tokens/s" in err
    vectors = np.array([[float(x) for x in line.split()] for line in out.splitlines()])
    assert vectors.shape == (2, 40)
    found = run_json("embed", tiny, *TEXTS[:2])
    np.testing.assert_array_equal(vectors.astype(np.float32), np.float32(found["vectors"]))
    assert set(found) == {
        "model", "dimensions", "prompt_name", "tokens", "timings", "peak_rss_bytes", "vectors",
    }  # fmt: skip
    assert (found["model"], found["dimensions"], found["prompt_name"]) == (
        "tiny-embedder",
        40,
        None,
    )
    assert all(count > 3 for count in found["tokens"])


def test_texts_may_stand_after_options(run_json, tiny):
    before = run_json("embed", tiny, "a boat", "--prompt-name", "query")
    after = run_json("embed", tiny, "--prompt-name", "query", "a boat")
    assert before["vectors"] == after["vectors"] and after["prompt_name"] == "query"
    assert before["vectors"] != run_json("embed", tiny, "a boat")["vectors"]


def test_a_file_has_a_text_a_line(run_json, tiny, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_bytes("\r\n".join([TEXTS[0], "", TEXTS[1], ""]).encode())
    found = run_json("embed", tiny, "--file", file)["vectors"]
    assert found == run_json("embed", tiny, TEXTS[0], "", TEXTS[1])["vectors"]


def test_fewer_numbers(run_json, tiny):
    whole = np.array(run_json("embed", tiny, "a boat")["vectors"])
    found = np.array(run_json("embed", tiny, "a boat", "--dimensions", "8")["vectors"])
    expected = whole[:, :8] / np.linalg.norm(whole[:, :8])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_vectors_are_written_as_an_array(run, run_json, tiny, tmp_path):
    out = tmp_path / "vectors.npy"
    found = run_json("embed", tiny, *TEXTS, "-o", out)
    assert "vectors" not in found and len(found["tokens"]) == len(TEXTS)
    array = np.load(out, allow_pickle=False)
    assert array.dtype == np.float32
    expected = run_json("embed", tiny, *TEXTS)["vectors"]
    np.testing.assert_array_equal(array, np.float32(expected))
    assert run("embed", tiny, "a", "-o", out)[:2] == (0, "")
    assert np.load(out).shape == (1, 40)
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.npy"]


def test_the_end_of_a_long_text_is_left_out_when_that_is_asked_for(run_json, refused, tiny):
    refused("embed", tiny, TEXT, names=["text 1 of 1 has", "the model takes 120"])
    assert run_json("embed", tiny, TEXT, "--truncate")["tokens"] == [120]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ((), ["--file"]),
        (("a", "--file", "x"), ["one of both"]),
        (("--file", "/nonexistent"), ["/nonexistent"]),
        (("a", "--dimensions", "41"), ["1 to 40", "41"]),
        (("a", "--dimensions", "0"), ["'0'"]),
        (("a", "--prompt-name", "title"), ["'title'", "document, query"]),
        (("a", "--unknown"), ["--unknown"]),
        (("a", "--threads", "5000"), ["1,024"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(refused, tiny, options, names):
    refused("embed", tiny, *options, names=names)


def test_a_file_that_cannot_be_written(refused, tiny, tmp_path):
    out = tmp_path / "missing" / "vectors.npy"
    refused("embed", tiny, "a", "-o", out, names=[out, "cannot be written"], status=1)


# --- other commands, other bundles ---------------------------------------------------------------


def test_a_bundle_that_generates_embeds_nothing(refused, tiny_bundles):
    refused("embed", tiny_bundles / "chat", "a", names=["generates text and embeds none"])


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "a"),
        ("chat", "--prompt", "a"),
        ("bench",),
        ("score", "--text", __file__),
        ("compare", "--text", __file__),
    ],
    ids=lambda command: command[0],
)
def test_what_generates_refuses_an_embedder(refused, tiny, command):
    name, *options = command
    bundles = [tiny, tiny] if name == "compare" else [tiny]
    refused(name, *bundles, *options, names=["tiny-embedder embeds texts and generates none"])


@pytest.mark.parametrize("option", [("--max-tokens", "9"), ("--cache-mb", "1")], ids=str)
def test_serve_refuses_what_an_embedder_has_not(refused, tiny, option):
    refused("serve", tiny, "--port", "0", *option, names=[option[0], "embeds texts"])


def test_inspect_says_what_it_is(run, run_json, tiny):
    status, out, err = run("inspect", tiny, "--verify")
    assert (status, err) == (0, "")
    for words in ("(embedder, ", "up to 120 tokens, a vector of 40", "document, query"):
        assert words in out
    assert run_json("inspect", tiny)["kind"] == "embedder"


def test_doctor_says_whether_it_fits(run, run_json, tiny):
    status, out, err = run("doctor", tiny)
    assert (status, err) == (0, "")
    assert "tiny-embedder fp32, an embedder" in out and "a text of 120 tokens takes" in out
    (found,) = run_json("doctor", tiny)["bundles"]
    assert found["embeds"] and found["fits"] and found["needed"] <= found["needed_for_longest"]
    json.dumps(found)
