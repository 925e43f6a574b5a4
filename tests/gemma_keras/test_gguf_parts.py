"""GGUF as other tools write it: in several files, with an image tower, with rotary factors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from gemma_keras import open_checkpoint
from gemma_keras.errors import CheckpointError, ModelError
from tests import gguf_files
from tests.gemma_keras.llama_cpp import llama, needs_llama_cpp
from tests.models import random_ids, relative_difference, tiny_hf, tiny_tokenizer_model

META = gguf_files.metadata("gemma3", 2)
ARRAYS = gguf_files.tensors(META)


def write_parts(folder, count=3, **changes):
    """The model in parts as `llama-gguf-split` makes them: all metadata in the first."""
    names = sorted(ARRAYS)
    paths = []
    for number in range(count):
        split = {"split.no": number, "split.count": count, "split.tensors.count": len(ARRAYS)}
        meta = META if number == 0 else {"general.architecture": "gemma3"}
        path = folder / f"tiny-{number + 1:05}-of-{count:05}.gguf"
        part = {name: ARRAYS[name] for name in names[number::count]}
        paths.append(gguf_files.write_gguf(path, meta | split | changes, part))
    return paths


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    return str(error.value)


@pytest.mark.parametrize("given", range(3))
def test_any_part_opens_the_whole(given, tmp_path):
    whole = open_checkpoint(gguf_files.write_gguf(tmp_path / "whole.gguf", META, ARRAYS))
    parts = open_checkpoint(write_parts(tmp_path)[given])
    assert parts.config == whole.config
    assert parts.tokenizer_model == whole.tokenizer_model
    for name in whole.weights:
        np.testing.assert_array_equal(parts.weights[name], whole.weights[name])


def test_a_missing_part_is_named(tmp_path):
    first, second, third = write_parts(tmp_path)
    second.unlink()
    assert f"{second.name} is missing from its folder" in refusal(third)
    third.rename(tmp_path / "renamed.gguf")
    assert "NAME-00001-of-00003.gguf" in refusal(tmp_path / "renamed.gguf")
    assert "and 1 more" in refusal(first)


def test_parts_of_different_models_are_refused(tmp_path):
    first, second, third = write_parts(tmp_path)
    third.write_bytes(second.read_bytes())
    assert "is in tiny-00002-of-00003.gguf and in tiny-00003-of-00003.gguf" in refusal(first)
    write_parts(tmp_path, **{"split.tensors.count": 5})
    assert "keep only the parts of one model" in refusal(first)


def test_many_parts_that_are_not_there_are_refused_at_once(tmp_path):
    path = write_parts(tmp_path, **{"split.count": 2**31 - 1})[0]
    assert "one of 2,147,483,647 parts" in refusal(path)


def test_the_tower_for_images_is_passed_over_and_said(tmp_path):
    extra = {
        "v.blk.0.attn_q.weight": np.zeros((4, 4), np.float32),
        "mm.mm_input_projection.weight": np.zeros((4, 4), np.float32),
    }
    keys = {"gemma3.vision.block_count": 27, "gemma3.mm.tokens_per_image": 256}
    path = gguf_files.write_gguf(tmp_path / "ollama.gguf", META | keys, ARRAYS | extra)
    checkpoint = open_checkpoint(path)
    assert checkpoint.remarks == (
        "ollama.gguf holds 2 image tensors (v.*, mm.*), which were ignored: only the "
        "text model is loaded",
    )
    np.testing.assert_array_equal(
        checkpoint.weights["layers.1.mlp.up"], ARRAYS["blk.1.ffn_up.weight"].T
    )


@pytest.mark.parametrize(
    ("factors", "opens"),
    [
        (np.ones(16), True),
        (np.full(16, 8.0), False),
        (np.ones(15), False),
        (np.ones((16, 1)), False),
    ],
    ids=["ones", "eights", "short", "matrix"],
)
def test_rotary_factors_that_change_nothing_are_passed_over(factors, opens, tmp_path):
    extra = {"rope_freqs.weight": factors.astype(np.float32)}
    path = gguf_files.write_gguf(tmp_path / "m.gguf", META, ARRAYS | extra)
    if opens:
        assert len(open_checkpoint(path).weights) == len(ARRAYS)
    else:
        assert "rope_freqs.weight, a separate divisor for each rotary frequency" in refusal(path)


def test_an_unknown_tensor_is_still_refused(tmp_path):
    extra = {"blk.0.ffn_gate_exps.weight": np.ones((4, 4), np.float32)}
    path = gguf_files.write_gguf(tmp_path / "m.gguf", META, ARRAYS | extra)
    with pytest.raises(ModelError, match=r"does not have: blk\.0\.ffn_gate_exps"):
        open_checkpoint(path)


def with_keys(source, target, changes):
    """A GGUF file again, with other keys of the architecture: `None` takes one away."""
    reader = gguf.GGUFReader(source)
    keys = {
        name: (field.types[0], field.contents())
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    kind = keys.pop("general.architecture")[1]
    types = {str: "STRING", float: "FLOAT32", int: "UINT32", list: "ARRAY"}
    for name, value in changes.items():
        keys.pop(f"{kind}.{name}", None)
        if value is not None:
            keys[f"{kind}.{name}"] = (gguf.GGUFValueType[types[type(value)]], value)
    writer = gguf.GGUFWriter(target, kind)
    for name, (value_type, value) in keys.items():
        if value_type == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, value_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.backends("torch")  # what a key means, no backend changes
@pytest.mark.keras
@pytest.mark.peer
@needs_llama_cpp
@pytest.mark.parametrize(
    "changes",
    [
        {"attention.sliding_window": 0, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"attention.sliding_window": None},
        {"rope.scaling.type": None, "rope.scaling.factor": None, "rope.scale_linear": 4.0},
        {"rope.scaling.type": None, "rope.scaling.factor": 4.0},
        {"attention.sliding_window_pattern": [True, False, True, True, False, True, True, False]},
        {"attention.sliding_window_pattern": 3},
    ],
    ids=str,
)
def test_keys_that_nobody_publishes_mean_what_llama_cpp_makes_of_them(changes, tmp_path):
    from gemma_keras import GemmaCausalLM
    from gemma_keras.checkpoints.gguf.writer import write_gguf

    model = tiny_hf("gemma3")
    model.config.query_pre_attn_scalar = model.config.head_dim  # which GGUF cannot say
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    write_gguf(open_checkpoint(tmp_path / "hf"), tmp_path / "plain.gguf", tensor_type="f32")
    path = with_keys(tmp_path / "plain.gguf", tmp_path / "changed.gguf", changes)
    ids = random_ids()[0].tolist()
    plain, found = (
        GemmaCausalLM.from_preset(source).logits([ids])[0]
        for source in (tmp_path / "plain.gguf", path)
    )
    theirs = np.array(llama(path, ids)["logits"])
    assert relative_difference(found, theirs) < 0.01  # llama.cpp rounds activations to float16
    assert relative_difference(plain, theirs) > 0.03


@pytest.mark.keras
def test_from_preset_is_told_whether_a_gguf_is_tuned(tmp_path):
    from gemma_keras import GemmaCausalLM

    path = gguf_files.write_gguf(tmp_path / "m.gguf", META, ARRAYS)
    assert not GemmaCausalLM.from_preset(path).instruction_tuned
    model = GemmaCausalLM.from_preset(path, instruction_tuned=True)
    assert model.instruction_tuned
    model.save_to_preset(tmp_path / "own")
    assert GemmaCausalLM.from_preset(tmp_path / "own").instruction_tuned
    again = GemmaCausalLM.from_preset(tmp_path / "own", instruction_tuned=False)
    assert not again.instruction_tuned


def test_export_onnx_says_what_it_passed_over_and_is_told_what_it_cannot_know(tmp_path):
    extra = {"v.blk.0.attn_q.weight": np.zeros((4, 4), np.float32)}
    path = gguf_files.write_gguf(tmp_path / "m.gguf", META, ARRAYS | extra)
    command = Path(sys.executable).with_name("export-onnx")
    options = ("--recipe", "fp32", "--no-verify", "--no-instruction-tuned")
    done = subprocess.run(
        [command, path, tmp_path / "out", *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "export-onnx: note: m.gguf holds 1 image tensors" in done.stderr
    done = subprocess.run(
        [command, path, tmp_path / "out2", *options[:3], "--instruction-tuned", "--base", path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "is a complete model and not an adapter" in done.stderr
