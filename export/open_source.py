"""Opens what is to be exported: a checkpoint, or a live model, with adapters merged or apart."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from edge_demo.bundle.manifest import BundleError, plain_name
from export.errors import ExportRequestError
from export.options import MERGE
from export.start_keras import start_keras
from gemma_keras.checkpoints.adapters.read import norm_means
from gemma_keras.checkpoints.adapters.write import Base, PeftFiles, peft_files
from gemma_keras.checkpoints.hub import opens_with_keras
from gemma_keras.checkpoints.low_rank import Adapter
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.open import open_base_and_adapter, open_checkpoint

_Path = str | os.PathLike[str]


class Opened(NamedTuple):
    """What is to be exported.

    Attributes:
        checkpoint: the model of the bundle.
        adapters: the files of those that are written next to it, by name.
    """

    checkpoint: Checkpoint
    adapters: Mapping[str, PeftFiles]


@contextlib.contextmanager
def opened_source(source: Any, base: _Path | None, adapters: str) -> Iterator[Opened]:
    """Open a source for as long as its weights are read.

    Args:
        source: as for `export.export_onnx`.
        base: the model that an adapter is for.
        adapters: one of `export.options.ADAPTERS`.

    Raises:
        ExportRequestError: a base is given for a live model; or adapters are to stay apart, and
            there are none, or these cannot.
        ModelError: the source cannot be used.
    """
    is_path = isinstance(source, (str, os.PathLike))
    if is_path:
        if opens_with_keras(source) or (base is not None and opens_with_keras(base)):
            start_keras()
    elif base is not None:
        raise ExportRequestError(
            "base is only valid with an adapter's folder or file, not with a model"
        )
    if adapters == MERGE:
        yield Opened(open_checkpoint(source, base=base) if is_path else _as_checkpoint(source), {})
    elif is_path:
        checkpoint, apart = open_base_and_adapter(source, base=base)
        if not apart:
            raise ExportRequestError(
                f"{source} is a model without an adapter to keep apart; remove --adapters beside"
            )
        yield Opened(checkpoint, _files(checkpoint, apart))
    else:
        apart = _adapters_of(source)
        with source.without_adapter():
            checkpoint = source.as_checkpoint()
            yield Opened(checkpoint, _files(checkpoint, apart))


def _as_checkpoint(model: Any) -> Checkpoint:
    if hasattr(model, "as_checkpoint"):
        return model.as_checkpoint()
    from gemma_keras.keras_hub.convert import read_keras_hub

    return read_keras_hub(model)


def _adapters_of(model: Any) -> Mapping[str, Adapter]:
    if not (hasattr(model, "adapters_in_memory") and hasattr(model, "as_checkpoint")):
        raise ExportRequestError(
            "LoRA of a KerasHub model can only be merged; remove adapters='beside'"
        )
    try:
        adapters = model.adapters_in_memory()
    except ValueError as error:
        raise ExportRequestError(str(error)) from error
    if not adapters:
        raise ExportRequestError(
            "the model has no adapter to keep apart; call enable_lora or "
            "load_adapter first, or remove adapters='beside'"
        )
    return adapters


def _files(base: Checkpoint, adapters: Mapping[str, Adapter]) -> dict[str, PeftFiles]:
    for name in adapters:
        try:
            plain_name(name)
        except BundleError:
            raise ExportRequestError(
                f"the adapter {name!r} gets a folder of its name, and that is not a valid name "
                "for a folder; save it and load it by another name"
            ) from None
    said = Base(base.provenance, norm_means(base.config, base.weights))
    return {name: peft_files(one, base.config, said) for name, one in adapters.items()}
