"""Every published size through the whole product: checkpoint, Keras, each recipe, engine, words.

The checkpoints have the depth, the heads, the pattern of layers and the scales of the published ones,
at a width that a test can afford; aliases share their size's. `-m walk` walks every size with every
recipe; otherwise each is walked with int8, and with one of the others in turn.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.cli.main import main
from edge_demo.engine.runner import Engine
from edge_demo.text.tokenizer import Tokenizer
from export import export_onnx
from export.formats.formats import rows_and_inputs
from export.formats.recipes import plan_for_recipe
from export.formats.round_to_nearest import round_to_nearest
from gemma_keras import GemmaCausalLM
from gemma_keras.checkpoints.hf.config import config_from_hf, named_config
from gemma_keras.checkpoints.hf.writer import write_safetensors_folder
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.config import GemmaConfig
from gemma_keras.sizes import SIZES, Size
from tests.models import VOCABULARY_SIZE, chat_tokenizer_model, tiny_tokenizer_model
from tests.models import weight_statistics as statistics

HIDDEN, FFW, HEAD, WINDOW, CONTEXT = 64, 96, 16, 8, 64
MOST_TOKENS = 5
SHALLOW = 18  # layers
STOPS = (1, VOCABULARY_SIZE - 2)  # the end of a sequence, and of a turn
PROMPT = "The old bridge was built"
OTHERS = ("fp32", "fp16", "int4", "int8-rows", "int8-wide")
TARGETS = {"int8-rows": "armv8.0", "int8-wide": "armv8.2"}
# Greatest mean KL divergence from Keras, as a share of what other tokens' logits have; random
# weights are the hardest to round.
MOST = {"fp32": 1e-6, "fp16": 1e-3, "int8": 0.1, "int8-rows": 0.2, "int8-wide": 0.1, "int4": 0.8}
pytestmark = [pytest.mark.keras, pytest.mark.backends("torch")]  # others differ elsewhere

CAUSAL = [size for size in SIZES.values() if size.causal and size.alias_of is None]


def narrow(size: Size) -> GemmaConfig:
    """A size's architecture, layer by layer, at a small width."""
    data = dict(size.hf) | {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": FFW,
        "head_dim": HEAD,
        "max_position_embeddings": CONTEXT,
    }
    config = named_config(size.name)
    if config.layers[0].post_norms:
        data["sliding_window"] = WINDOW
        share = HEAD / config.layers[0].head_dim  # 27B scales queries by another number
        data["query_pre_attn_scalar"] = config.layers[0].query_scale ** -2 * share
    return config_from_hf(data)


def test_only_widths_were_made_small():
    for size in CAUSAL:
        config, true = narrow(size), named_config(size.name)
        assert len(config.layers) == len(true.layers)
        widths = {"head_dim": 0, "ffw_dim": 0, "query_scale": 0}
        for ours, theirs in zip(config.layers, true.layers, strict=True):
            window = {"sliding_window": theirs.sliding_window and WINDOW}
            expected = dataclasses.asdict(theirs) | window
            assert dataclasses.asdict(ours) | widths == expected | widths
            assert ours.query_scale * HEAD**0.5 == pytest.approx(
                theirs.query_scale * theirs.head_dim**0.5
            )
        assert config.final_soft_cap == true.final_soft_cap


def random_weights(config: GemmaConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(config.layers))
    weights = {}
    for spec in weight_specs(config).values():
        mean, deviation = statistics(spec.hf, spec.file_shape)
        values = mean + deviation * rng.standard_normal(spec.file_shape, np.float32)
        weights[spec.name] = spec.from_file(values.astype(np.float32), "hf")
    weights["token_embedding"][list(STOPS)] = 0  # whose logits are then never the greatest
    return weights


# --- checkpoint, Keras, bundle, words ------------------------------------------------------------


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Of a size: its checkpoints, and what Keras makes of them; the last size is kept."""
    kept: dict[str, SimpleNamespace] = {}

    def walk(size: Size) -> SimpleNamespace:
        if size.name not in kept:
            kept.clear()
            kept[size.name] = start(size, tmp_path_factory.mktemp(size.name))
        return kept[size.name]

    return walk


def release_of(size: Size, tuned: bool) -> str:
    return next(r.repository for r in size.releases if r.tuned == tuned)


def start(size: Size, folder: Path) -> SimpleNamespace:
    """Write a size's checkpoints, load one with Keras, and have it predict."""
    config = narrow(size)
    weights = random_weights(config)
    folders = {}
    for tuned, tokenizer in ((False, tiny_tokenizer_model()), (True, chat_tokenizer_model())):
        folders[tuned] = folder / release_of(size, tuned).split("/")[1]
        checkpoint = Checkpoint(config, weights, tokenizer, tuned, {"name": size.title})
        write_safetensors_folder(checkpoint, folders[tuned], "float32")
        told = json.loads((folders[tuned] / "config.json").read_text())
        told["_name_or_path"] = release_of(size, tuned)  # as transformers says what it had loaded
        (folders[tuned] / "config.json").write_text(json.dumps(told))
    model = GemmaCausalLM.from_preset(folders[False], dtype="float32", sequence_length=32)
    ids = np.random.default_rng(0).integers(4, VOCABULARY_SIZE, (1, 3 * WINDOW)).astype("int32")
    return SimpleNamespace(
        folders=folders,
        ids=ids[0].tolist(),
        logits=model.logits(ids)[0],
        model=model,
        weights=weights,
    )


