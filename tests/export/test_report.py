"""`--report`: what the model card says of a text is what `edge-demo compare` finds on it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from edge_demo.evaluate.compare import compare
from edge_demo.text.tokenizer import Tokenizer
from export import cli, export_onnx, pipeline
from export.bundle.report import measure_on_text
from export.bundle.writer import open_tokenizer
from export.calibrate.text import read_windows
from export.errors import ExportRequestError
from gemma_keras import open_checkpoint
from tests.models import GENERATIONS, TEXT, write_tiny_hf

# It compares bundles with bundles, which no backend changes.
pytestmark = [pytest.mark.keras, pytest.mark.backends("torch")]
WORDS = "The gardener waters the young trees – before the sun is high.\n"


@pytest.fixture(scope="module", params=GENERATIONS)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_hf(folder / "hf", request.param)
    return folder / "hf", [
        export_onnx(folder / "hf", folder / recipe, recipe, calibration="none").path
        for recipe in ("fp32", "int8")
    ]


def test_it_is_the_comparison_with_a_float32_bundle(exported, tmp_path):
    source, paths = exported
    text = tmp_path / "words.txt"
    text.write_text(WORDS * 12)
    reference, bundle = (Bundle.open(path) for path in paths)
    shares = []
    checkpoint = open_checkpoint(source)
    windows = read_windows(text, open_tokenizer(checkpoint), bundle.context_length)
    found = measure_on_text(bundle, checkpoint, windows, shares.append)
    assert shares == sorted(shares) and shares[-1] == 1
    ids = Tokenizer(bundle).encode(text.read_text(), bos=False)
    length = bundle.context_length
    (expected,) = compare(
        Engine(reference), [Engine(bundle)], bundle.tokenizer.bos, ids, length, 24
    )
    expected, comparison = dataclasses.asdict(expected), found["comparison"]
    assert found["text"] == "words.txt"
    assert comparison["windows"] == expected["windows"] > 2
    for part in ("all_positions", "second_halves"):
        for figure in ("kl", "perplexity", "reference_perplexity", "same_top_token"):
            assert comparison[part][figure]["value"] == pytest.approx(
                expected[part][figure]["value"], rel=1e-3
            )


def test_the_card_shows_it(exported, tmp_path, capsys):
    source, _ = exported
    text = tmp_path / "words.txt"
    text.write_text(WORDS * 6)
    arguments = [str(source), str(tmp_path / "out"), "--calibration", "none", "--no-verify"]
    assert cli.main([*arguments, "--report", str(text)]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "on words.txt" in card and "second halves" in card
    assert json.loads((tmp_path / "out/bundle.json").read_text())["quality"] is None


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        (b"two words", "tokens; 128 are needed"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(exported, tmp_path, content, message):
    source, _ = exported
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    stages = []
    with pytest.raises(ExportRequestError, match=rf"text of the report .*text.txt .*{message}"):
        export_onnx(
            source, tmp_path / "out", report=text, on_progress=lambda *step: stages.append(step)
        )
    assert not (tmp_path / "out").exists()
    assert not stages  # nothing slow had begun


def test_a_report_that_memory_does_not_allow_is_refused(exported, tmp_path, monkeypatch, capsys):
    source, _ = exported
    monkeypatch.setattr(pipeline, "free_memory", lambda: 1000)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    arguments = [str(source), str(tmp_path / "out"), "--calibration", "none"]
    assert cli.main([*arguments, "--report", str(text)]) == 1
    message = "the text of the report needs about 0.0 GB of memory, 0.0 GB are free"
    assert message in capsys.readouterr().err
    assert cli.main([*arguments, "--no-verify"]) == 0
