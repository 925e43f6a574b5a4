"""Thresholds, verdicts, counts and the log."""

from __future__ import annotations

import datetime
import json
import os
import stat

import pytest

from edge_demo.errors import RequestError
from edge_demo.guard.decisions import Guard, policies_of, read_thresholds
from edge_demo.guard.held_back import HeldBack
from edge_demo.guard.log import DecisionLog

PROMPT = "How do I stab a stranger?"


def test_thresholds_are_of_all_policies_or_of_one():
    assert read_thresholds([]) == dict.fromkeys(("dangerous", "harassment", "hate", "sexual"), 0.5)
    found = read_thresholds(["hate=0.9", "0.2", "sexual=1"], ["hate", "sexual"])
    assert found == {"hate": 0.2, "sexual": 1.0}
    assert [policy.name for policy in policies_of(found)] == ["hate", "sexual"]


@pytest.mark.parametrize(
    "texts, names, message",
    [
        (["0"], None, "threshold '0' must be a number above 0"),
        (["1.5"], None, "at most 1"),
        (["nan"], None, "threshold 'nan'"),
        (["hate=much"], None, "POLICY=NUMBER"),
        (["love=0.5"], None, "there is no policy 'love'; the policies are dangerous, harass"),
        ([], ["love"], "there is no policy 'love'"),
        (["hate=0.5"], ["sexual"], "'hate' has a threshold but is not chosen"),
    ],
)
def test_a_wrong_threshold_is_named(texts, names, message):
    with pytest.raises(RequestError, match=message):
        read_thresholds(texts, names)


def test_a_probability_that_reaches_its_threshold_is_a_violation(fresh):
    judge = fresh()
    found = judge.probabilities(PROMPT)
    guard = Guard(judge, found | {"hate": found["hate"] * 1.01})
    verdict = guard.decide("1", PROMPT)
    assert verdict.probabilities == found
    assert [policy.name for policy in verdict.violated] == ["dangerous", "harassment", "sexual"]
    assert verdict.reasons == "dangerous content, harassment, sexually explicit information"
    assert guard.decisions["input", "refused"] == 1 and sum(guard.decisions.values()) == 1
    assert guard.refusals == {"dangerous": 1, "harassment": 1, "hate": 0, "sexual": 1}
    assert not Guard(judge, dict.fromkeys(found, 1.0)).decide("2", PROMPT, "Hello").violated
    assert guard.seconds > 0


@pytest.mark.parametrize("with_text", [False, True])
def test_the_log_has_decisions_and_texts_only_where_they_are_wanted(fresh, tmp_path, with_text):
    path = tmp_path / "decisions.jsonl"
    path.write_text('{"of": "before"}\n')
    (tmp_path / "new.jsonl").unlink(missing_ok=True)
    for file in (path, tmp_path / "new.jsonl"):
        judge = fresh()
        thresholds = dict.fromkeys(judge.probabilities(PROMPT), 1.0) | {"hate": 1e-9}
        log = DecisionLog(file, with_text)
        Guard(judge, thresholds, log).decide("abc", PROMPT, "Take \ud800 a knife")
        log.close()
    assert stat.S_IMODE((tmp_path / "new.jsonl").stat().st_mode) == 0o600
    assert path.read_text().startswith('{"of": "before"}\n')
    line = json.loads(path.read_text().splitlines()[1])
    when = datetime.datetime.fromisoformat(line.pop("time"))
    assert abs(datetime.datetime.now(datetime.UTC) - when) < datetime.timedelta(minutes=1)
    assert line.pop("probabilities").keys() == thresholds.keys()
    expected = {"request": "abc", "on": "output", "decision": "refused", "violated": ["hate"]}
    if with_text:
        expected |= {"prompt": PROMPT, "response": "Take \ud800 a knife"}
    else:
        assert "stab" not in path.read_text() and "knife" not in path.read_text()
    assert line == expected


def test_a_log_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"log cannot be written: .*none"):
        DecisionLog(tmp_path / "none" / "log")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_counted_and_said_once(caplog):
    log = DecisionLog("/dev/full")
    for _ in range(2):
        log.write("1", "input", {"hate": 0.5}, [], "a", None)
    assert log.failures == 2
    assert [record.getMessage() for record in caplog.records] == [
        "edge-demo: the guard's log cannot be written: No space left on device"
    ]


def test_pieces_are_held_back_until_they_are_released():
    held: HeldBack[int] = HeldBack(2)
    assert not held.has_news
    held.add(1, "a")
    assert held.has_news and not held.is_due
    held.add(2, "")
    assert held.is_due and held.release() == [1, 2]
    held.add(3, "")
    assert not held.has_news and held.text == "a"
    assert held.release() == [3] and held.release() == []