def mean_kl(found: np.ndarray, expected: np.ndarray) -> float:
    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    ours, theirs = (log_softmax(x.astype(np.float64)) for x in (found, expected))
    return float((np.exp(theirs) * (theirs - ours)).sum(-1).mean())


def steps() -> Iterator:
    """Each size with int8 and with another recipe in turn, tuned and not; the rest by hand."""
    for number, size in enumerate(CAUSAL):
        usual = {("int8", True), (OTHERS[number % len(OTHERS)], False)}
        for recipe in ("int8", *OTHERS):
            for tuned in (True, False):
                marks = [] if (recipe, tuned) in usual else [pytest.mark.walk]
                kind = "tuned" if tuned else "base"
                yield pytest.param(
                    size, recipe, tuned, marks=marks, id=f"{size.name}-{recipe}-{kind}"
                )


@pytest.mark.parametrize(("size", "recipe", "tuned"), list(steps()))
def test_a_size_from_checkpoint_to_words(
    size, recipe, tuned, walked, tmp_path, capfd, record_property
):
    made = walked(size)
    options: dict[str, Any] = {"target": TARGETS.get(recipe, "any")}
    expected, most = made.logits, MOST[recipe]
    if recipe == "int4" and len(made.model.backbone.config.layers) <= SHALLOW:
        options = {"kl_budget": 100.0}
    elif recipe == "int4":  # to measure each group of matrices takes the square of the depth
        options, expected, most = {"plan": {}}, logits_in_4_bits(made), MOST["int8"]
    calibration = "none" if recipe in ("int4", "int8") else None
    out = tmp_path / "bundle"
    export_onnx(made.folders[tuned], out, recipe, calibration=calibration, verify=False, **options)

    bundle = Bundle.open(out)
    engine = Engine(bundle, threads=1)
    found = np.concatenate(list(engine.all_logits(made.ids)))
    kl, wrong = (mean_kl(found, np.roll(expected, by, axis=0)) for by in (0, 1))
    record_property(f"{size.name} {recipe}, mean KL", f"{kl:.2g} (of other tokens {wrong:.2g})")
    assert kl < most * wrong

    command, text = ("chat", "Hello\n") if tuned else ("generate", "")
    prompt = [] if tuned else ["--prompt", PROMPT]
    assert speak(command, out, *prompt, stdin=text) == 0
    said = capfd.readouterr().out
    assert len(said) > len(PROMPT) * (not tuned) + 1
    if recipe == "fp32" and not tuned:
        assert said == f"{what_keras_says(made.model, Tokenizer(bundle))}\n"

    card = (out / "README.md").read_text()
    assert f"base_model: {release_of(size, tuned)}\n" in card
    assert f"# {made.folders[tuned].name}, {recipe}, for onnxruntime" in card.replace("\\", "")
    assert ("- conversational\n" in card) == tuned


def logits_in_4_bits(made: SimpleNamespace) -> np.ndarray:
    """What Keras predicts with the numbers that `int4` stores: rounded to nearest, all of them.

    A deep random model is lost in the noise of 4 bits; against the same numbers, only the
    activations are rounded, as with int8."""
    backbone = made.model.backbone
    plan, rounded = plan_for_recipe("int4", backbone.config), dict(made.weights)
    for spec in weight_specs(backbone.config).values():
        if spec.kind != "norm":
            fmt, values = plan[spec.name], made.weights[spec.name]
            rows = values if spec.kind == "table" else values.T
            found = round_to_nearest(rows, fmt).values(fmt, rows_and_inputs(spec)[1])
            rounded[spec.name] = found if spec.kind == "table" else found.T
    backbone.load_weight_source(rounded)
    try:
        return made.model.logits(np.array([made.ids], "int32"))[0]
    finally:
        backbone.load_weight_source(made.weights)


def what_keras_says(model, tokenizer) -> str:
    """The prompt and what follows; of deep models, whose `generate` takes long to compile, token by
    token."""
    ids = tokenizer.encode(PROMPT)
    if len(model.backbone.config.layers) <= SHALLOW:
        return model.generate(PROMPT, max_length=len(ids) + MOST_TOKENS)
    for _ in range(MOST_TOKENS):
        ids.append(int(model.logits(np.array([ids], "int32"))[0, -1].argmax()))
    return tokenizer.decode(ids)


def speak(command: str, bundle: Path, *arguments: str, stdin: str) -> int:
    """A command of `edge-demo`, greedy, in this process."""
    greedy = ("--max-tokens", str(MOST_TOKENS), "--temperature", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        return main([command, str(bundle), *greedy, *arguments])
