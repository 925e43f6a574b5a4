"""Reads a Hugging Face folder: `config.json`, safetensors in one file or shards, a tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - with it numpy knows bfloat16
import numpy as np
import safetensors

from gemma_keras.checkpoints.chat_templates import read_folder_template, turns_of
from gemma_keras.checkpoints.first_bytes import explain_pointer
from gemma_keras.checkpoints.hf.config import config_from_hf
from gemma_keras.checkpoints.hf.folder_tokenizer import read_folder_tokenizer
from gemma_keras.checkpoints.hf.peft_names import bases_name, is_adapters_tensor
from gemma_keras.checkpoints.hf.quantized_folder import told_if_quantized
from gemma_keras.checkpoints.json_files import read_json
from gemma_keras.checkpoints.source import Checkpoint, WeightSource
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import CheckpointError
from gemma_keras.sizes import releases

_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CHUNK_BYTES = 16 << 20  # size of a chunk when two tables are compared
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # suffixes of files that torch.save writes


def read_safetensors_folder(folder: Path, *, adapter_is_read: bool = False) -> Checkpoint:
    """Open a folder as `transformers` writes it.

    Args:
        folder: with `config.json`.
        adapter_is_read: whether the caller reads an adapter's tensors that a saved `PeftModel` has
            among those of its base.

    Raises:
        CheckpointError: a file is missing, truncated, outside the folder, or a pickle.
        ConfigError: `config.json` does not describe a Gemma.
    """
    raw_config = read_json(folder / "config.json")
    config = config_from_hf(raw_config)
    stored = _without_adapter(folder, stored_tensors(folder), adapter_is_read)
    names = _plain_names(stored)
    by_plain_name = {name: stored[own_name] for name, own_name in names.items()}
    config = _with_its_head(config, by_plain_name)

    def ignore(name: str) -> bool:
        vision = ("vision_tower", "multi_modal_projector", "model.vision", "model.multi_modal")
        return name.startswith(vision) or (config.tied_head and name == "lm_head.weight")

    with told_if_quantized(folder, raw_config, stored):
        check_types(tensor for name, tensor in by_plain_name.items() if not ignore(name))
        weights = WeightSource(
            config,
            "hf",
            {name: tensor.shape for name, tensor in by_plain_name.items()},
            lambda name: read_tensor(by_plain_name[name]),
            ignore,
            read_rows=lambda name, first, last: read_rows(by_plain_name[name], first, last),
        )
    tokenizer = read_folder_tokenizer(folder, raw_config, config.vocabulary_size)
    template = read_folder_template(folder, tokenizer.config)
    turns, tuned, remarks = turns_of(template, tokenizer.model)
    return Checkpoint(
        config=config,
        weights=weights,
        tokenizer_model=tokenizer.model,
        instruction_tuned=tuned,
        provenance={
            "format": "safetensors",
            "file": folder.name,
            "name": folder.name,
            "license": "gemma",
        }
        | _base_model(raw_config),
        stop=tokenizer.stop,
        turns=turns,
        chat_template=template,
        remarks=remarks,
    )


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model of its own."""
    return (folder / "config.json").exists() and any(folder.glob("model*.safetensors"))


def text_side(folder: Path, base: Checkpoint) -> dict[str, Any]:
    """Returns the fields of a `Checkpoint` that the tokenizer files of an adapter's folder
    override."""
    tokenizer = read_folder_tokenizer(folder, {}, base.config.vocabulary_size)
    template = read_folder_template(folder, tokenizer.config)
    fields: dict[str, Any] = {}
    if tokenizer.model is not None:
        stop = tuple(dict.fromkeys((*tokenizer.stop, *base.stop)))
        fields |= {"tokenizer_model": tokenizer.model, "stop": stop}
    if template is not None:
        turns, tuned, remarks = turns_of(template, tokenizer.model or base.tokenizer_model)
        fields |= {"turns": turns, "instruction_tuned": tuned, "chat_template": template}
        fields |= {"remarks": (*base.remarks, *remarks)}
    return fields


def _base_model(raw_config: dict[str, Any]) -> dict[str, Any]:
    """Returns the model that transformers loaded before it wrote the folder, if that is a published
    model. Any other name may be a path."""
    loaded = raw_config.get("_name_or_path")
    published = {release.repository for _, release in releases()}
    known = isinstance(loaded, str) and loaded in published
    return {"base_model": loaded} if known else {}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor: its name, its file, its shape, and its safetensors dtype."""

    name: str
    shard: Path
    shape: tuple[int, ...]
    dtype: str


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """The tensor as float32."""
    with opened(tensor.shard) as file:
        return np.asarray(file.get_tensor(tensor.name), dtype=np.float32)


def read_rows(tensor: StoredTensor, first: int, last: int) -> np.ndarray:
    """Returns some of its rows as float32; reads no other rows."""
    with opened(tensor.shard) as file:
        return np.asarray(file.get_slice(tensor.name)[first:last], dtype=np.float32)


def stored_in(shard: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file, by its name there.

    Raises:
        CheckpointError: it cannot be read.
    """
    stored = {}
    with opened(shard) as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            tensor = file.get_slice(name)
            stored[name] = StoredTensor(name, shard, tuple(tensor.get_shape()), tensor.get_dtype())
    return stored


