"""Reading a Hugging Face folder: `config.json`, safetensors in one file or shards, a tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - with it numpy knows bfloat16
import numpy as np
import safetensors

from gemma_keras.checkpoints.source import Checkpoint, WeightSource
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import CheckpointError

_MAX_JSON = 64 << 20


def read_safetensors_folder(folder: Path) -> Checkpoint:
    """Open a folder as `transformers` writes it.

    Raises:
        CheckpointError: a file is missing, cut short, or points out of the folder.
        ConfigError: `config.json` does not describe a Gemma.
    """
    raw_config = read_json(folder / "config.json")
    config = GemmaConfig.from_hf(raw_config)
    shards = _shards(folder)
    owner: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        with opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                owner[name] = shard
                shapes[name] = tuple(file.get_slice(name).get_shape())
    # Multimodal Gemma 3 keeps the text tower under a prefix, beside a vision tower; a model saved
    # without its head, as EmbeddingGemma is, has none.
    prefix = next(
        (
            p
            for p in ("language_model.model.", "model.language_model.", "model.")
            if any(n.startswith(p) for n in shapes)
        ),
        "",
    )
    names = {("model." + n.removeprefix(prefix) if n.startswith(prefix) else n): n for n in shapes}
    if "lm_head.weight" not in names and "language_model.lm_head.weight" in names:
        names["lm_head.weight"] = names.pop("language_model.lm_head.weight")

    def read(name: str) -> np.ndarray:
        with opened(owner[names[name]]) as file:
            return np.asarray(file.get_tensor(names[name]), dtype=np.float32)

    def read_rows(name: str, first: int, last: int) -> np.ndarray:
        with opened(owner[names[name]]) as file:
            return np.asarray(file.get_slice(names[name])[first:last], dtype=np.float32)

    def ignore(name: str) -> bool:
        vision = ("vision_tower", "multi_modal_projector", "model.vision", "model.multi_modal")
        return name.startswith(vision) or (config.tied_head and name == "lm_head.weight")

    return Checkpoint(
        config=config,
        weights=WeightSource(
            config,
            "hf",
            {n: shapes[f] for n, f in names.items()},
            read,
            ignore,
            read_rows=read_rows,
        ),
        tokenizer_model=_tokenizer(folder),
        instruction_tuned=_has_turn_template(folder),
        provenance={
            "format": "safetensors",
            "file": folder.name,
            "name": folder.name,
            "license": "gemma",
        },
    )


@contextlib.contextmanager
def opened(shard: Path) -> Iterator[Any]:
    """A shard, only while it is read: what is mapped counts as the process's memory.

    Raises:
        CheckpointError: it cannot be read, or not any more.
    """
    try:
        with safetensors.safe_open(shard, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard} cannot be read as safetensors: {error}") from error


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise CheckpointError(
                f"{folder} has neither model.safetensors nor model.safetensors.index.json"
            )
        return [single]
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise CheckpointError(f"{index} names a file outside its folder: {name!r}")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder} lacks the shard {name}")
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or larger than one can be, or holds something else.
    """
    data = read_json_value(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return data


def read_json_value(path: Path) -> Any:
    """As `read_json`, whatever the value is."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is larger than a JSON file of a checkpoint can be")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def _tokenizer(folder: Path) -> bytes | None:
    path = folder / "tokenizer.model"
    return path.read_bytes() if path.exists() else None


def _has_turn_template(folder: Path) -> bool:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if path.exists() and path.stat().st_size <= _MAX_JSON:
            text = path.read_text(encoding="utf-8", errors="replace")
            if "<start_of_turn>" in text and (name.endswith("jinja") or '"chat_template"' in text):
                return True
    return False
