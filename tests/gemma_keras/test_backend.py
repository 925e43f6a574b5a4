"""The Keras tests run on the backend that was asked for."""

import os

import keras
import pytest

pytestmark = pytest.mark.keras


def test_keras_runs_on_the_backend_of_the_environment():
    asked = os.environ.get("KERAS_BACKEND")
    assert keras.config.backend() == asked or asked is None
