"""Writes an adapter alone: as PEFT's folder, or as llama.cpp's file."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_demo.safetensors_header import Tensor, encode_header, header_of
from gemma_keras.checkpoints.adapters.base import PEFT_CONFIG
from gemma_keras.checkpoints.adapters.peft import WEIGHTS_FILE
from gemma_keras.checkpoints.adapters.read import BASE_KEY
from gemma_keras.checkpoints.hf.files import json_text
from gemma_keras.checkpoints.hf.writer import DTYPES
from gemma_keras.checkpoints.low_rank import Adapter, Pair
from gemma_keras.checkpoints.names import WeightSpec, weight_specs
from gemma_keras.checkpoints.source import check_range
from gemma_keras.checkpoints.unfinished import unfinished
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import CheckpointError

_SMALL_FILES = {PEFT_CONFIG, WEIGHTS_FILE, "README.md", "adapter_model.bin"}


class Base(NamedTuple):
    """What an adapter says of its base.

    Attributes:
        provenance: as of a `Checkpoint`.
        norms: the mean of each norm's scale.
    """

    provenance: Mapping[str, Any]
    norms: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class PeftFiles:
    """The files of an adapter's folder, checked and not written yet.

    Attributes:
        settings: the text of `adapter_config.json`.
        header: of the safetensors file.
        arrays: float32, which follow it.
        dtype: that they are stored in.
    """

    settings: str
    header: bytes
    arrays: tuple[np.ndarray, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """About how many bytes they take."""
        width = DTYPES[self.dtype].num_bytes
        return len(self.header) + sum(array.size * width for array in self.arrays)

    def write(self, folder: Path) -> None:
        """Write them into an empty folder.

        Raises:
            OSError: as the disk says.
        """
        (folder / PEFT_CONFIG).write_text(self.settings, encoding="utf-8")
        kind = DTYPES[self.dtype]
        with (folder / WEIGHTS_FILE).open("wb") as file:
            file.write(self.header)
            for array in self.arrays:
                file.write(kind.round(np.ascontiguousarray(array)).tobytes())


def peft_files(
    adapter: Adapter, config: GemmaConfig, base: Base, dtype: str = "float32"
) -> PeftFiles:
    """The files that `peft.PeftModel.from_pretrained` loads.

    Args:
        adapter: with the matrices.
        config: of its base.
        base: what is said of it.
        dtype: `float32`, `float16` or `bfloat16`, of the matrices.

    Raises:
        CheckpointError: a number is not finite or beyond the dtype.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    specs = weight_specs(config)
    kind = DTYPES[dtype]
    arrays = dict(_arrays(adapter, specs))
    for name, array in arrays.items():
        _check(name, array, kind.largest, dtype)
    tensors = [
        Tensor(name, kind.name, array.shape, array.size * kind.num_bytes)
        for name, array in arrays.items()
    ]
    metadata = {"format": "pt", BASE_KEY: json.dumps(dict(base.norms), separators=(",", ":"))}
    settings = json_text(PEFT_CONFIG, _peft_config(adapter, specs, base.provenance))
    header = encode_header(header_of(tensors, metadata))
    return PeftFiles(settings, header, tuple(arrays.values()), dtype)


