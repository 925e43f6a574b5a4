"""HellaSwag: reading the tasks, choosing an ending, and how sure a share is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.engine import runner as engine_module
from edge_demo.engine.runner import Engine
from edge_demo.errors import RequestError
from edge_demo.evaluate.hellaswag import Accuracy, Task, ending_scores, hellaswag, read_tasks
from edge_demo.evaluate.perplexity import token_log_probabilities
from edge_demo.text.tokenizer import Tokenizer

TEXT = """\
Gardening: The gardener waters the young trees
2
and counts the stones.
on the table.
before the sun is high.
in a cold kitchen.
Boats: A boat went down the river
0
and nobody waved to it.
and nobody
and nobody waved to it, so
went to sleep.
"""


def test_tasks_are_read_as_llama_cpp_lays_them_out():
    first, second = read_tasks("file", TEXT)
    assert first == Task(
        "Gardening: The gardener waters the young trees",
        ("and counts the stones.", "on the table.", "before the sun is high.", "in a cold kitchen."),
        2,
    )  # fmt: skip
    assert (second.context, second.label) == ("Boats: A boat went down the river", 0)
    assert read_tasks("file", TEXT.removesuffix("\n")) == [first, second]
    assert read_tasks("file", TEXT.replace("\n", "\r\n")) == [first, second]
    separated = read_tasks("file", TEXT.replace("the stones", "the\u2028stones\x85"))[0]
    assert separated.endings[0] == "and counts the\u2028stones\x85."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n", "is empty"),
        ("words\n" * 7, "7 lines; HellaSwag's text form needs 6 lines per task"),
        (TEXT + "\n", "13 lines"),
        (TEXT.replace("\n2\n", "\n4\n"), "line 2 of file must be .* 0 to 3; found '4'"),
        (TEXT.replace("\n0\n", "\n\u0660\n"), "line 8"),
        (TEXT.replace("\n0\n", "\n" + "x" * 999 + "\n"), "found 'x{40}'$"),
        (TEXT.replace("\n0\n", "\n-1\n"), "found '-1'"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(text, message):
    with pytest.raises(RequestError, match=message):
        read_tasks("file", text)


@pytest.mark.parametrize(
    ("correct", "tasks", "error", "least", "most"),
    [
        (42, 100, 0.049356, 0.327984, 0.517934),
        (0, 10, 0.0, 0.0, 0.277533),
        (10, 10, 0.0, 0.722467, 1.0),
        (1, 2, 0.353553, 0.094531, 0.905469),
    ],
)
def test_the_interval_is_wilsons(correct, tasks, error, least, most):
    found = Accuracy(correct, tasks)
    assert found.value == correct / tasks
    assert found.error == pytest.approx(error, abs=1e-6)
    assert found.interval == pytest.approx((least, most), abs=1e-5)


@pytest.fixture(scope="module")
def engine(tiny_bundles):
    return Engine(Bundle.open(tiny_bundles / "gemma3-fp32"), threads=1)


def slow_scores(engine, texts, common):
    scores = []
    for ids in texts:
        engine.rewind(0)
        logits = np.concatenate(list(engine.all_logits(ids[:-1])))
        scores.append(token_log_probabilities(logits, ids[1:])[common - 1 :].mean())
    return scores


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize(
    ("texts", "common"),
    [
        ([[2, 9, 8, 7, 30, 31, 32], [2, 9, 8, 7, 40], [2, 9, 8, 7, 30, 50], [2, 9, 8, 7, 1, 1]], 4),
        ([[2, 30], [2, 31], [2, 32, 33, 34], [2, 30]], 1),
        # one text is all that the others begin with: its last token is its ending
        ([[2, 5, 6], [2, 5, 6, 7], [2, 5, 6, 8, 9], [2, 5, 6]], 2),
        ([[2, 5, 6]] * 4, 2),
    ],
)
def test_an_endings_score_is_the_mean_over_its_own_tokens(
    engine, monkeypatch, texts, common, chunk
):
    monkeypatch.setattr(engine_module, "_SCORE_CHUNK", chunk)
    assert ending_scores(engine, texts) == pytest.approx(slow_scores(engine, texts, common), 1e-5)


def test_the_beginning_is_run_once(engine, monkeypatch):
    given = []
    fill = engine_module.Binding.fill
    monkeypatch.setattr(
        engine_module.Binding,
        "fill",
        lambda self, ids, *rest: (given.append(len(ids)), fill(self, ids, *rest))[1],
    )
    ending_scores(engine, [[2, 9, 8, 7, 30 + i, 31] for i in range(4)])
    assert given == [2, 1, 2, 2, 2, 2]


def test_the_right_ending_counts_when_it_is_the_likeliest_and_the_first_of_equals_wins(engine):
    tokenizer = Tokenizer(engine.bundle)
    tasks = read_tasks("file", TEXT)
    same = Task(tasks[0].context, ("on the table.",) * 4, 0)
    chosen = []
    for task in tasks:
        texts = [tokenizer.encode(f"{task.context} {ending}") for ending in task.endings]
        chosen.append(int(np.argmax(ending_scores(engine, texts))))
    told = []
    asked = [
        Task(tasks[0].context, tasks[0].endings, chosen[0]),
        Task(tasks[1].context, tasks[1].endings, (chosen[1] + 1) % 4),
        same,
        Task(same.context, same.endings, 1),
    ]
    found = hellaswag(engine, tokenizer, asked, lambda *step: told.append(step))
    assert found == Accuracy(2, 4)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_score_reports_hellaswag(tiny_bundles, engine, tmp_path, run, run_json):
    path = tmp_path / "tasks.txt"
    path.write_text(TEXT)
    arguments = ("score", tiny_bundles / "gemma3-fp32", "--hellaswag", path, "--threads", 1)
    report = run_json(*arguments)
    expected = hellaswag(engine, Tokenizer(engine.bundle), read_tasks(path, TEXT))
    assert report == {
        "accuracy": expected.value,
        "error": expected.error,
        "interval": list(expected.interval),
        "correct": expected.correct,
        "tasks": 2,
    }
    assert run_json(*arguments, "--tasks", 1)["tasks"] == 1
    assert run_json(*arguments, "--tasks", 1000)["tasks"] == 2
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert f"HellaSwag {expected.value:.2%} ± {100 * expected.error:.2f} %" in out
    assert f"{expected.correct} of 2 tasks" in out and "95 % interval" in out


def test_score_refuses_tasks_in_a_sentence(tiny_bundles, refused, tmp_path):
    bundle, path = tiny_bundles / "gemma3-fp32", tmp_path / "tasks.txt"
    path.write_text(TEXT.replace("\n2\n", "\ntwo\n"))
    refused("score", bundle, "--hellaswag", path, names=[path, "line 2", "two"])
    path.write_bytes(b"\xff\n" * 6)
    refused("score", bundle, "--hellaswag", path, names=[path, "not UTF-8"])
    refused("score", bundle, "--hellaswag", tmp_path / "no", names=["not a file"])
    path.write_text(TEXT)
    refused("score", bundle, names=["--text", "--hellaswag"])
    refused("score", bundle, "--hellaswag", path, "--text", path, names=["--text", "not allowed"])
    refused(
        "score",
        bundle,
        "--hellaswag",
        path,
        "--length",
        9,
        names=["--length", "only valid with --text"],
    )
    refused("score", bundle, "--hellaswag", path, "--stride", 9, names=["--stride"])
    refused(
        "score",
        bundle,
        "--text",
        path,
        "--tasks",
        9,
        names=["--tasks", "only valid with --hellaswag"],
    )
    refused("score", tiny_bundles / "short", "--hellaswag", path, names=["context holds 16"])


def test_the_error_of_a_share_shrinks_with_the_root_of_its_tasks():
    assert Accuracy(400, 1000).error == pytest.approx(Accuracy(40, 100).error / math.sqrt(10))


@pytest.mark.sample
def test_the_sample_solves_what_a_language_model_can(sample_bundle, tmp_path, run_json):
    path = tmp_path / "tasks.txt"
    path.write_text(
        "Cooking: A woman cracks two eggs into a hot pan. she\n1\n"
        "parks the car in the pan.\nfries the eggs and puts them on a plate.\n"
        "sings seventeen blue windows.\nflies the pan to the moon and back.\n"
    )
    assert run_json("score", sample_bundle, "--hellaswag", path)["accuracy"] == 1