def metadata_of(shard: Path) -> dict[str, str]:
    """What the header of a file says beside its tensors.

    Raises:
        CheckpointError: it cannot be read.
    """
    with opened(shard) as file:
        return dict(file.metadata() or {})


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder, by its name in the file.

    Raises:
        CheckpointError: a shard cannot be read, lacks a tensor of the index, or duplicates a tensor
            of another shard.
    """
    stored: dict[str, StoredTensor] = {}
    for shard, promised in _shards(folder).items():
        for name, tensor in stored_in(shard).items():
            if name in stored:
                raise CheckpointError(
                    f"{folder} holds the tensor {name} twice, in {stored[name].shard.name} "
                    f"and in {shard.name}; keep only the shards of one checkpoint"
                )
            stored[name] = tensor
        for name in promised:
            if name not in stored or stored[name].shard != shard:
                raise CheckpointError(
                    f"{folder / _INDEX} says that {shard.name} holds the tensor {name}, but "
                    "it does not; use the index and the shards of one checkpoint"
                )
    return stored


def _without_adapter(
    folder: Path, stored: Mapping[str, StoredTensor], adapter_is_read: bool
) -> dict[str, StoredTensor]:
    """A saved `PeftModel`'s tensors by the names of its base, without those of the adapter."""
    base: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if is_adapters_tensor(name):
            if adapter_is_read:
                continue
            raise CheckpointError(
                f"{folder} holds the tensor {name} of an unmerged PeftModel, but no "
                "adapter_config.json with its scale. Put that file there, or merge the "
                "model with PEFT (merge_and_unload) and save it again"
            )
        base_name = bases_name(name)
        if base_name in base:
            raise CheckpointError(
                f"{folder} holds the tensor {base_name} twice, as {base[base_name].name} and as "
                f"{name}; keep one"
            )
        base[base_name] = tensor
    return base


def _with_its_head(config: GemmaConfig, stored: dict[str, StoredTensor]) -> GemmaConfig:
    """The configuration whose head is the file's, as transformers 5 ties what it loads.

    If the configuration ties head and embedding, the file may hold either, or both. If both differ,
    they are two tables, even if the configuration ties them.
    """
    table, head = (stored.get(name) for name in (_TABLE, _HEAD))
    if not config.tied_head or head is None:
        return config
    if table is None:
        stored[_TABLE] = head
        return config
    return config if _equal(table, head) else dataclasses.replace(config, tied_head=False)


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or len(one.shape) != 2:
        return False
    step = max(1, _CHUNK_BYTES // (4 * max(1, one.shape[1])))
    ends = [*range(0, one.shape[0], step), one.shape[0]]
    return all(
        np.array_equal(read_rows(one, *pair), read_rows(other, *pair))
        for pair in itertools.pairwise(ends)
    )


def check_types(stored: Iterable[StoredTensor]) -> None:
    """Raise an error for integers and 8-bit floats, whose scales are elsewhere or missing.

    Raises:
        CheckpointError: a tensor is not a float of 64, 32 or 16 bits.
    """
    for tensor in stored:
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"the tensor {tensor.name} is of type {tensor.dtype}; convert the "
                f"checkpoint to one of {', '.join(_FLOATS)}"
            )


def _plain_names(stored: Collection[str]) -> dict[str, str]:
    """Returns the names in a text-only model, each with the name in the file.

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
    """Opens a shard only while it is read, because mapped pages count as the process's memory.

    Raises:
        CheckpointError: the shard cannot be read.
    """
    try:
        with safetensors.safe_open(shard, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        what = explain_pointer(shard) or f"{shard} cannot be read as safetensors: {error}"
        raise CheckpointError(what) from error


def _shards(folder: Path) -> dict[Path, list[str]]:
    """The files of weights, each with the names of the tensors that an index promises of it."""
    index, single = folder / _INDEX, folder / "model.safetensors"
    if index.exists():
        return _indexed_shards(folder, index)
    if single.exists():
        return {single: []}
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if not shards:
        raise CheckpointError(
            f"{folder} has neither model.safetensors nor {_INDEX}{explain_pickles(folder)}"
        )
    _, _, last = shards[0].stem.rpartition("-of-")
    if not last.isdecimal() or len(last) > 5:
        raise CheckpointError(f"{folder} has {shards[0].name}, but no {_INDEX}")
    for number in range(1, int(last) + 1):
        name = f"model-{number:05}-of-{last}.safetensors"
        if folder / name not in shards:
            raise CheckpointError(f"{folder} lacks the shard {name}")
    return {shard: [] for shard in shards}


def _indexed_shards(folder: Path, index: Path) -> dict[Path, list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} must have a weight_map, a non-empty object that gives each tensor's shard"
        )
    shards: dict[Path, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise CheckpointError(f"{index} names a file outside its folder: {name!r}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the shard {name}")
        shards.setdefault(folder / name, []).append(tensor)
    return dict(sorted(shards.items()))


def explain_pickles(folder: Path) -> str:
    """Returns the message for weights in a pickle."""
    pickles = sorted(
        (p.name for p in folder.glob("*") if p.suffix in _PICKLES and p.name not in _NOT_WEIGHTS),
        key=lambda name: ("model" not in name, name),
    )
    if not pickles:
        return ""
    return (
        f"; {pickles[0]} is a pickle, which is not read because it can run arbitrary code. "
        "Load it with transformers and save it again as safetensors (save_pretrained)"
    )
