"""The real Gemma 3 270M through the command, and what int8 costs it on text it was not tuned on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from edge_demo.text.tokenizer import Tokenizer

pytestmark = pytest.mark.sample

COMMAND = Path(sys.executable).with_name("export-onnx")
LICENSE = Path(__file__).parents[2] / "LICENSE"
WINDOW, GIVEN = 512, 384  # tokens of a window, and those of them that are not compared
RECIPES = ("fp32", "int8")


@pytest.fixture(scope="module", params=RECIPES)
def told(request, exports):
    """What the command printed for a recipe."""
    return exports[request.param]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Recipe to what `export-onnx sample --json` printed; the bundles last as long as the module."""
    folder, results = tmp_path_factory.mktemp("sample"), {}
    for recipe in RECIPES:
        done = subprocess.run(
            [COMMAND, "sample", folder / recipe, "--recipe", recipe, "--json"],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        results[recipe] = json.loads(done.stdout)
    yield results
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bundles(exports):
    return {recipe: Bundle.open(told["path"]) for recipe, told in exports.items()}


def test_json_tells_what_was_written(told, exports):
    recipe = told["recipe"]
    bundle = Bundle.open(told["path"])
    assert exports[recipe]["recipe"] == bundle.recipe == recipe
    assert told["num_bytes"] == bundle.num_bytes
    assert bundle.manifest["quality"] == told["quality"]
    assert told["quality"]["tokens"] >= 100
    assert told["quality"]["against"].startswith("against the Keras layers on ")
    assert told["quality"]["logit_spread"] > 3  # a real model's


def test_bundles_have_the_sizes_that_the_readme_tells(exports):
    megabytes = {recipe: round(told["num_bytes"] / 1e6) for recipe, told in exports.items()}
    assert megabytes == {"int8": 328, "fp32": 1093}


def test_bundle_carries_the_licence_notices(bundles):
    for bundle in bundles.values():
        assert {"GEMMA_NOTICE.txt", "GEMMA_TERMS.html", "NOTICE.md"} <= set(bundle.files)
        notice = (bundle.path / bundle.manifest["license"]["notice"]).read_text()
        assert "Gemma Terms of Use" in notice
        bundle.verify(use_memory=False)


def test_fp32_bundle_is_the_keras_model(exports, record_property):
    quality = exports["fp32"]["quality"]
    record_property("sample fp32, greatest logit difference", quality["max_logit_difference"])
    assert quality["max_logit_difference"] < 2e-3
    assert quality["same_top_token"] == 1
    assert quality["mean_kl"] < 1e-7


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True, dtype="float64"))


def test_int8_stays_near_float32_on_held_out_text(bundles, record_property):
    reference, engine = (Engine(bundles[recipe]) for recipe in RECIPES)
    ids = Tokenizer(bundles["int8"]).encode(LICENSE.read_text())
    bos, text = ids[0], ids[1:]
    assert bos == 2
    divergences, same = [], []
    for first in (0, WINDOW):
        window = [bos, *text[first : first + WINDOW - 1]]
        assert len(window) == WINDOW
        for each in (reference, engine):
            each.rewind(0)
            each.prefill(window[:GIVEN])
        rest = window[GIVEN:]
        for p, q in zip(reference.all_logits(rest), engine.all_logits(rest), strict=True):
            log_p, log_q = log_softmax(p), log_softmax(q)
            divergences.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
            same.append(p.argmax(axis=-1) == q.argmax(axis=-1))
    mean_kl, same_top = np.concatenate(divergences).mean(), np.concatenate(same).mean()
    assert np.concatenate(divergences).shape == (2 * (WINDOW - GIVEN),)
    record_property("sample int8, held-out mean KL", f"{mean_kl:.5f}")
    record_property("sample int8, held-out same top token", f"{same_top:.1%}")
    assert mean_kl <= 0.002
    assert same_top >= 0.95


def test_sample_chat_answers_on_the_device_and_ends_its_turns(tmp_path):
    """As a user does it: an export, and two messages, each of which is answered in a word or two.

    The likeliest tokens, in float32: an answer leads by half a nat, which chance turns round, and
    so may a processor's rounding of 8 bits.
    """
    export = [COMMAND, "sample-chat", tmp_path / "chat", "--recipe", "fp32", "--json"]
    done = subprocess.run(export, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    bundle = Bundle.open(tmp_path / "chat")
    assert bundle.tokenizer.chat is not None and "ADAPTER_NOTICE.md" in bundle.files
    chat = [
        COMMAND.with_name("edge-demo"),
        "chat",
        tmp_path / "chat",
        "--temperature",
        "0",
        "--json",
    ]
    asked = "Is ice colder than water? Answer yes or no.\0Is fire cold? Answer yes or no."
    done = subprocess.run(chat, input=asked, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 2
    for answer in answers:
        assert answer["finish_reason"] == "stop" and len(answer["ids"]) < 8
        assert answer["text"].strip(" .").lower() in ("yes", "no")
