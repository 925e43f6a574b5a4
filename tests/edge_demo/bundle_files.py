"""Bundles with mistakes, made from copies of good ones, and how they are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edge_demo.bundle.graph_weights import stored_weights
from edge_demo.bundle.reader import Bundle
from edge_demo.cli.describe import describe
from edge_demo.engine.runner import Engine
from edge_demo.errors import BundleError
from edge_demo.text.tokenizer import Tokenizer


def copy_bundle(source: Path, folder: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(source, folder))


def read_manifest(bundle: Path) -> Any:
    return json.loads((bundle / "bundle.json").read_bytes())


def edit_manifest(bundle: Path, edit: Callable[[Any], Any]) -> None:
    """Change the parsed manifest in place, or by what `edit` returns."""
    manifest = read_manifest(bundle)
    changed = edit(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest if changed is None else changed))


def declare(bundle: Path, name: str) -> None:
    """List a file with the size and hash that it has."""
    data = (bundle / name).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(bundle, lambda manifest: manifest["files"].update({name: entry}))


def rewrite(bundle: Path, name: str, data: bytes) -> None:
    """Replace a file and say so in the manifest."""
    (bundle / name).write_bytes(data)
    declare(bundle, name)


def flip_byte(file: Path, place: float = 0.5) -> None:
    """Change one bit of one byte, `place` of the way into the file."""
    with file.open("r+b") as stream:
        offset = int(place * (file.stat().st_size - 1))
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def edit_graph(bundle: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    """Change the engine graph and say so in the manifest."""
    model = onnx.load(bundle / "engine.onnx", load_external_data=False)
    edit(model)
    rewrite(bundle, "engine.onnx", model.SerializeToString())


def use(path):
    """All that a bundle is opened for."""
    opened = Bundle.open(path)
    describe(opened, verified=False)
    engine = Engine(opened, threads=1)
    logits = engine.prefill(Tokenizer(opened).encode("The"))
    assert logits.shape == (opened.vocabulary_size,)


def assert_refused(path, *words):
    with pytest.raises(BundleError) as caught:
        use(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert str(word) in message


def fill_weight(bundle: Path, name: str, value: float, places: slice = slice(None)) -> None:
    """Write a number over float32 weights of the engine graph and say so in the manifest."""
    weight = next(w for w in stored_weights(bundle / "engine.onnx") if w.name == name)
    file = bundle / "model.onnx_data"
    numbers = np.memmap(file, np.float32, "r+", weight.offset, (weight.num_bytes // 4,))
    numbers[places] = value
    numbers.flush()
    declare(bundle, file.name)
