"""Writes a GGUF file, which llama.cpp runs.

The `gguf` package writes the header and rounds. This module writes the tensors, in chunks of rows
that are whole blocks. Norms are always float32, as llama.cpp requires, and hold `1 + scale`. If a
scale has more digits than that sum, they are rounded off.

GGUF is one file. So the notices that came with the weights are in its metadata, under
`gemma_keras.notice.NAME`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from gemma_keras.checkpoints.chat_templates import chat_template
from gemma_keras.checkpoints.gguf.config import config_to_gguf
from gemma_keras.checkpoints.names import WeightSpec, weight_specs
from gemma_keras.checkpoints.sentencepiece_model import stop_metadata, tokenizer_metadata
from gemma_keras.checkpoints.source import Checkpoint, check_range, file_chunks
from gemma_keras.checkpoints.token_ids import token_ids
from gemma_keras.checkpoints.unfinished import unfinished
from gemma_keras.errors import CheckpointError, ConfigError

Type = gguf.GGMLQuantizationType


class _TensorType(NamedTuple):
    """The type of matrices and tables, the file type, and the largest number of that type."""

    ggml: gguf.GGMLQuantizationType
    file: gguf.LlamaFileType
    largest: float


_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT16_MAX = float(np.finfo(np.float16).max)
_TYPES = {
    "f32": _TensorType(Type.F32, gguf.LlamaFileType.ALL_F32, _FLOAT32_MAX),
    "f16": _TensorType(Type.F16, gguf.LlamaFileType.MOSTLY_F16, _FLOAT16_MAX),
    "bf16": _TensorType(Type.BF16, gguf.LlamaFileType.MOSTLY_BF16, float.fromhex("0x1.fep127")),
    # a block's scale is float16, its largest value 127 times that
    "q8_0": _TensorType(Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0, 127 * _FLOAT16_MAX),
}
_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT


def write_gguf(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    tensor_type: str = "f16",
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a GGUF file of architecture `gemma`, `gemma2` or `gemma3`.

    Args:
        checkpoint: to write; one matrix, or a chunk of a table, is in memory at a time.
        path: of the file, which appears when it is complete.
        tensor_type: `f32`, `f16`, `bf16` or `q8_0`, of matrices and tables.
        overwrite: whether a file of that name may be replaced.
        on_progress: called with the bytes of weights written and those of all.

    Raises:
        ConfigError: GGUF cannot describe the architecture, or its rows are not a multiple of the
            type's block size.
        CheckpointError: the file exists or cannot be written, there is too little space, a number
            is beyond the type, or there is no tokenizer or one unlike Gemma's.
    """
    if tensor_type not in _TYPES:
        raise CheckpointError(f"tensor_type is {tensor_type!r}; choose one of {', '.join(_TYPES)}")
    kind = _TYPES[tensor_type]
    metadata = _metadata(checkpoint, kind)
    specs = list(weight_specs(checkpoint.config).values())
    for spec in specs:
        _check_blocks(spec, kind, tensor_type)
    total = sum(_num_bytes(spec, kind) for spec in specs)
    header = sum(map(len, checkpoint.notices.values()))
    target = Path(path)
    with unfinished(
        target, "file", total + header, overwrite=overwrite, is_replaceable=Path.is_file
    ) as partial:
        _write_header(partial, metadata, specs, kind)
        written = 0
        with partial.open("ab") as file:
            for spec in specs:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                for array in file_chunks(checkpoint, spec, "gguf"):
                    check_range(array, _largest(spec, kind), spec.name, tensor_type)
                    data = gguf.quantize(array, _type_of(spec, kind))
                    file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
                    written += data.nbytes
                    on_progress(written, total)
            file.write(bytes(-file.tell() % _ALIGNMENT))


def _metadata(checkpoint: Checkpoint, kind: _TensorType) -> dict[str, Any]:
    if checkpoint.tokenizer_model is None:
        raise CheckpointError(
            "the checkpoint has no tokenizer, and GGUF needs its vocabulary; copy the "
            "model's tokenizer.model or tokenizer.json into its folder"
        )
    config = checkpoint.config
    ids = token_ids(checkpoint)
    metadata = config_to_gguf(config)
    metadata |= {
        "general.type": "model",
        "general.name": str(checkpoint.provenance.get("name", "gemma")),
        "general.license": str(checkpoint.provenance.get("license", "gemma")),
        "general.license.link": "https://ai.google.dev/gemma/terms",
        "general.file_type": int(kind.file),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    made_from = checkpoint.provenance.get("repository") or checkpoint.provenance.get("base_model")
    if made_from:
        metadata |= {
            "general.base_model.count": 1,
            "general.base_model.0.repo_url": f"https://huggingface.co/{made_from}",
        }
    metadata |= tokenizer_metadata(checkpoint.tokenizer_model, config.vocabulary_size)
    if template := chat_template(checkpoint):
        metadata["tokenizer.chat_template"] = template
    metadata |= stop_metadata(ids.stop, metadata["tokenizer.ggml.eos_token_id"])
    for name, content in checkpoint.notices.items():
        metadata[f"gemma_keras.notice.{name}"] = content.decode(errors="replace")
    return metadata


def _write_header(
    path: Path, metadata: Mapping[str, Any], specs: list[WeightSpec], kind: _TensorType
) -> None:
    """Everything but the tensors; llama.cpp wants counts and ids as uint32."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":  # the writer has put it first
            continue
        is_count = isinstance(value, int) and not isinstance(value, bool)
        value_type = gguf.GGUFValueType.UINT32 if is_count else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, value_type)
    for spec in specs:
        tensor_type = _type_of(spec, kind)
        writer.add_tensor_info(
            spec.gguf,
            spec.file_shape,
            np.dtype(np.float32),
            _num_bytes(spec, kind),
            raw_dtype=tensor_type,
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _type_of(spec: WeightSpec, kind: _TensorType) -> gguf.GGMLQuantizationType:
    return Type.F32 if spec.kind == "norm" else kind.ggml


def _largest(spec: WeightSpec, kind: _TensorType) -> float:
    return _FLOAT32_MAX if spec.kind == "norm" else kind.largest


def _num_bytes(spec: WeightSpec, kind: _TensorType) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[_type_of(spec, kind)]
    return int(np.prod(spec.shape, dtype=np.int64)) // block * block_bytes


def _check_blocks(spec: WeightSpec, kind: _TensorType, tensor_type: str) -> None:
    block, _ = gguf.GGML_QUANT_SIZES[_type_of(spec, kind)]
    if spec.file_shape[-1] % block:
        raise ConfigError(
            f"{spec.name} has rows of {spec.file_shape[-1]}, not a multiple of "
            f"{tensor_type}'s block size {block}; choose another type"
        )
