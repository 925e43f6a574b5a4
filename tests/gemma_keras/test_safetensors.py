"""Hugging Face folders that lie, in header, index, types or sizes, and weights kept as a pickle.

Each is refused in one sentence that names the thing, before its weights are read and without
memory for what it claims. What `export-onnx` says of such folders is in `tests/export/test_bad_input.py`.
"""

from __future__ import annotations

import json
import os
import pickle
import time
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from gemma_keras import open_checkpoint
from gemma_keras.errors import CheckpointError, ConfigError, ModelError
from tests.agreement import CASES, seeded_weights, write_folder

CONFIG = CASES["gemma3"] | {"num_hidden_layers": 2}
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "hf", CONFIG)


def refusal(folder, kind=CheckpointError):
    """The sentence with which a folder is refused, quickly and without memory."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(ModelError) as caught:
            open_checkpoint(folder)
        seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert type(caught.value) is kind
    assert seconds < 30 and peak < 8 << 20
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600
    return said


def test_the_folder_is_good_as_it_is(folder):
    weights = open_checkpoint(folder).weights
    np.testing.assert_array_equal(weights["layers.1.mlp.up"].T, seeded_weights(CONFIG)[UP])


# --- the header ----------------------------------------------------------------------------------


def header(file):
    """The header of a file of safetensors, and what follows it."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_header(file, header, rest):
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def moved(by):
    def change(header):
        start, end = header[UP]["data_offsets"]
        header[UP]["data_offsets"] = [start + by, end + by]

    return change


def _backwards(header):
    header[UP]["data_offsets"].reverse()


def _overlapping(header):
    width = header[UP]["shape"][0] * header[UP]["shape"][1] * 4
    others = [v for k, v in header.items() if k not in (UP, "__metadata__")]
    start = next(v["data_offsets"][0] for v in others if np.prod(v["shape"]) * 4 == width)
    header[UP]["data_offsets"] = [start, start + width]


