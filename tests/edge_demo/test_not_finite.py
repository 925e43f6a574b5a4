"""Bundles whose logits are NaN or infinite: one sentence and exit status 1, in every command."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_demo.engine.candidates import Candidates
from edge_demo.errors import NotFiniteError
from edge_demo.evaluate.perplexity import token_log_probabilities
from edge_demo.text.sampling import Sampler
from tests.edge_demo.bundle_files import copy_bundle, fill_weight

WORDS = "The gardener waters the young trees before the sun is high."


@pytest.fixture(scope="module", params=["nan", "inf", "one row"])
def bad(request, tiny_bundles, tmp_path_factory):
    """All logits NaN; infinite and NaN; one NaN among good ones."""
    bundle = copy_bundle(tiny_bundles / "gemma3-int8", tmp_path_factory.mktemp("bad") / "bundle")
    if request.param == "one row":
        fill_weight(bundle, "token_embedding.scales", np.nan, slice(30, 33))
    else:
        fill_weight(bundle, "final_norm", float(request.param))
    return bundle


@pytest.fixture
def commands(tiny_bundles, tmp_path):
    """What takes a bundle that cannot answer, by name."""
    (tmp_path / "text.txt").write_text(WORDS)
    (tmp_path / "tasks.txt").write_text("Sport: a man\n1\nruns\nwalks\nsits\njumps\n")
    good, prompt = tiny_bundles / "gemma3-fp32", ("--prompt", "The", "--max-tokens", 3)
    text = ("--text", tmp_path / "text.txt", "--length", 16)
    return {
        "greedy": lambda bad: ("generate", bad, *prompt),
        "sampling": lambda bad: ("generate", bad, *prompt, "--temperature", 1),
        "top-k": lambda bad: ("generate", bad, *prompt, "--temperature", 1, "--top-k", 40),
        "penalties": lambda bad: ("generate", bad, *prompt, "--repeat-penalty", 1.1),
        "lookup": lambda bad: ("generate", bad, *prompt, "--lookup"),
        "draft": lambda bad: ("generate", good, *prompt[:3], 12, "--draft", bad),
        "chat": lambda bad: ("chat", bad, *prompt),
        "score": lambda bad: ("score", bad, *text),
        "hellaswag": lambda bad: ("score", bad, "--hellaswag", tmp_path / "tasks.txt"),
        "compare": lambda bad: ("compare", good, bad, *text),
        "reference": lambda bad: ("compare", bad, good, *text),
        "bench": lambda bad: ("bench", bad, "-p", 8, "-n", 2, "-r", 1),
    }


WHOSE = {"draft": "the draft ", "compare": "the bundle", "reference": "the reference"}


def test_every_command_says_it_in_a_sentence(bad, commands, run):
    for name, command in commands.items():
        status, _, err = run(*command(bad))
        said = err.splitlines()[-1]
        assert status == 1, (name, err)
        assert said.startswith("edge-demo: " + WHOSE.get(name, "the model")), (name, err)
        assert "gave logits that are not finite" in said
        assert err.count("\n") == (2 if name == "chat" else 1)  # it has said what it talks to


def test_a_batch_says_it_in_every_line(bad, run, tmp_path):
    (tmp_path / "in").write_text('{"prompt": "The"}\n{"prompt": "A", "temperature": 1}\n')
    arguments = ("generate", bad, "--batch", tmp_path / "in", "--out", tmp_path / "out")
    for _ in range(2):  # and the same again, which goes on after what is there
        status, _, err = run(*arguments, "--json")
        records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
        assert status == 1 and "2 of them failed" in err
        assert ["not finite" in record["error"] for record in records] == [True, True]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"repeat_penalty": 2}]
)
def test_wherever_it_stands_nothing_is_chosen(value, settings):
    for place in range(9):
        logits = np.linspace(-3, 3, 9, dtype=np.float32)
        logits[place] = value
        for found in (logits, Candidates(np.arange(9)[::-1] * 5, logits)):
            with pytest.raises(NotFiniteError, match="not finite"):
                Sampler(**settings, seed=0).pick(found, [place, 5 * place])
        with pytest.raises(NotFiniteError):
            token_log_probabilities(np.stack([np.zeros(9, np.float32), logits]), [0, 1])


def test_a_token_that_never_comes_is_no_mistake_unless_it_is_wanted():
    logits = np.array([-np.inf, 0, 1, -np.inf], np.float32)
    assert Sampler().pick(logits) == 2
    assert {Sampler(5.0, seed=s).pick(logits) for s in range(20)} == {1, 2}
    assert token_log_probabilities(logits[None], [2])[0] == pytest.approx(-np.log(1 + np.exp(-1)))
    with pytest.raises(NotFiniteError):
        token_log_probabilities(logits[None], [0])
    with pytest.raises(NotFiniteError):
        Sampler().pick(np.full(4, -np.inf, np.float32))


def test_a_perplexity_beyond_all_numbers_is_infinite_and_null_for_programs(
    tiny_bundles, run, run_json, tmp_path
):
    bundle = copy_bundle(tiny_bundles / "gemma3-int8", tmp_path / "bundle")
    fill_weight(bundle, "final_norm", 1e6)  # finite, and far from any text
    (tmp_path / "text").write_text(WORDS)
    text = ("--text", tmp_path / "text", "--length", 16)
    found = run_json("score", bundle, *text)
    assert found["perplexity"] is None and 1e3 < found["nll"] < 1e9
    assert run("score", bundle, *text)[1].startswith("perplexity inf ")
    found = run_json("compare", tiny_bundles / "gemma3-fp32", bundle, *text)
    assert found["all_positions"]["perplexity"]["value"] is None
    assert 1e3 < found["all_positions"]["log_ratio"]["value"] < 1e9
