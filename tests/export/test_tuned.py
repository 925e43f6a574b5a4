"""What was tuned speaks on the device as it does in Keras: with LoRA, and on quantized weights."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from gemma_keras import Distiller, GemmaCausalLM, PreferenceTuner
from tests.models import TEXT, write_tiny_chat

pytestmark = [pytest.mark.keras, pytest.mark.backends("torch")]

LINES = TEXT.splitlines()
PROMPTS = 20
TOKENS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("tuned"))


def load(folder):
    keras.utils.set_random_seed(0)
    return GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=48)


def tuned(folder, way):
    model = load(folder)
    if way == "int4":
        with pytest.warns(UserWarning, match="the token embedding is not quantized"):
            model.quantize("int4")
    if way != "full":
        model.enable_lora(rank=4, targets="all-linear")
    rows, tuner = LINES, model
    if way == "distilled":
        tuner = Distiller(model, load(folder))
    if way == "preferences":
        tuner = PreferenceTuner(model)
        rows = [{"prompt": "The", "chosen": line, "rejected": line[::-1]} for line in LINES]
    tuner.compile(keras.optimizers.Adam(3e-3))
    tuner.fit(rows, epochs=2, batch_size=4, verbose=0)
    return model


def greedy(logits_after, ids):
    """The likeliest tokens, one after another, and by how much the nearest one led."""
    ids, margins = list(ids), []
    for _ in range(TOKENS):
        logits = logits_after(ids)
        second, first = np.partition(logits, -2)[-2:]
        margins.append((first - second) / logits.std())
        ids.append(int(logits.argmax()))
    return ids, min(margins)


@pytest.mark.parametrize("way", ["full", "lora", "int4", "distilled", "preferences"])
def test_the_bundle_says_what_keras_says(folder, tmp_path, way, record_property):
    model = tuned(folder, way)
    model.export(tmp_path / "bundle", format="onnx", recipe="fp32", verify=False)
    engine = Engine(Bundle.open(tmp_path / "bundle"))

    def of_engine(ids):
        engine.rewind(0)
        return np.concatenate(list(engine.all_logits(ids)))[-1]

    random, same, nearest = np.random.default_rng(0), 0, []
    for _ in range(PROMPTS):
        prompt = [2, *random.integers(5, 250, size=random.integers(2, 12)).tolist()]
        expected, margin = greedy(lambda ids: model.logits([ids])[0, -1], prompt)
        found, _ = greedy(of_engine, prompt)
        same += found == expected
        if found != expected:
            nearest.append(margin)
    record_property(f"{way}: of {PROMPTS} prompts, the same {TOKENS} tokens", str(same))
    # another token only where two are as likely, to rounding
    assert all(margin < 1e-4 for margin in nearest)
    assert same >= PROMPTS - 1
