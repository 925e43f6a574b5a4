"""Models that an earlier version of this project has saved: a preset, and a `.keras` file.

`saved_models/` was written on 2026-11-27: a tiny Gemma 3 of random weights, and its logits. Its
files name the modules and classes of that day.
"""

from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from gemma_keras import GemmaCausalLM

SAVED = Path(__file__).parent / "saved_models"
EXPECTED = json.loads((SAVED / "logits.json").read_text())
pytestmark = pytest.mark.keras


def last_logits(model: GemmaCausalLM) -> np.ndarray:
    return model.logits(np.array([EXPECTED["ids"]], "int32"))[0, -1]


def test_a_preset_of_before_gives_its_logits():
    model = GemmaCausalLM.from_preset(str(SAVED / "preset"))
    np.testing.assert_allclose(last_logits(model), EXPECTED["logits"], atol=1e-4)


def test_a_keras_file_of_before_gives_its_logits():
    model = keras.saving.load_model(SAVED / "model.keras")
    np.testing.assert_allclose(last_logits(model), EXPECTED["logits"], atol=1e-4)
