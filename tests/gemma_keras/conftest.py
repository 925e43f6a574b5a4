"""Checkpoints that the writers are tested on."""

from __future__ import annotations

import functools

import pytest

from tests.gemma_keras.writers import TYPES
from tests.models import tiny_hf, tiny_tokenizer_model


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """The Hugging Face folder of a generation and dtype, made once."""
    folder = tmp_path_factory.mktemp("sources")

    @functools.cache
    def make(generation, dtype, tied=True):
        path = folder / f"{generation}-{dtype}-{tied}"
        tiny_hf(generation, tied=tied).to(TYPES[dtype]).save_pretrained(path)
        (path / "tokenizer.model").write_bytes(tiny_tokenizer_model())
        return path

    return make
