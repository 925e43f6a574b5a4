"""Reading a Hugging Face folder: `config.json`, safetensors in one file or shards, a tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - with it numpy knows bfloat16
import numpy as np
import safetensors

from gemma_keras.checkpoints.source import Checkpoint, WeightSource
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import CheckpointError
from gemma_keras.sizes import releases

_MAX_JSON = 64 << 20
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # what torch.save writes is called


def read_safetensors_folder(folder: Path) -> Checkpoint:
    """Open a folder as `transformers` writes it.

    Raises:
        CheckpointError: a file is missing, cut short, points out of the folder or is a pickle.
        ConfigError: `config.json` does not describe a Gemma.
    """
    raw_config = read_json(folder / "config.json")
    config = GemmaConfig.from_hf(raw_config)
    stored = _tensors(folder)
    names = _plain_names(stored)

    def read(name: str) -> np.ndarray:
        with opened(stored[names[name]].shard) as file:
            return np.asarray(file.get_tensor(names[name]), dtype=np.float32)

    def read_rows(name: str, first: int, last: int) -> np.ndarray:
        with opened(stored[names[name]].shard) as file:
            return np.asarray(file.get_slice(names[name])[first:last], dtype=np.float32)

    def ignore(name: str) -> bool:
        vision = ("vision_tower", "multi_modal_projector", "model.vision", "model.multi_modal")
        return name.startswith(vision) or (config.tied_head and name == "lm_head.weight")

    _check_types(stored[own_name] for name, own_name in names.items() if not ignore(name))
    return Checkpoint(
        config=config,
        weights=WeightSource(
            config,
            "hf",
            {name: stored[own_name].shape for name, own_name in names.items()},
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
        }
        | _base_model(raw_config),
    )


def _base_model(raw_config: dict[str, Any]) -> dict[str, Any]:
    """What transformers loaded before it wrote the folder, if that is a published model: any other
    name may be a path."""
    loaded = raw_config.get("_name_or_path")
    published = {release.repository for _, release in releases()}
    known = isinstance(loaded, str) and loaded in published
    return {"base_model": loaded} if known else {}


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor's name in its file, the file, its shape, and its type in safetensors' words."""

    name: str
    shard: Path
    shape: tuple[int, ...]
    dtype: str


def _tensors(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the folder, by its name in the file.

    Raises:
        CheckpointError: a shard cannot be read, lacks what the index says it holds, or holds what
            another holds too.
    """
    stored: dict[str, _Stored] = {}
    for shard, promised in _shards(folder).items():
        with opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if name in stored:
                    raise CheckpointError(
                        f"{folder} holds the tensor {name} twice, in {stored[name].shard.name} and "
                        f"in {shard.name}; keep the shards of one checkpoint only"
                    )
                tensor = file.get_slice(name)
                stored[name] = _Stored(name, shard, tuple(tensor.get_shape()), tensor.get_dtype())
        for name in promised:
            if name not in stored or stored[name].shard != shard:
                raise CheckpointError(
                    f"{folder / _INDEX} says that {shard.name} holds the tensor {name}, and it "
                    "does not; take index and shards of one checkpoint"
                )
    return stored


def _check_types(stored: Iterable[_Stored]) -> None:
    """Refuse integers and 8-bit floats: their scales lie elsewhere, if at all."""
    for tensor in stored:
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"the tensor {tensor.name} is of type {tensor.dtype}; weights are read as "
                f"{', '.join(_FLOATS)}, so have the checkpoint converted to one of these"
            )


def _plain_names(stored: Collection[str]) -> dict[str, str]:
    """Names as a model of text alone has them, each to the name in the file.

    Raises:
        CheckpointError: two names in the file come to the same.
    """
    # Multimodal Gemma 3 keeps the text tower under a prefix, beside a vision tower; a model saved
    # without its head, as EmbeddingGemma is, has none.
    prefix = next(
        (
            p
            for p in ("language_model.model.", "model.language_model.", "model.")
            if any(n.startswith(p) for n in stored)
        ),
        "",
    )
    names = {("model." + n.removeprefix(prefix) if n.startswith(prefix) else n): n for n in stored}
    if "lm_head.weight" not in names and "language_model.lm_head.weight" in names:
        names["lm_head.weight"] = names.pop("language_model.lm_head.weight")
    if len(names) != len(stored):
        twice = sorted(set(stored) - set(names.values()))
        raise CheckpointError(
            f"the checkpoint holds {twice[0]} both with and without the prefix {prefix}; keep one"
        )
    return names


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


def _shards(folder: Path) -> dict[Path, list[str]]:
    """The files of weights, each with the names of the tensors that an index promises of it."""
    index = folder / _INDEX
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise CheckpointError(
                f"{folder} has neither model.safetensors nor {_INDEX}{_told_of_pickles(folder)}"
            )
        return {single: []}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} must have a weight_map, an object from tensors to shards, that is not empty"
        )
    shards: dict[Path, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise CheckpointError(f"{index} names a file outside its folder: {name!r}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the shard {name}")
        shards.setdefault(folder / name, []).append(tensor)
    return dict(sorted(shards.items()))


def _told_of_pickles(folder: Path) -> str:
    """What to say of weights that are there as a pickle."""
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLES)
    if not pickles:
        return ""
    return (
        f", and {pickles[0]} is a pickle, which is not read because it can run code of its own; "
        "have its author write it as safetensors"
    )


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
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


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
