"""What an export computes from the true configuration of every published size.

`tests/test_walk.py` takes them through the whole product, at a small width.
"""

from __future__ import annotations

import json

import pytest

from export.bundle.ecosystem import write_ecosystem_files
from export.bundle.writer import write_tokenizer
from export.formats.formats import plan_bytes
from export.formats.recipes import RECIPES, plan_for_recipe
from export.graph.contract import (
    candidates_contract,
    engine_contract,
    interchange_contract,
    windows,
)
from gemma_keras.checkpoints.hf.config import config_from_hf, named_config
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.sizes import SIZES
from tests.models import chat_tokenizer_model, tiny_tokenizer_model


@pytest.mark.parametrize("size", [s for s in SIZES.values() if s.causal], ids=lambda s: s.name)
def test_the_small_files_of_a_size_say_what_it_is(size, tmp_path):
    """Nothing of its size is allocated: the files, and the graphs' inputs and outputs."""
    import transformers

    config = named_config(size.name)
    tuned = any(release.tuned for release in size.releases)
    tokenizer = chat_tokenizer_model() if tuned else tiny_tokenizer_model()
    checkpoint = Checkpoint(config, {}, tokenizer, tuned, {})
    entry = write_tokenizer(tmp_path, checkpoint)
    assert write_ecosystem_files(tmp_path, checkpoint, entry, config.context_length)
    told = json.loads((tmp_path / "config.json").read_text())
    assert config_from_hf(told) == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.num_hidden_layers, theirs.hidden_size) == (len(config.layers), config.hidden_dim)
    decoder = json.loads((tmp_path / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["head_size"] == config.layers[0].head_dim
    kept = windows(config, config.context_length)
    for contract in (engine_contract, candidates_contract):
        pasts = [s for s in contract(config, kept).inputs if s.name.startswith("past_key_values.")]
        assert len(pasts) == 2 * len(config.layers)
    assert interchange_contract(config).outputs[0].shape[-1] == config.vocabulary_size
    for recipe in RECIPES:
        assert plan_bytes(plan_for_recipe(recipe, config), config) > 0.4 * size.parameters
