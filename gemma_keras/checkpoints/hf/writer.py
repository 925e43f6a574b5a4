"""Writes a Hugging Face folder: `config.json`, safetensors in one file or shards, a tokenizer.

Weights are written in chunks. The `safetensors` package needs all tensors at once, so this module
writes the format itself. A file is the length of the header, a JSON header, and the tensors one
after another.

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edge_demo.safetensors_header import Tensor, encode_header, header_of
from gemma_keras.checkpoints.hf.files import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    hf_files,
    json_text,
)
from gemma_keras.checkpoints.names import WeightSpec, weight_specs
from gemma_keras.checkpoints.source import Checkpoint, check_range, file_chunks
from gemma_keras.checkpoints.token_ids import token_ids
from gemma_keras.checkpoints.unfinished import unfinished
from gemma_keras.errors import CheckpointError


class Dtype(NamedTuple):
    """The dtype's name in the file, bytes and largest magnitude of a number, and the conversion
    from float32."""

    name: str
    num_bytes: int
    largest: float
    round: Callable[[np.ndarray], np.ndarray]


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Finite float32 to the nearest bfloat16, ties to even, as uint16: its upper half."""
    bits = array.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype("<u2")


# By torch's name.
DTYPES = {
    "bfloat16": Dtype("BF16", 2, float.fromhex("0x1.fep127"), _to_bfloat16),
    "float16": Dtype("F16", 2, float(np.finfo(np.float16).max), lambda a: a.astype("<f2")),
    "float32": Dtype("F32", 4, float(np.finfo(np.float32).max), lambda a: a.astype("<f4")),
}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# The files of a checkpoint's folder besides its weights, from this writer and from transformers.
_SMALL_FILES = {
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    _INDEX,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "tokenizer.model",
}


def write_safetensors_folder(
    checkpoint: Checkpoint,
    folder: str | os.PathLike[str],
    dtype: str = "bfloat16",
    max_shard_bytes: int = 2 << 30,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Without a tokenizer the folder holds only the model.

    Args:
        checkpoint: to write; one matrix, or a chunk of a table, is in memory at a time.
        folder: to write, which appears when it is complete.
        dtype: `bfloat16`, `float16` or `float32`, of every weight.
        max_shard_bytes: where the weights are more, they are split between tensors; a tensor that
            is larger has a shard of its own.
        overwrite: whether a folder that holds such a checkpoint may be replaced.
        on_progress: called with the bytes of weights written and those of all.

    Raises:
        ConfigError: no Hugging Face model type can describe the architecture.
        CheckpointError: the folder exists or cannot be written, there is too little space, a number
            is beyond the dtype, or the tokenizer is not as Gemma's.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes must be positive, found {max_shard_bytes}")
    ids = None if checkpoint.tokenizer_model is None else token_ids(checkpoint)
    texts = {n: json_text(n, data) for n, data in hf_files(checkpoint, ids, dtype).items()}
    specs = list(weight_specs(checkpoint.config).values())
    total = sum(_num_bytes(spec, dtype) for spec in specs)
    others = sum(map(len, (*texts.values(), *checkpoint.notices.values())))
    shards = _shards(specs, dtype, max_shard_bytes)
    if len(shards) > 1:
        owner = {spec.hf: name for name, inside in shards.items() for spec in inside}
        index = {"metadata": {"total_size": total}, "weight_map": owner}
        texts[_INDEX] = json_text(_INDEX, index)
    with unfinished(
        Path(folder),
        "folder",
        total + others,
        overwrite=overwrite,
        is_replaceable=_is_checkpoint,
        kept=lambda old: [name for name in _others(old) if name not in checkpoint.notices],
    ) as partial:
        if checkpoint.tokenizer_model is not None:
            (partial / "tokenizer.model").write_bytes(checkpoint.tokenizer_model)
        written = 0
        for name, inside in shards.items():
            with (partial / name).open("wb") as file:
                file.write(_header(inside, dtype))
                for array in _arrays(checkpoint, inside, dtype):
                    file.write(array.reshape(-1).view(np.uint8).data)
                    written += array.nbytes
                    on_progress(written, total)
        _write_texts(partial, texts, checkpoint.notices)


def _shards(
    specs: list[WeightSpec], dtype: str, max_shard_bytes: int
) -> dict[str, list[WeightSpec]]:
    """File name to the weights in it, filled in their order."""
    shards: list[list[WeightSpec]] = [[]]
    size = 0
    for spec in specs:
        num_bytes = _num_bytes(spec, dtype)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += num_bytes
    if len(shards) == 1:
        return {_SINGLE: specs}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, start=1)}


def _header(specs: list[WeightSpec], dtype: str) -> bytes:
    tensors = (
        Tensor(spec.hf, DTYPES[dtype].name, spec.file_shape, _num_bytes(spec, dtype))
        for spec in specs
    )
    # transformers needs the name of the framework.
    return encode_header(header_of(tensors, {"format": "pt"}))


def _arrays(checkpoint: Checkpoint, specs: list[WeightSpec], dtype: str) -> Iterator[np.ndarray]:
    for spec in specs:
        for array in file_chunks(checkpoint, spec, "hf"):
            check_range(array, DTYPES[dtype].largest, spec.name, dtype)
            yield DTYPES[dtype].round(array)


def _num_bytes(spec: WeightSpec, dtype: str) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * DTYPES[dtype].num_bytes


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder holds only files of such a checkpoint."""
    return (
        path.is_dir()
        and not path.is_symlink()
        and (path / CONFIG_FILE).is_file()
        and ((path / _SINGLE).is_file() or (path / _INDEX).is_file())
        and all(entry.is_file() for entry in path.iterdir())
    )


def _others(folder: Path) -> list[str]:
    """The names in such a folder that no checkpoint has."""
    names = (path.name for path in folder.iterdir())
    return sorted(n for n in names if n not in _SMALL_FILES and not n.endswith(".safetensors"))


def _write_texts(folder: Path, texts: Mapping[str, str], notices: Mapping[str, bytes]) -> None:
    """Write the small files of a checkpoint; a notice must not take the name of another file."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, content in notices.items():
        path = folder / name
        if Path(name).name != name or path.exists():
            raise CheckpointError(
                f"the notice {name!r} must be a plain file name that no other file has"
            )
        path.write_bytes(content)
