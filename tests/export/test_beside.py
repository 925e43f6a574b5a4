"""A base model's bundle with its LoRA adapters beside it, in PEFT's format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from export import export_onnx
from export.cli import main
from export.errors import ExportRequestError
from gemma_keras import GemmaCausalLM, open_checkpoint
from gemma_keras.errors import CheckpointError
from gemma_keras.model import lora
from tests.models import TEXT, random_ids, shallow, tiny_hf, write_tiny_hf

pytestmark = [pytest.mark.keras, pytest.mark.backends("torch")]

IDS = random_ids(2, 20)
REFUSED = 2
QUICK = {"recipe": "fp32", "verify": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside") / "base"
    write_tiny_hf(folder, "gemma3", **shallow("gemma3"))
    return folder


def load(base):
    return GemmaCausalLM.from_preset(base, dtype="float32", sequence_length=48)


def teach(model, name, seed=0, **options):
    """Give a model an adapter with values that matter; returns the model."""
    model.enable_lora(**{"rank": 3, "alpha": 5, "targets": "all-linear", "name": name} | options)
    random = np.random.default_rng(seed)
    for layer in lora.layers_of(model.backbone).values():
        if layer.has_lora:
            for matrix in (layer.lora_kernel_a, layer.lora_kernel_b):
                matrix.assign(0.2 * random.normal(size=matrix.shape))
    return model


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "rivers"
    teach(load(base), "rivers").save_adapter(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def assert_the_same_bundle(found: Path, expected: Path, adapters: list[str]) -> None:
    """All files are equal, and beside them are the adapters, which the manifest lists."""
    files, plain = files_of(found), files_of(expected)
    manifest = json.loads(files.pop("bundle.json"))
    listed = manifest.pop("adapters")
    assert list(listed) == adapters
    beside = {name: files.pop(name) for name in list(files) if name.startswith("adapters/")}
    assert {f"adapters/{name}/{file}" for name in listed for file in listed[name]} == set(beside)
    for name, files_of_one in listed.items():
        for file, entry in files_of_one.items():
            assert entry["bytes"] == len(beside[f"adapters/{name}/{file}"])
    assert manifest == json.loads(plain.pop("bundle.json"))
    assert files == plain


def with_peft(folder):
    import peft
    import torch

    model = peft.PeftModel.from_pretrained(tiny_hf("gemma3", **shallow("gemma3")), folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS).long()).logits.numpy()


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied tables
def test_the_bundle_is_the_base_s_and_each_adapter_is_beside_it(base, tmp_path):
    """Two adapters, one in use, at a recipe that is calibrated and verified."""
    model = load(base)
    options = {"format": "onnx", "recipe": "int8", "calibration": "self"}
    model.export(tmp_path / "base", **options)
    expected = {}
    for seed, (name, settings) in enumerate({"rivers": {}, "the sea": {"rslora": True}}.items()):
        teach(model, name, seed, rank=2 + seed, **settings)
        expected[name] = model.logits(IDS)
    result = model.export(tmp_path / "beside", adapters="beside", **options)
    assert result.adapters == ("rivers", "the sea") == model.adapters
    assert model.active_adapter == "the sea"
    np.testing.assert_array_equal(model.logits(IDS), expected["the sea"])
    assert_the_same_bundle(tmp_path / "beside", tmp_path / "base", ["rivers", "the sea"])
    assert {path.name for path in tmp_path.iterdir()} == {"base", "beside"}
    Bundle.open(tmp_path / "beside")
    other = load(base)
    for name, logits in expected.items():
        folder = tmp_path / "beside" / "adapters" / name
        model.save_adapter(tmp_path / "saved", name, overwrite=True)
        assert files_of(folder) == files_of(tmp_path / "saved")
        other.load_adapter(folder, name)
        np.testing.assert_array_equal(other.logits(IDS), logits)
        assert np.abs(with_peft(folder) - logits).max() < 1e-4 * logits.std()


def test_what_it_says_is_what_the_base_says_and_not_what_the_adapter_does(base, tmp_path):
    model = teach(load(base), "rivers")
    with model.without_adapter():
        expected = model.logits(IDS[:1])[0]
    adapted = model.logits(IDS[:1])[0]
    for adapters, logits in (("beside", expected), ("merge", adapted)):
        out = tmp_path / adapters
        model.export(out, format="onnx", adapters=adapters, **QUICK)
        found = np.concatenate(
            list(Engine(Bundle.open(out), threads=1).all_logits(IDS[0].tolist()))
        )
        assert np.abs(found - logits).max() < 1e-3 * logits.std()
    assert not (tmp_path / "merge" / "adapters").exists()
    assert np.abs(adapted - expected).max() > 0.1 * expected.std()


def test_integers_of_a_quantized_base_are_stored_unchanged(base, tmp_path):
    model = load(base)
    with pytest.warns(UserWarning, match="the token embedding is not quantized"):
        model.quantize("int4")
    options = {"format": "onnx", "recipe": "int4", "kl_budget": 9.0, "verify": False}
    options["calibration"] = "none"
    model.export(tmp_path / "base", **options)
    model.enable_lora(rank=4, targets="all-linear", name="rivers")
    model.compile(keras.optimizers.Adam(3e-3))
    model.fit(TEXT.splitlines(), batch_size=4, verbose=0)
    logits = model.logits(IDS)
    model.export(tmp_path / "beside", adapters="beside", **options)
    assert_the_same_bundle(tmp_path / "beside", tmp_path / "base", ["rivers"])
    manifest = json.loads((tmp_path / "beside" / "bundle.json").read_text())
    assert "Keras int4" in manifest["rounding"]["source"]
    np.testing.assert_array_equal(model.logits(IDS), logits)


def test_the_command_takes_an_adapter_s_folder_or_file(base, adapter, tmp_path, capsys):
    quick = ["--recipe", "fp32", "--no-verify"]
    assert main([str(base), str(tmp_path / "base"), *quick]) == 0
    model = load(base)
    model.load_adapter(adapter)
    model.save_adapter(tmp_path / "sea.gguf", format="gguf")
    capsys.readouterr()
    for source, name in ((adapter, "rivers"), (tmp_path / "sea.gguf", "sea")):
        out = tmp_path / name
        beside = ["--base", str(base), "--adapters", "beside"]
        assert main([str(source), str(out), *beside, *quick]) == 0
        assert f"{out}/adapters/{name}: an adapter, which is not merged" in capsys.readouterr().out
        assert_the_same_bundle(out, tmp_path / "base", [name])
        other = load(base)
        other.load_adapter(out / "adapters" / name)
        np.testing.assert_allclose(other.logits(IDS), model.logits(IDS), atol=1e-5)
    assert files_of(tmp_path / "rivers" / "adapters" / "rivers") == files_of(adapter)


def test_an_adapter_in_the_folder_of_its_base(base, adapter, tmp_path):
    folder = shutil.copytree(base, tmp_path / "both")
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    export_onnx(folder, tmp_path / "out", adapters="beside", **QUICK)
    assert [path.name for path in (tmp_path / "out" / "adapters").iterdir()] == ["both"]
    with pytest.warns(UserWarning, match="the adapter was merged into the weights"):
        assert load(folder).adapters == ()  # as ever
    assert "adapter" in open_checkpoint(folder).provenance
    manifest = json.loads((tmp_path / "out" / "bundle.json").read_text())
    assert "adapter" not in manifest["provenance"]


def test_a_bundle_that_is_replaced_takes_its_own_adapters_along_and_not_yours(base, tmp_path):
    """Those that an export wrote are replaced; a folder with anything else is kept."""
    out = tmp_path / "out"
    model = teach(load(base), "rivers")
    again = {"format": "onnx", "overwrite": True, **QUICK}
    model.export(out, adapters="beside", **again)
    model.export(out, adapters="beside", **again)
    model.export(out, **again)
    assert not (out / "adapters").exists()
    model.export(out, adapters="beside", **again)
    (out / "adapters" / "mine").mkdir()
    (out / "adapters" / "mine" / "adapter_config.json").write_text("{}")
    model.export(out, adapters="beside", **again)
    assert [path.name for path in (out / "adapters").iterdir()] == ["rivers"]
    kept = out / "adapters.kept1"
    assert {path.name for path in kept.iterdir()} == {"rivers", "mine"}


def test_what_cannot_be_written_beside_a_base_is_refused(base, adapter, tmp_path, capsys):
    out, beside = tmp_path / "out", {"adapters": "beside", **QUICK}
    with pytest.raises(ExportRequestError, match=r"the model has no adapter .*; call enable_lora"):
        load(base).export(out, format="onnx", **beside)
    for source in (base, "sample"):
        with pytest.raises(ExportRequestError, match="is a model without an adapter to keep apart"):
            export_onnx(source, out, **beside)
    merged = teach(load(base), "rivers")
    merged.merge_lora()
    with pytest.raises(ExportRequestError, match="without an adapter; call unmerge_lora first"):
        merged.export(out, format="onnx", **beside)
    table = load(base)
    table.backbone.enable_lora(2, ["token_embedding"])
    with pytest.raises(ExportRequestError, match="LoRA of the embedding cannot be saved"):
        table.export(out, format="onnx", **beside)
    for name in ("a/b", "..", ""):
        with pytest.raises(ExportRequestError, match="not a valid name for a folder"):
            teach(load(base), name).export(out, format="onnx", **beside)
    not_finite = teach(load(base), "rivers")
    layer = not_finite.backbone.transformer_layers[0].mlp.up
    layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, np.inf))
    with pytest.raises(CheckpointError, match="not finite"):
        not_finite.export(out, format="onnx", **beside)
    with pytest.raises(ExportRequestError, match="LoRA of a KerasHub model can only be merged"):
        export_onnx(object(), out, **beside)  # anything that is not ours
    write_tiny_hf(tmp_path / "other", "gemma3", seed=7, **shallow("gemma3"))
    with pytest.raises(CheckpointError, match=r"on another base .*; name the base that it was"):
        export_onnx(adapter, out, base=tmp_path / "other", **beside)
    assert main([str(base), str(out), "--adapters", "beside"]) == REFUSED
    assert capsys.readouterr().err.endswith("remove --adapters beside\n")
    assert main([str(base), str(out), "--adapters", "aside"]) == REFUSED
    assert "'aside'; it must be 'merge' or 'beside'" in capsys.readouterr().err
    assert not out.exists()


def test_what_goes_wrong_leaves_nothing(base, tmp_path, monkeypatch):
    """The disk is full when the adapter is written, within the unfinished folder."""
    model = teach(load(base), "rivers")

    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemma_keras.checkpoints.adapters.write.PeftFiles.write", full)
    with pytest.raises(Exception, match=f"no space was left while writing {tmp_path}/out"):
        model.export(tmp_path / "out", format="onnx", adapters="beside", **QUICK)
    assert list(tmp_path.iterdir()) == []
    assert model.active_adapter == "rivers"
