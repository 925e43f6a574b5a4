"""The real Gemma 3 270M against transformers' model of the same dequantized weights.

transformers' results are computed once a run and shared between the workers through files.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import filelock
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from keras import ops

from gemma_keras import GemmaCausalLM, open_checkpoint

pytestmark = [pytest.mark.keras, pytest.mark.sample, pytest.mark.peer]

LICENSE = Path(__file__).parents[2] / "LICENSE"
STORY = (
    "The lighthouse keeper had two rules: never let the lamp go out, and never answer a knock on "
    "the door after midnight. In thirty years he had broken neither. Tonight, for the first time,"
)
BOS = 2
# name: tokens to keep, text; the last is longer than the window of 512 tokens
PROMPTS = {
    "short": (5, "The capital of France"),
    "story": (41, STORY),
    "long": (300, LICENSE.read_text()),
    "longer": (700, LICENSE.read_text()),
}
CONTINUED = ("short", "story", "long")
NEW_TOKENS = 24


def once(value):
    """A case of which the others show what a backend can change."""
    return pytest.param(value, marks=pytest.mark.backends("torch"))


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint("sample")


@pytest.fixture(scope="module")
def prompts(checkpoint):
    """Name to token ids, int64 `(length,)`."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=checkpoint.tokenizer_model)
    return {
        name: np.array([BOS, *processor.encode(text)][:length])
        for name, (length, text) in PROMPTS.items()
    }


@pytest.fixture(scope="module")
def model():
    bare = GemmaCausalLM(GemmaCausalLM.from_preset("sample", dtype="float32").backbone)
    bare.compile(sampler="greedy")
    return bare


# --- what transformers says ----------------------------------------------------------------------


def transformers_model(checkpoint):
    """The published architecture, on purpose not derived from ours, with the sample's weights."""
    config = transformers.Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        max_position_embeddings=32_768,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, spec in checkpoint.weights.specs.items():
            array = spec.to_file(checkpoint.weights[name], "hf")
            parameters.pop(spec.hf).copy_(torch.tensor(array))
    assert not parameters
    return model


def write_reference(folder, checkpoint, prompts):
    """`NAME.logits.npy`, and for continued prompts `NAME.tokens.npy` and `NAME.margins.npy`."""
    reference = transformers_model(checkpoint)
    for name, ids in prompts.items():
        ids = torch.tensor(ids[None])
        with torch.no_grad():
            np.save(folder / f"{name}.logits.npy", reference(ids).logits[0].numpy())
        if name in CONTINUED:
            continued = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best, second = torch.cat(continued.logits).topk(2).values.T
            np.save(folder / f"{name}.tokens.npy", continued.sequences[0].numpy())
            np.save(folder / f"{name}.margins.npy", (best - second).numpy())


@pytest.fixture(scope="module")
def reference(checkpoint, prompts, tmp_path_factory):
    """Reads an array of `write_reference`, which runs in the worker that comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sample-reference"
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_suffix(".partial")
            unfinished.mkdir()
            write_reference(unfinished, checkpoint, prompts)
            gc.collect()
            unfinished.rename(folder)
    return lambda name: np.load(folder / f"{name}.npy", mmap_mode="r")


# --- and what we say -----------------------------------------------------------------------------


def logits_in_rows(model, ids, count=100):
    """First position and the logits from there on, `count` positions at a time to save memory."""
    token_ids = ids[None].astype("int32")
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    hidden = model.backbone(inputs)[0]
    for start in range(0, len(ids), count):
        logits = model.backbone.token_embedding(hidden[start : start + count], reverse=True)
        yield start, ops.convert_to_numpy(logits)


@pytest.mark.parametrize("name", [once("short"), "story", once("long"), "longer"])
def test_logits_are_those_of_transformers(reference, model, prompts, name, record_property):
    expected = reference(f"{name}.logits")
    assert expected.shape == (PROMPTS[name][0], 262_144)
    differences = [
        np.abs(found - expected[start : start + len(found)]).max()
        for start, found in logits_in_rows(model, prompts[name])
    ]
    figures = (max(differences), expected[-1].std(), np.ptp(expected[-1]))
    record_property(
        f"sample, {len(expected)} tokens",
        "greatest logit difference {:.2e}; last logits: std {:.1f}, range {:.1f}".format(*figures),
    )
    assert figures[0] < 2e-3
    assert figures[2] > 20  # they are a real model's


def generate(model, rows, length):
    token_ids = np.zeros((len(rows), length), "int32")
    padding_mask = np.zeros((len(rows), length), "int32")
    for i, row in enumerate(rows):
        token_ids[i, : len(row)] = row
        padding_mask[i, : len(row)] = 1
    inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
    return model.generate(inputs, stop_token_ids=None)["token_ids"]


@pytest.mark.parametrize("names", [("short", "story"), once(("long",))], ids="-".join)
def test_greedy_continuations_are_those_of_transformers(reference, model, prompts, names):
    rows = [prompts[name] for name in names]
    found = generate(model, rows, max(map(len, rows)) + NEW_TOKENS)
    for name, tokens in zip(names, found, strict=True):
        expected = reference(f"{name}.tokens")
        assert reference(f"{name}.margins").min() > 0.01, "a tie: choose another prompt"
        np.testing.assert_array_equal(tokens[: len(expected)], expected)


# --- taught to answer in turns -------------------------------------------------------------------


@pytest.mark.backends("torch")
def test_sample_chat_answers_in_turns_and_ends_them():
    """What `examples/teach_turns.py` shows of all held-out rows, on a few; its file says the rest."""
    checkpoint = open_checkpoint("sample-chat")
    assert checkpoint.instruction_tuned and checkpoint.provenance["name"] == "sample-chat"
    assert {"ADAPTER_NOTICE.md", "GEMMA_TERMS.html"} <= set(checkpoint.notices)
    model = GemmaCausalLM.from_preset("sample-chat", dtype="float32", sequence_length=96)
    yes_or_no = "Is ice colder than water? Answer yes or no."
    assert model.chat(yes_or_no).strip(" .").lower() in ("yes", "no")
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in (
            ("What is another word for large?", "Big."),
            ("Tom has 3 apples and buys 4 more. How many has he now?", "The answer is 7"),
        )
    ]
    taught = model.evaluate(rows, verbose=0, return_dict=True)["perplexity"]
    base = GemmaCausalLM.from_preset(
        "sample", dtype="float32", sequence_length=96, instruction_tuned=True
    )
    untaught = base.evaluate(rows, verbose=0, return_dict=True)["perplexity"]
    assert taught < 0.5 * untaught
