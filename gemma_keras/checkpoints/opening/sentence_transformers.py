"""Reads a text embedder in the layout of sentence-transformers, such as
`google/embeddinggemma-300m`.

`modules.json` names the steps from text to vector, each with a folder: the transformer, a pooling,
any number of dense layers, a normalization. Only the modules of EmbeddingGemma are supported: the
mean over a text's tokens, and dense layers without bias or activation. Anything else raises an
error.

Format: https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_keras.checkpoints.adapters.find import find_adapter
from gemma_keras.checkpoints.hf.reader import opened, read_safetensors_folder
from gemma_keras.checkpoints.hub import hf_name, local_or_downloaded
from gemma_keras.checkpoints.json_files import read_json, read_json_value
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.errors import CheckpointError, ConfigError

MODULES_FILE = "modules.json"
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_ORDER = ("Transformer", "Pooling", "Dense*", "Normalize")
_IDENTITY = "torch.nn.modules.linear.Identity"
_WEIGHT = "linear.weight"
# Of `Dense`: key to the values that say what EmbeddingGemma's layers do; the last two are newer.
_DENSE_FIXED: dict[str, tuple[Any, ...]] = {
    "bias": (False,),
    "activation_function": (_IDENTITY,),
    "use_residual": (False, None),
    "module_input_name": ("sentence_embedding", None),
    "module_output_name": ("sentence_embedding", None),
}


@dataclasses.dataclass(frozen=True)
class EmbedderCheckpoint:
    """A text embedder on disk.

    Attributes:
        transformer: configuration, weights and tokenizer of what is below the pooling.
        projections: the matrices after it, first to last, each float32 `(in, out)`.
        normalize: whether a vector is divided by its length in the end.
        max_tokens: the longest text, in tokens, with those of its beginning and end.
        prompts: name of a task to the prefix of its texts.
        default_prompt_name: of the prompt that is used by default, or `None`.
    """

    transformer: Checkpoint
    projections: tuple[np.ndarray, ...]
    normalize: bool
    max_tokens: int
    prompts: Mapping[str, str]
    default_prompt_name: str | None


def is_embedder(source: str | os.PathLike[str]) -> bool:
    """Whether it is a folder in this layout, or the name of one; it is then downloaded.

    Raises:
        CheckpointError: it cannot be downloaded.
    """
    if not Path(source).exists() and hf_name(source) is None:
        return False
    return (local_or_downloaded(source, "") / MODULES_FILE).is_file()


def open_embedder(source: str | os.PathLike[str]) -> EmbedderCheckpoint:
    """Open a text embedder; the transformer's weights are read later.

    Args:
        source: a folder with `modules.json`, or the name of one on the Hugging Face Hub.

    Raises:
        CheckpointError: a file is missing, damaged, larger than declared, or outside the folder; or
            EmbeddingGemma does not have such a module.
        ConfigError: the transformer is not a Gemma.
    """
    folder = local_or_downloaded(
        source, f"a folder with {MODULES_FILE}, or the name of a model on the Hugging Face Hub"
    )
    steps = _steps(folder)
    kinds = [kind for kind, _ in steps]
    _check_pooling(steps[1][1])
    transformer = _transformer(steps[0][1])
    width = transformer.config.hidden_dim
    projections = []
    for kind, path in steps:
        if kind == "Dense":
            projections.append(_projection(path, width))
            width = projections[-1].shape[1]
    prompts, default_prompt_name = _prompts(folder / "config_sentence_transformers.json")
    return EmbedderCheckpoint(
        transformer=transformer,
        projections=tuple(projections),
        normalize="Normalize" in kinds,
        max_tokens=_max_tokens(
            steps[0][1] / "sentence_bert_config.json", transformer.config.context_length
        ),
        prompts=prompts,
        default_prompt_name=default_prompt_name,
    )


def _transformer(folder: Path) -> Checkpoint:
    """Opens the folder's model, with the adapter in the same folder merged into it."""
    adapter = find_adapter(folder)
    if adapter is None:
        return read_safetensors_folder(folder)
    return adapter.merged(None, lambda base: read_safetensors_folder(Path(base)))


