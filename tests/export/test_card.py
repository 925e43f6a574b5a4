"""The model card says what the bundle holds, and the chart draws what it is given."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter

import pytest

from export.bundle.card import write_card
from export.bundle.svg import bar_chart
from gemma_keras.checkpoints.hf.config import named_config
from gemma_keras.sizes import releases
from tests.edge_demo.bundle_files import read_manifest

ESTIMATE = {"value": 0.5, "error": 0.25}
PART = {
    "positions": 10,
    **dict.fromkeys(
        ("perplexity", "reference_perplexity", "log_ratio", "kl", "probability_difference",
         "rms_probability_difference", "same_top_token"),
        ESTIMATE,
    ),
    "kl_quantiles": [[0.5, 1.5], [0.9, 2.0], [0.95, 2.5], [0.99, 3.5], [0.999, 4.0], [1.0, 5.5]],
}  # fmt: skip
REPORT = {
    "comparison": {
        "reference": {"name": "tiny", "recipe": "fp32"},
        "windows": 24,
        "length": 512,
        "all_positions": PART,
        "second_halves": PART,
    },
    "text": "WikiText-2",
    "kl_by_group": {"layers.0": 0.002, "head": 0.004},
}
QUALITY = {
    "max_logit_difference": 0.851,
    "logit_spread": 5.25,
    "same_top_token": 0.974,
    "mean_kl": 0.00142,
    "tokens": 192,
    "against": "against the Keras model on jax in float32",
}


@pytest.fixture
def manifest(tiny_bundles):
    return read_manifest(tiny_bundles / "gemma3-int8")


def front_matter(card):
    return re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1].splitlines()


def test_a_bundle_has_a_card_that_says_what_it_is(tiny_bundles):
    card = (tiny_bundles / "gemma3-int8" / "README.md").read_text()
    head = front_matter(card)
    assert {"license: gemma", "library_name: onnx", "pipeline_tag: text-generation"} <= set(head)
    assert "- onnx" in head and "- int8" in head and "- conversational" not in head
    assert "base_model" not in card  # no published size, and a name of nobody's
    for word in ("tiny-gemma3, int8", "safetensors", "Not measured", "a base model", "edge-demo",
                 "onnxruntime-genai", "Optimum", "transformers.js", "Gemma Terms of Use",
                 "ORT_DISABLE_TELEMETRY=1",
                 "Prohibited Use Policy", "GEMMA_NOTICE.txt"):  # fmt: skip
        assert word in card
    assert "--target" not in card
    of_board = (tiny_bundles / "gemma3-board" / "README.md").read_text()
    assert "`--target armv8.2` (Raspberry Pi 5)" in of_board
    tuned = (tiny_bundles / "chat" / "README.md").read_text()
    assert "- conversational" in front_matter(tuned) and "edge-demo chat FOLDER" in tuned


def test_bytes_by_format_are_those_of_the_weights_file(tiny_bundles, manifest):
    card = (tiny_bundles / "gemma3-int8" / "README.md").read_text()
    rows = re.findall(r"\| (.*?) \| ([\d,]+) \| ([\d.,]+) MB \|", card)
    sizes = Counter(entry["block_size"] for entry in manifest["plan"].values())
    layers = len(manifest["model"]["config"]["layers"])
    assert sizes == {16: 3 * layers, 32: 4 * layers + 1}
    size = manifest["files"]["model.onnx_data"]["bytes"]  # tensors are aligned in it
    assert sum(float(mb.replace(",", "")) for _, _, mb in rows) * 1e6 == pytest.approx(
        size, rel=0.2
    )
    tensors = {name: int(count) for name, count, _ in rows}
    expected = {f"int8, a scale for every {size} weights": n for size, n in sizes.items()}
    expected["int8, a scale for every 32 weights"] -= 1
    expected["int8, a scale and a zero point for every 32 weights, in two halves of 4 bits"] = 1
    norms = {"float32 (norms)": tensors["float32 (norms)"]}
    assert tensors == expected | norms


def test_what_was_measured_is_shown(manifest, tmp_path):
    write_card(tmp_path, {**manifest, "quality": QUALITY})
    card = (tmp_path / "README.md").read_text()
    for word in ("192 tokens", "0.0014 nats", "97.4%", "0.85 (5.2)", "Keras model on jax"):
        assert word in card
    assert "Not measured" not in card and [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_a_report_adds_the_comparison_and_the_chart(manifest, tmp_path):
    write_card(tmp_path, manifest, REPORT)
    card = (tmp_path / "README.md").read_text()
    assert "Against fp32, 24 windows of 512 tokens, on WikiText-2; ± is the standard error" in card
    assert "| mean KL (nats) | 0.500000 ± 0.250000 | 0.500000 ± 0.250000 |" in card
    assert "| 99 % KL | 3.500000 | 3.500000 |" in card
    assert "| greatest KL | 5.500000 | 5.500000 |" in card
    assert "| same most likely token | 50.000 ± 25.000 % | 50.000 ± 25.000 % |" in card
    assert "](kl_by_group.svg)" in card
    assert "layers.0" in (tmp_path / "kl_by_group.svg").read_text()


def card_of(manifest, folder, size, tuned, provenance, bits=8):
    """The front matter of a bundle of a published size."""
    config = named_config(size).to_dict()
    plan = {"token_embedding": {"bits": bits, "block_size": 32 if bits == 8 else 0}}
    chat = {**manifest["tokenizer"], "chat": {} if tuned else None}
    model = {**manifest["model"], "config": config}
    changed = {"model": model, "plan": plan, "tokenizer": chat, "provenance": provenance}
    write_card(folder, manifest | changed)
    return front_matter((folder / "README.md").read_text())


CAUSAL = [pytest.param(s, r, id=r.repository) for s, r in releases() if s.causal]


@pytest.mark.parametrize(("size", "release"), CAUSAL)
def test_the_base_model_of_every_published_checkpoint_is_it(manifest, tmp_path, size, release):
    fetched = {"format": "safetensors", "repository": release.repository}
    head = card_of(manifest, tmp_path, size.name, release.tuned, fetched)
    assert f"base_model: {release.repository}" in head
    assert "base_model_relation: quantized" in head
    assert ("- conversational" in head) == release.tuned
    head = card_of(manifest, tmp_path, size.name, release.tuned, fetched, bits=32)
    assert f"base_model: {release.repository}" in head and not any("relation" in h for h in head)
    if release.preset:
        preset = {"format": "keras_hub", "preset": release.preset}
        head = card_of(manifest, tmp_path, size.name, release.tuned, preset)
        assert f"base_model: {release.repository}" in head
    named = {"format": "safetensors", "name": release.repository.split("/")[1]}
    head = card_of(manifest, tmp_path, size.name, release.tuned, named)
    assert f"base_model: {release.repository}" in head and not any("relation" in h for h in head)


@pytest.mark.parametrize(
    ("size", "tuned", "provenance", "line"),
    [
        # nothing but the architecture: CodeGemma, ShieldGemma and every tune have that too
        ("gemma_2b", False, {"format": "safetensors", "name": "checkpoint-500"}, None),
        ("gemma3_1b", True, {"format": "keras", "name": "gemma_causal_lm"}, None),
        # a name that the weights cannot bear
        ("gemma_2b", True, {"format": "safetensors", "name": "gemma-2b"}, None),
        ("gemma_7b", False, {"format": "safetensors", "name": "gemma-2b"}, None),
        # what a GGUF file says
        ("gemma3_1b", True, {"format": "gguf", "name": "Gemma 3 1b It"}, "google/gemma-3-1b-it"),
        (
            "gemma3_1b",
            True,
            {"format": "gguf", "name": "Poet", "base_model": "google/gemma-3-1b-pt"},
            "google/gemma-3-1b-pt",
        ),
        # somebody's tune, from the Hub
        ("gemma_2b", True, {"format": "safetensors", "repository": "me/poet"}, "me/poet"),
        # a name that is no name
        ("gemma_2b", True, {"format": "safetensors", "repository": "a/b\nlicense: mit"}, None),
        ("gemma_2b", True, {"format": "safetensors", "base_model": ["a/b"]}, None),
    ],
)
def test_the_base_model_is_what_the_source_says_or_nothing(
    manifest, tmp_path, size, tuned, provenance, line
):
    head = card_of(manifest, tmp_path, size, tuned, provenance)
    assert [h for h in head if h.startswith("base_model:")] == (
        [f"base_model: {line}"] * bool(line)
    )
    assert "license: mit" not in head


def test_medgemma_has_terms_of_its_own(manifest, tmp_path):
    """From the model cards of MedGemma: license other, its name and its link."""
    terms = "developers.google.com/health-ai-developer-foundations/terms"
    source = {"format": "gguf", "license": "other", "base_model": "google/medgemma-4b-it"}
    head = card_of(manifest, tmp_path, "medgemma_4b", True, source)
    assert head[:3] == [
        "license: other",
        "license_name: health-ai-developer-foundations",
        f"license_link: https://{terms}",
    ]
    card = (tmp_path / "README.md").read_text()
    assert f"Health AI Developer Foundations Terms of Use found at\n[{terms}]" in card
    assert "Gemma Terms of Use" not in card
    head = card_of(manifest, tmp_path, "gemma3_4b", True, source | {"base_model": "me/poet"})
    assert head[0] == "license: gemma"


def test_what_a_keras_model_held_may_have_been_trained(manifest, tmp_path):
    source = {"format": "safetensors", "repository": "google/gemma-2b", "through": "keras"}
    head = card_of(manifest, tmp_path, "gemma_2b", False, source)
    assert "base_model: google/gemma-2b" in head and not any("relation" in h for h in head)
    assert "held by a Keras model" in (tmp_path / "README.md").read_text()


def test_a_bundle_without_the_files_of_others_says_so(manifest, tmp_path):
    write_card(tmp_path, manifest)
    card = (tmp_path / "README.md").read_text()
    assert "Other runtimes do not load" in card and "transformers.js" not in card
    (tmp_path / "config.json").write_text("{}")
    write_card(tmp_path, manifest)
    assert "Other runtimes do not load" not in (tmp_path / "README.md").read_text()


def test_a_name_from_a_checkpoint_is_no_markup(manifest, tmp_path):
    name = "a\n# b <script>|`*_[x](y)"
    changed = {**manifest, "model": {**manifest["model"], "name": name}}
    write_card(tmp_path, changed)
    card = (tmp_path / "README.md").read_text()
    assert "\\# b \\<script\\>\\|\\`\\*\\_\\[x\\](y), int8" in card and "\n# b" not in card


# --- the chart -----------------------------------------------------------------------------------


def bars(svg):
    root = ET.fromstring(svg)
    rects = [e for e in root.iter() if e.tag.endswith("rect")][1:]
    return [float(e.get("width")) for e in rects], [e.text for e in root.iter() if e.text]


def test_bars_are_as_long_as_their_values():
    widths, texts = bars(bar_chart({"a": 0.002, "b": 0.004, "c & <d>": 0.0}, "Mean <KL>"))
    assert widths == [widths[1] / 2, widths[1], 0.0]
    assert widths[1] > 100
    assert {"Mean <KL>", "c & <d>", "0.002", "0.004", "0"} <= set(texts)


def test_a_chart_of_nothing_but_zeros_has_no_bars():
    assert bars(bar_chart({"a": 0.0, "b": -1e-12}, "t"))[0] == [0.0, 0.0]


def test_report_is_what_compare_prints():
    """Guards the card against a change of the command's JSON."""
    from edge_demo.evaluate.compare import Comparison, Divergence

    assert set(REPORT["comparison"]) - {"reference"} == set(Comparison.__dataclass_fields__)
    assert set(PART) == set(Divergence.__dataclass_fields__)
    assert json.loads(json.dumps(REPORT)) == REPORT