def write_peft_adapter(
    folder: str | os.PathLike[str],
    adapter: Adapter,
    config: GemmaConfig,
    base: Base,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        folder: to write, which appears when it is complete.
        adapter: with the matrices.
        config: of its base.
        base: what is said of it.
        dtype: as for `peft_files`.
        overwrite: whether a folder that holds an adapter alone may be replaced.

    Raises:
        CheckpointError: the folder exists or cannot be written, or as `peft_files` raises.
    """
    files = peft_files(adapter, config, base, dtype)
    with unfinished(
        Path(folder),
        "folder",
        files.num_bytes,
        overwrite=overwrite,
        is_replaceable=_is_adapter,
    ) as partial:
        files.write(partial)


def _arrays(adapter: Adapter, specs: Mapping[str, WeightSpec]) -> Iterator[tuple[str, np.ndarray]]:
    for name, spec in specs.items():
        if (pair := adapter.pairs.get(name)) is None:
            continue
        module = f"base_model.model.{_module(spec)}"
        yield f"{module}.lora_A.weight", pair.a.T
        yield f"{module}.lora_B.weight", pair.b.T


def _module(spec: WeightSpec) -> str:
    return spec.hf.removesuffix(".weight")


def _check(name: str, array: np.ndarray, largest: float, dtype: str) -> None:
    if not np.isfinite(array).all():
        raise CheckpointError(f"the adapter's {name} has values that are not finite")
    check_range(array, largest, name, dtype)


def _peft_config(
    adapter: Adapter, specs: Mapping[str, WeightSpec], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """What PEFT reads; the rank and alpha of most matrices, and those of the others by name."""
    modules = {_module(specs[name]): pair for name, pair in adapter.pairs.items()}
    ranks = {module: pair.a.shape[1] for module, pair in modules.items()}
    alphas = {module: _alpha(pair, adapter.rslora) for module, pair in modules.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    base = provenance.get("repository") or provenance.get("base_model") or provenance.get("name")
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "target_modules": _targets(modules, specs),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": adapter.rslora,
    }


def _alpha(pair: Pair, rslora: bool) -> int | float:
    """As it is given; a whole number is written as one, as PEFT does."""
    alpha = pair.alpha / math.sqrt(pair.a.shape[1]) if rslora else pair.alpha
    near = round(alpha)
    return near if math.isclose(alpha, near, rel_tol=1e-9) else alpha


def _commonest(values: Mapping[str, Any]) -> Any:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _targets(modules: Mapping[str, Pair], specs: Mapping[str, WeightSpec]) -> list[str]:
    """The ends of modules' names where they say which modules, else whole names."""
    matrices = [_module(spec) for spec in specs.values() if spec.kind == "matrix"]
    ends = {module.rsplit(".", 1)[-1] for module in modules}
    named = {module for module in matrices if module.rsplit(".", 1)[-1] in ends}
    return sorted(ends if named == set(modules) else modules)


def _is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and nothing else."""
    return (
        path.is_dir()
        and not path.is_symlink()
        and (path / PEFT_CONFIG).is_file()
        and all(entry.is_file() and entry.name in _SMALL_FILES for entry in path.iterdir())
    )


def write_gguf_adapter(
    path: str | os.PathLike[str], adapter: Adapter, config: GemmaConfig, overwrite: bool = False
) -> None:
    """Write a GGUF file that llama.cpp loads beside its base (`--lora`), in float32.

    The file has one alpha, divided by each matrix's own rank. Where scales differ, the matrices are
    scaled so that it fits all.

    Raises:
        CheckpointError: the file exists or cannot be written, or a number is not finite.
    """
    import gguf

    from gemma_keras.checkpoints.gguf.config import architecture_of

    specs = weight_specs(config)
    # llama.cpp reads an alpha of 0 as a scale of 1
    alpha = _commonest({name: pair.alpha for name, pair in adapter.pairs.items()}) or 1.0
    arrays = {}
    for name, pair in adapter.pairs.items():
        scale = np.float32(pair.alpha / alpha)
        arrays[f"{specs[name].gguf}.lora_a"] = np.ascontiguousarray(pair.a.T)
        arrays[f"{specs[name].gguf}.lora_b"] = np.ascontiguousarray(pair.b.T * scale)
    for name, array in arrays.items():
        _check(name, array, DTYPES["float32"].largest, "float32")
    with unfinished(
        Path(path),
        "file",
        sum(array.nbytes for array in arrays.values()),
        overwrite=overwrite,
        is_replaceable=Path.is_file,
    ) as partial:
        writer = gguf.GGUFWriter(partial, architecture_of(config))
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, array in arrays.items():
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        with partial.open("ab") as file:  # not by the package, whose errors do not say why
            for array in arrays.values():
                file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
                file.write(array.data)
            file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