def _steps(folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of each step, in order."""
    path = folder / MODULES_FILE
    modules = read_json_value(path)
    if not isinstance(modules, list) or not all(isinstance(m, Mapping) for m in modules):
        raise CheckpointError(f"{path} must hold a JSON list of objects")
    steps = []
    for module in modules:
        # Classes move between packages from version to version; their names stay.
        kind = str(module.get("type")).rsplit(".", 1)[-1]
        steps.append((kind, _module_folder(path, module.get("path"))))
    _check_order(path, [kind for kind, _ in steps])
    return steps


def _module_folder(modules_file: Path, name: Any) -> Path:
    """The folder of a step: that of `modules.json`, for an empty name, or one right below it."""
    if name == "":
        return modules_file.parent
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise CheckpointError(f"{modules_file} names a folder outside its own: {name!r}")
    return modules_file.parent / name


def _check_order(path: Path, kinds: Sequence[str]) -> None:
    rest = list(kinds)
    known = rest[:2] == ["Transformer", "Pooling"]
    del rest[:2]
    while rest[:1] == ["Dense"]:
        del rest[0]
    if not known or rest not in ([], ["Normalize"]):
        raise CheckpointError(
            f"{path} describes {', '.join(kinds) or 'nothing'}; supported are {', '.join(_ORDER)}"
        )


def _check_pooling(folder: Path) -> None:
    """Raise an error unless the pooling is the mean over all tokens including the prompt, in either
    form of the file."""
    path = folder / "config.json"
    data = read_json(path)
    chosen = [
        key.removeprefix("pooling_mode_")
        for key, value in data.items()
        if key.startswith("pooling_mode_") and value
    ] or [data.get("pooling_mode")]
    if chosen not in (["mean_tokens"], ["mean"]):
        raise CheckpointError(
            f"{path} pools by {', '.join(map(str, chosen))}; only the mean over a text's "
            "tokens is supported"
        )
    if data.get("include_prompt", True) is not True:
        raise CheckpointError(
            f"{path} excludes the prompt from the mean (include_prompt), but EmbeddingGemma "
            "includes it"
        )


def _projection(folder: Path, width: int) -> np.ndarray:
    """A dense layer's matrix, `(in, out)`.

    Args:
        folder: of the layer.
        width: of what goes into it.
    """
    path, weights = folder / "config.json", folder / "model.safetensors"
    data = read_json(path)
    for key, allowed in _DENSE_FIXED.items():
        if data.get(key) not in allowed:
            raise CheckpointError(
                f"{path} has {key}={data.get(key)!r}; for EmbeddingGemma it must be "
                f"{allowed[0]!r} there"
            )
    found, out_features = data.get("in_features"), data.get("out_features")
    if found != width or not isinstance(out_features, int):
        raise CheckpointError(
            f"{path} takes {found!r} features and gives {out_features!r}, but its input has {width}"
        )
    if not weights.exists():
        raise CheckpointError(f"{weights} does not exist; save the module's weights as safetensors")
    with opened(weights) as file:
        if list(file.keys()) != [_WEIGHT]:
            raise CheckpointError(
                f"{weights} holds {', '.join(file.keys()) or 'nothing'}; a dense layer "
                f"without bias has only {_WEIGHT}"
            )
        shape = file.get_slice(_WEIGHT).get_shape()
        if shape != [out_features, width]:
            raise CheckpointError(
                f"{weights} holds {_WEIGHT} of shape {shape}; {path} asks for "
                f"{[out_features, width]}"
            )
        matrix = np.asarray(file.get_tensor(_WEIGHT), dtype=np.float32).T
    if not np.isfinite(matrix).all():
        raise CheckpointError(f"{weights} holds values that are not finite")
    return matrix


def _max_tokens(path: Path, context_length: int) -> int:
    data = read_json(path) if path.exists() else {}
    if data.get("do_lower_case"):
        raise CheckpointError(f"{path} converts texts to lower case, but EmbeddingGemma does not")
    found = data.get("max_seq_length")
    if found is None:
        return context_length
    if not isinstance(found, int) or isinstance(found, bool) or found < 3:
        raise ConfigError(
            f"{path} has max_seq_length={found!r}; it must be a number of tokens, 3 or more"
        )
    return min(found, context_length)


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    data = read_json(path) if path.exists() else {}
    prompts, default = data.get("prompts") or {}, data.get("default_prompt_name")
    if not isinstance(prompts, Mapping) or not all(isinstance(p, str) for p in prompts.values()):
        raise CheckpointError(
            f"{path} must have an object of names and texts as prompts, found {prompts!r}"
        )
    if default is not None and default not in prompts:
        raise CheckpointError(f"{path} has no prompt with its default_prompt_name {default!r}")
    return dict(prompts), default
