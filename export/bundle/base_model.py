"""Finds the model on the Hugging Face Hub that a bundle was made from, if its source names it.

The architecture alone proves nothing: CodeGemma 2B has Gemma 2B's, and every fine-tune has that of
its base. Only the names in the provenance count; without a name there is no base model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gemma_keras.checkpoints.hf.config import config_from_hf
from gemma_keras.checkpoints.hub import hf_name
from gemma_keras.config import GemmaConfig
from gemma_keras.sizes import Release, Size, releases


class BaseModel(NamedTuple):
    """The model that a bundle was made from.

    Attributes:
        repository: on the Hugging Face Hub.
        same_weights: whether its weights were converted unchanged, as far as is known; otherwise
            they were, or may have been, trained further.
    """

    repository: str
    same_weights: bool


def base_model(provenance: Mapping[str, Any], config: GemmaConfig, tuned: bool) -> BaseModel | None:
    """Returns the base model of a checkpoint; `None` if its source does not name it.

    Args:
        provenance: of the checkpoint, see `gemma_keras.checkpoints.source.Checkpoint`.
        config: its architecture.
        tuned: whether it was tuned to Gemma's turn template.
    """
    untouched = not provenance.get("through")  # a Keras model may have been trained
    if name := _name(provenance.get("repository")):
        return BaseModel(name, untouched)
    if name := _name(provenance.get("base_model")):
        return BaseModel(name, False)
    for _, release in releases():
        if release.preset is not None and provenance.get("preset") == release.preset:
            return BaseModel(release.repository, untouched)
    for size, release in releases():
        if _is_called(provenance, release) and _has_size(config, tuned, size, release):
            return BaseModel(release.repository, False)  # a tune may have kept the name
    return None


def _name(value: Any) -> str | None:
    """A name of the Hub's form, which is also safe to write into YAML."""
    return hf_name(value) if isinstance(value, str) else None


def _is_called(provenance: Mapping[str, Any], release: Release) -> bool:
    """Whether the source's folder, file or title is a release's name."""
    own = _slug(release.repository.split("/")[1])
    return own in (_slug(provenance.get("name")), _slug(provenance.get("file")))


def _slug(name: Any) -> str:
    """`Gemma 3 1b It` and `gemma-3-1b-it` are one name."""
    return re.sub(r"[\s_-]+", "-", str(name)).strip("-").lower()


def _has_size(config: GemmaConfig, tuned: bool, size: Size, release: Release) -> bool:
    """Whether it is a release's architecture; tables may be longer, a context shorter."""
    if tuned != release.tuned:
        return False
    published = config_from_hf(size.hf)
    return (config.hidden_dim, config.layers) == (published.hidden_dim, published.layers)
