"""What the tests of both writers share."""

from __future__ import annotations

import dataclasses

import safetensors
import torch
import transformers

from gemma_keras.checkpoints.gguf.writer import write_gguf
from gemma_keras.checkpoints.hf.writer import write_safetensors_folder

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IDS = [2, 5, 90, 200, 280, 281, 282, 150, 151, 30, 31, 32, 33, 34, 260, 261, 262]
WRITERS = {"safetensors": write_safetensors_folder, "gguf": write_gguf}


def for_gguf(checkpoint):
    """The same with the query scale that GGUF has no key for."""
    layers = tuple(
        dataclasses.replace(layer, query_scale=layer.head_dim**-0.5)
        for layer in checkpoint.config.layers
    )
    config = dataclasses.replace(checkpoint.config, layers=layers)
    return dataclasses.replace(checkpoint, config=config)


def stored(folder):
    """Name to array of all safetensors in a folder, in the dtype of the file."""
    arrays = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                assert name not in arrays
                arrays[name] = file.get_tensor(name)
    return arrays


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