def _past_the_end(header):
    last = max(
        (v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"]
    )
    last["data_offsets"][1] += 4 << 40
    last["shape"] = [(last["data_offsets"][1] - last["data_offsets"][0]) // 4]


def _enormous(header):
    header[UP]["shape"] = [1 << 62, 1 << 62]


def _negative(header):
    header[UP]["data_offsets"][0] = -4


def _taller(header):
    header[UP]["shape"][0] += 1


def _narrower_type(header):
    header[UP]["dtype"] = "BF16"


LIES = {
    "a hole before it": moved(4),
    "an overlap by four bytes": moved(-4),
    "the place of another tensor": _overlapping,
    "an end before the start": _backwards,
    "an end past the file": _past_the_end,
    "a negative start": _negative,
    "a shape of more bytes": _taller,
    "a shape beyond 64 bits": _enormous,
    "a type of fewer bytes": _narrower_type,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_about_a_tensor_is_refused(folder, lie):
    file = folder / "model.safetensors"
    data, rest = header(file)
    write_header(file, data, rest)
    open_checkpoint(folder)  # packed anew it is still good; the lie is what is refused
    LIES[lie](data)
    write_header(file, data, rest)
    assert f"{file} cannot be read as safetensors" in refusal(folder)


@pytest.mark.parametrize("length", [0, 1, 1 << 25, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_of_another_length_is_refused(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    assert f"{file} cannot be read as safetensors" in refusal(folder)


@pytest.mark.parametrize("change", [-1, -(1 << 16), 1, 1 << 16])
def test_a_file_of_another_length_is_refused(folder, change):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size + change)
    assert f"{file} cannot be read as safetensors" in refusal(folder)


# --- tensors -------------------------------------------------------------------------------------


def rewrite(folder, change):
    """The file of weights after `change` of its tensors, which it may put others in place of."""
    weights = seeded_weights(CONFIG)
    change(weights)
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("shape", "found"),
    [((96, 160), [96, 160]), ((159, 96), [159, 96]), ((160 * 96,), [15360]), ((), [])],
    ids=["turned", "a row short", "flat", "a number"],
)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder, shape, found):
    rewrite(folder, lambda weights: weights.update({UP: np.zeros(shape, "float32")}))
    said = refusal(folder)
    assert said == (f"the tensor {UP} has shape {found}, but the configuration needs [160, 96]")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool"])
def test_a_tensor_that_is_not_of_floats_is_refused(folder, dtype):
    """Of the right shape it would be read as weights that are 100 times too large."""
    rewrite(folder, lambda weights: weights.update({UP: np.ones((160, 96), dtype)}))
    assert f"the tensor {UP} is of type" in refusal(folder)


def test_an_8_bit_float_is_refused(folder):
    weights = {name: torch.tensor(array) for name, array in seeded_weights(CONFIG).items()}
    weights[UP] = weights[UP].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert f"the tensor {UP} is of type F8_E4M3" in refusal(folder)


def test_integers_of_a_vision_tower_are_of_no_account(folder):
    name = "vision_tower.vision_model.embeddings.position_ids"
    rewrite(folder, lambda weights: weights.update({name: np.zeros(4, "int64")}))
    open_checkpoint(folder)


def test_a_tensor_with_and_without_its_prefix_is_refused(folder):
    name = "language_" + UP.replace("model.", "model.model.", 1)
    rewrite(folder, lambda weights: weights.update({name: weights[UP]}))
    assert f"{UP} both with and without the prefix language_model.model." in refusal(folder)


# --- shards --------------------------------------------------------------------------------------

SHARDS = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]


def write_shards(folder, double=()):
    """The same weights in two files; the `double` ones in both. Returns tensor to shard."""
    weights = list(seeded_weights(CONFIG).items())
    weight_map = {}
    (folder / "model.safetensors").unlink()
    for i, shard in enumerate(SHARDS):
        part = dict(weights[i::2]) | {n: a for n, a in weights if n in double}
        safetensors.numpy.save_file(part, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    return weight_map


def write_index(folder, weight_map):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_shards_are_read_by_their_index(folder):
    write_index(folder, write_shards(folder))
    weights = open_checkpoint(folder).weights
    np.testing.assert_array_equal(weights["layers.1.mlp.up"].T, seeded_weights(CONFIG)[UP])


def test_a_shard_that_is_not_there_is_named(folder):
    write_index(folder, write_shards(folder))
    (folder / SHARDS[1]).unlink()
    assert f"{folder} lacks the shard {SHARDS[1]}" == refusal(folder)
    (folder / SHARDS[1]).mkdir()
    assert f"{folder} lacks the shard {SHARDS[1]}" == refusal(folder)


def test_a_shard_that_the_index_leaves_out_leaves_its_tensors_out(folder):
    weight_map = write_shards(folder)
    write_index(folder, {n: s for n, s in weight_map.items() if s == SHARDS[0]})
    missing = {n for n, s in weight_map.items() if s == SHARDS[1]}
    said = refusal(folder)
    assert any(said == f"the checkpoint lacks the tensor {name}" for name in missing)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", UP])
def test_a_tensor_that_its_shard_does_not_hold_is_named(folder, name):
    weight_map = write_shards(folder)
    other = SHARDS[weight_map.get(name) == SHARDS[0]]
    index = write_index(folder, weight_map | {name: other})
    assert f"{index} says that {other} holds the tensor {name}, but it does not" in refusal(folder)


def test_a_tensor_in_two_shards_is_named(folder):
    write_index(folder, write_shards(folder, double=[NORM]))
    assert f"holds the tensor {NORM} twice, in {SHARDS[0]} and in {SHARDS[1]}" in refusal(folder)


@pytest.mark.parametrize(
    "weight_map", [None, {}, [], ["model.safetensors"], "model.safetensors", 5], ids=json.dumps
)
def test_an_index_of_nothing_is_refused(folder, weight_map):
    write_shards(folder)
    index = write_index(folder, weight_map)
    assert f"{index} must have a weight_map" in refusal(folder)


@pytest.mark.parametrize("name", [None, 7, [], {}, "", ".", "..", "../hf/model.safetensors"])
def test_an_index_that_names_no_file_of_the_folder_is_refused(folder, name):
    index = write_index(folder, {NORM: name})
    said = refusal(folder)
    assert said.startswith(
        (f"{index} names a file outside its folder", f"{folder} lacks the shard")
    )


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 100_000, b"1" * 5_000, b"[]", b"null"],
    ids=["empty", "cut", "not UTF-8", "deep lists", "deep objects", "long number", "list", "null"],
)
def test_a_file_that_is_not_json_is_named(folder, name, text):
    (folder / name).write_bytes(text)
    said = refusal(folder)
    assert said.startswith(str(folder / name))
    assert " is not JSON: " in said or said.endswith(" must hold a JSON object")


def test_a_folder_in_place_of_a_configuration_is_told(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert refusal(folder) == f"{folder / 'config.json'} cannot be read: Is a directory"


# --- sizes that nobody has -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"vocab_size": 10**8}, CheckpointError, "model.embed_tokens.weight has shape [300, 96]"),
        (
            {"vocab_size": 10**9},
            ConfigError,
            "vocabulary_size (1,000,000,000) with hidden_dim (96)",
        ),
        ({"vocab_size": 10**12}, ConfigError, "the limit is 2,147,483,647"),
        ({"hidden_size": 10**9}, ConfigError, "needs a matrix that is too large"),
        ({"intermediate_size": 10**15}, ConfigError, "ffw_dim is 1000000000000000"),
        ({"num_attention_heads": 1 << 40}, ConfigError, "num_heads is 1099511627776"),
        ({"num_attention_heads": 1 << 30}, ConfigError, "num_heads * head_dim (34,359,738,368)"),
        ({"head_dim": 1 << 50}, ConfigError, "head_dim is 1125899906842624"),
        ({"sliding_window": 1 << 63}, ConfigError, "sliding_window is 9223372036854775808"),
        ({"max_position_embeddings": 1 << 31}, ConfigError, "context_length is 2147483648"),
        ({"num_hidden_layers": 1000}, CheckpointError, "lacks the tensor model.layers.2."),
        ({"num_hidden_layers": 10**9}, ConfigError, "the limit is 1000"),
        ({"vocab_size": -1}, ConfigError, "vocabulary_size must be a positive integer, found -1"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_size_beyond_the_weights_is_refused_before_memory_is_taken(folder, change, kind, said):
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    assert said in refusal(folder, kind)


# --- pickles -------------------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path):
    """A place that is there once a pickle has been read."""
    return tmp_path / "sprung"


def write_pickle(path, trap):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(Trap(trap)))
    else:
        torch.save({"model.norm.weight": Trap(trap)}, path)  # a zip file with a pickle in it


def test_the_trap_would_spring(tmp_path, trap):
    write_pickle(tmp_path / "pytorch_model.bin", trap)
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert trap.exists()


NAMES = ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "gemma-2b.ckpt", "weights.pkl"]


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_instead_of_safetensors_is_refused(folder, trap, name):
    (folder / "model.safetensors").unlink()
    write_pickle(folder / name, trap)
    said = refusal(folder)
    assert f"{name} is a pickle, which is not read because it can run arbitrary code" in said
    assert not trap.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_beside_safetensors_is_not_touched(folder, trap, name):
    """Many a published folder has both."""
    write_pickle(folder / name, trap)
    weights = open_checkpoint(folder).weights
    np.testing.assert_array_equal(weights["layers.1.mlp.up"].T, seeded_weights(CONFIG)[UP])
    assert not trap.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_under_the_name_of_safetensors_is_refused(folder, trap, name):
    write_pickle(folder / name, trap)
    os.replace(folder / name, folder / "model.safetensors")
    assert "model.safetensors cannot be read as safetensors" in refusal(folder)
    assert not trap.exists()


def test_a_pickle_that_an_index_names_is_refused(folder, trap):
    (folder / "model.safetensors").unlink()
    write_pickle(folder / "pytorch_model.bin", trap)
    write_index(folder, dict.fromkeys(seeded_weights(CONFIG), "pytorch_model.bin"))
    assert "pytorch_model.bin cannot be read as safetensors" in refusal(folder)
    assert not trap.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_by_its_own_name_is_refused(folder, trap, name):
    write_pickle(folder / name, trap)
    assert f"{folder / name} is a pickle" in refusal(folder / name)
    assert not trap.exists()
