"""Paths that are near a checkpoint, but none, and folders that other tools leave: a sentence that
helps, or the right model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_keras import open_checkpoint
from gemma_keras.errors import ModelError
from tests.models import tiny_tokenizer_model, write_tiny_hf


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("misplaced") / "base"
    write_tiny_hf(folder, "gemma3")
    return folder


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "folder")


def refusal(source):
    with pytest.raises(ModelError) as error:
        open_checkpoint(source)
    return str(error.value)


# --- near a checkpoint ---------------------------------------------------------------------------


def test_a_folder_of_trainings_checkpoints_names_the_newest_by_number(folder):
    runs = folder.parent / "runs"
    for number in (9, 100, 20):
        (runs / f"checkpoint-{number}").mkdir(parents=True)
        shutil.copy(folder / "config.json", runs / f"checkpoint-{number}")
    assert refusal(runs).endswith(f"such as {runs / 'checkpoint-100'}, the newest")


def test_a_folder_of_adapters_names_one(tmp_path):
    (tmp_path / "runs" / "default").mkdir(parents=True)
    (tmp_path / "runs" / "default" / "adapter_config.json").write_text("{}")
    assert f"such as {tmp_path / 'runs' / 'default'}" in refusal(tmp_path / "runs")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["snapshots/abc/config.json"], "is an entry of the Hugging Face Hub's cache"),
        (["zero_to_fp32.py"], "holds a DeepSpeed checkpoint"),
        (["b.gguf", "a.gguf"], "such as FOLDER/a.gguf"),
        (["model.safetensors"], "holds weights but no config.json"),
        (["tokenizer.model"], "holds a tokenizer but no model"),
        (["bundle.json", "config.json", "model.onnx"], "is a bundle that export-onnx made"),
        ([], "config.json does not exist"),
    ],
    ids=str,
)
def test_a_folder_that_is_no_checkpoint_is_told(files, said, tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    assert said.replace("FOLDER", str(folder)) in refusal(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bundle.json", "is a bundle that export-onnx made"),
        ("model.safetensors", "give the folder FOLDER"),
        ("config.json", "give the folder FOLDER"),
        ("model.safetensors.index.json", "give the folder FOLDER"),
        ("tokenizer.model", "is a tokenizer without a model"),
        ("pytorch_model.bin", "is a pickle"),
        ("model.keras", "is a saved Keras model"),
        ("model.onnx", "is already an ONNX graph"),
        ("gemma.task", "is a MediaPipe bundle"),
        ("notes.txt", "is not a GGUF file: it has 2 bytes"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_told(name, said, tmp_path):
    (tmp_path / name).write_text("{}")
    assert said.replace("FOLDER", str(tmp_path)) in refusal(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.model", "model.gguf"]
)
def test_a_pointer_of_git_lfs_is_told(name, folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
    (folder / name).write_text(pointer)
    source = folder / name if name.endswith(".gguf") else folder
    assert f"{folder / name} is a Git LFS pointer" in refusal(source)


# --- weights of other tools ----------------------------------------------------------------------


def test_shards_without_an_index_are_read(folder):
    tensors = load_file(folder / "model.safetensors")
    expected = open_checkpoint(folder).weights["layers.3.mlp.up"]
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:30], names[30:]), start=1):
        shard = folder / f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, shard)
    np.testing.assert_array_equal(open_checkpoint(folder).weights["layers.3.mlp.up"], expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "lacks the shard model-00002-of-00002.safetensors" in refusal(folder)


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        (
            "bitsandbytes",
            {f"{DOWN}.weight": torch.zeros(96 * 80, 1, dtype=torch.uint8), f"{DOWN}.weight.absmax": torch.zeros(9)},
            "bitsandbytes quantized, which cannot be read; give the 16-bit model",
        ),
        ("gptq", {f"{DOWN}.qweight": torch.zeros(20, 96, dtype=torch.int32), f"{DOWN}.weight": None}, "GPTQModel"),
        ("awq", {f"{DOWN}.qweight": torch.zeros(20, 96, dtype=torch.int32), f"{DOWN}.weight": None}, "awq quantized"),
        ("a new one", {f"{DOWN}.weight": torch.zeros(96, 160, dtype=torch.int8)}, "a new one quantized"),
        (None, {f"{DOWN}.weight": torch.zeros(96, 20, dtype=torch.uint32), f"{DOWN}.scales": torch.zeros(9)}, "mlx_lm"),
        (None, {f"{DOWN}.weight": torch.zeros(96, 160, dtype=torch.int8)}, "is of type I8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_weights_that_a_tool_quantized_are_told_as_its(method, change, said, folder):
    tensors = load_file(folder / "model.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    if method is not None:
        edit(folder, quantization_config={"quant_method": method})
    assert said in refusal(folder)


def test_floats_that_a_quantizers_configuration_was_left_beside_are_read(folder, base):
    edit(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    found, expected = (
        open_checkpoint(path).weights["layers.0.mlp.down"] for path in (folder, base)
    )
    np.testing.assert_array_equal(found, expected)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- a head beside a tied embedding --------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, None], ids=str)
def test_a_head_that_differs_from_the_tied_table_is_kept(tied, folder):
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    edit(folder, tie_word_embeddings=tied)
    save_file(tensors | {"lm_head.weight": table.clone()}, folder / "model.safetensors")
    assert open_checkpoint(folder).config.tied_head
    head = table.clone()
    head[-1, -1] += 1  # transformers 5, too, then ties them no more
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.config.tied_head
    np.testing.assert_array_equal(checkpoint.weights["head"], head.numpy())
    np.testing.assert_array_equal(checkpoint.weights["token_embedding"], table.numpy())


def test_a_head_in_place_of_the_tied_table_is_both(folder):
    tensors = load_file(folder / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": table}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.tied_head
    np.testing.assert_array_equal(checkpoint.weights["token_embedding"], table.numpy())


# --- what the caller says ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, False])
def test_whether_it_is_tuned_can_be_said_of_every_source(value, folder):
    assert open_checkpoint(folder, instruction_tuned=value).instruction_tuned is value
    assert (folder / "tokenizer.model").read_bytes() == tiny_tokenizer_model()
