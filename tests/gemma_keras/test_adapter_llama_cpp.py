"""llama.cpp runs the adapter files that are written for it, as Keras runs the adapter."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemma_keras import GemmaCausalLM, open_checkpoint
from gemma_keras.checkpoints.adapters.write import Base, write_peft_adapter
from gemma_keras.checkpoints.low_rank import Adapter, Pair
from gemma_keras.model import lora
from tests.gemma_keras.llama_cpp import llama, needs_llama_cpp
from tests.gemma_keras.lora_models import fill
from tests.gemma_keras.writers import for_gguf
from tests.models import GENERATIONS, write_tiny_hf

pytestmark = pytest.mark.keras

PROMPT = [2, 5, 90, 200, 280, 281, 282, 150, 151, 30, 31]
NEW_TOKENS = 24
NEAR = 0.01  # as a share of the logits' spread: llama.cpp's GELU is a table of float16
KINDS = ("alpha / rank", "rsLoRA", "patterns")
KEYS = ("token_ids", "padding_mask")


def of_many_shapes(model, path):
    """Load an adapter in which neighbours differ in rank, and some in alpha."""
    random = np.random.default_rng(0)
    pairs = {}
    for number, (name, spec) in enumerate(lora.matrices(model.backbone.config).items()):
        a, b = (spec.shape[0], 2 + number % 3), (2 + number % 3, spec.shape[1])
        pairs[name] = Pair(
            *(0.2 * random.normal(size=shape).astype("float32") for shape in (a, b)),
            alpha=(5.0, 3.0)[number % 4 == 0],
        )
    write_peft_adapter(path, Adapter(pairs), model.backbone.config, Base({}, {}))
    written = json.loads((path / "adapter_config.json").read_text())
    assert written["rank_pattern"] and written["alpha_pattern"]
    model.load_adapter(path, check_base=False)


def greedy(model, ids):
    """The tokens that a model goes on with, and the logits after the first of `ids`, the second, and
    so on, to the last but one of all."""
    inputs = {key: np.zeros((1, len(ids) + NEW_TOKENS), "int32") for key in KEYS}
    inputs["token_ids"][0, : len(ids)] = ids
    inputs["padding_mask"][0, : len(ids)] = 1
    bare = GemmaCausalLM(model.backbone)
    tokens = bare.generate(inputs, stop_token_ids=None)["token_ids"][0].tolist()
    return tokens[len(ids) :], model.logits([tokens[:-1]])[0]


def assert_llama_cpp_agrees(model, ids, before, folder):
    """Both go on alike with the adapter, as far as no two tokens are about as likely; otherwise than
    without it.

    Args:
        model: with the adapter in use.
        ids: of the prompt.
        before: what `greedy` returned without it.
        folder: that holds `base.gguf`.

    Returns:
        What was measured, as a sentence.
    """
    model.save_adapter(folder / "adapter.gguf", format="gguf")
    expected, logits = greedy(model, ids)
    second, first = np.partition(logits[len(ids) - 1 :], -2)[:, -2:].T
    clear = first - second > 2 * NEAR * logits.std()
    certain = NEW_TOKENS if clear.all() else int(clear.argmin())  # before the first near-tie
    assert clear.sum() > NEW_TOKENS / 3
    plain = llama(folder / "base.gguf", ids, before[0], NEW_TOKENS)
    found = llama(folder / "base.gguf", ids, expected, NEW_TOKENS, lora=folder / "adapter.gguf")
    moved = np.abs(logits[: len(ids)] - before[1][: len(ids)]).max()
    assert found["answer"] != plain["answer"] and moved > 50 * NEAR * logits.std()
    assert found["answer"][:certain] == expected[:certain]
    best = np.array(found["best"][len(ids) - 1 : -1])
    np.testing.assert_array_equal(best[clear], np.array(expected)[clear])
    off, off_of_base = (
        np.abs(np.array(theirs["logits"])[:-1] - ours[:, :300]).max() / ours.std()
        for theirs, ours in ((found, logits), (plain, before[1]))
    )
    assert off < NEAR
    same = sum(a == b for a, b in zip(found["answer"], expected, strict=True))
    return (
        f"{same} of {NEW_TOKENS} greedy tokens are equal; logits within {off:.1e} of their spread, "
        f"without the adapter {off_of_base:.1e}"
    )


@needs_llama_cpp
@pytest.mark.peer
@pytest.mark.backends("torch")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_llama_cpp_runs_a_small_adapter_as_keras_does(generation, kind, tmp_path, record_property):
    write_tiny_hf(tmp_path / "hf", generation)
    checkpoint = for_gguf(open_checkpoint(tmp_path / "hf"))
    model = GemmaCausalLM.from_checkpoint(checkpoint, dtype="float32")
    model.export(tmp_path / "base.gguf", format="gguf", tensor_type="f32")
    before = greedy(model, PROMPT)
    if kind == "patterns":
        of_many_shapes(model, tmp_path / "patterns")
    else:
        model.enable_lora(rank=3, alpha=5, targets="all-linear", rslora=kind == "rsLoRA")
        fill(model)
    said = assert_llama_cpp_agrees(model, PROMPT, before, tmp_path)
    record_property(f"llama.cpp runs a LoRA beside a small {generation}, {kind}", said)


@needs_llama_cpp
@pytest.mark.sample
@pytest.mark.peer
@pytest.mark.backends("torch")
def test_llama_cpp_runs_an_adapter_of_the_sample(tmp_path, record_property):
    model = GemmaCausalLM.from_preset("sample", dtype="float32")
    model.export(tmp_path / "base.gguf", format="gguf", tensor_type="f32")
    tokenizer = model.preprocessor.tokenizer
    ids = [tokenizer.start_token_id, *map(int, tokenizer("The three primary colors are"))]
    before = greedy(model, ids)
    model.enable_lora(rank=3, alpha=5, targets="all-linear", rslora=True)
    fill(model, size=0.02)
    record_property(
        "llama.cpp runs a LoRA beside the sample",
        assert_llama_cpp_agrees(model, ids, before, tmp_path),
    )
