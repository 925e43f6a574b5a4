"""Makes Keras's `quantize` work on a whole task, layer by layer."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import keras

if TYPE_CHECKING:
    _Task = keras.Model
else:
    _Task = object

_OF_TABLES = ("int8", "int4")
Filters = str | Sequence[str] | Callable[[keras.layers.Layer], bool] | None


class Quantizes(_Task):
    """A task whose `quantize` quantizes only the model's layers that support it."""

    def quantize(self, mode=None, config=None, filters: Filters = None, **kwargs) -> None:
        """Like Keras's `Model.quantize`, also for a model that has not been run.

        Keras calls every layer below the model, and then an unused tokenizer raises an error
        because it is not built. The token embedding, a subclass of Keras's layer, is only quantized
        if filters choose it, or with `type_check=False`.

        Args:
            mode: `"int8"`, `"int4"`, `"float8"`, `"gptq"` or `"awq"`.
            config: of the quantization, such as `keras.quantizers.Int8QuantizationConfig`.
            filters: a regular expression of layer names, several, or a function of the layer.
            **kwargs: those of Keras's.

        Raises:
            ValueError: the mode is int8 and the model computes in float16, which Keras does not
                support.

        Warns:
            UserWarning: the token embedding is not quantized, and no filters say so; or the filters
                choose no layer.
        """
        with_embedding = not kwargs.get("type_check", True)
        of_tables = getattr(config, "mode", mode) in _OF_TABLES
        if filters is None and not with_embedding and of_tables:
            warnings.warn(
                "the token embedding is not quantized; to quantize it too, call "
                "quantize('int8', filters='token_embedding')",
                stacklevel=2,
            )
        preprocessor = self.preprocessor
        others = getattr(preprocessor, "_flatten_layers", list)()
        outside = {id(layer) for layer in others}

        found = []

        def asked(layer: keras.layers.Layer) -> bool:
            if id(layer) in outside or type(layer).quantize is keras.layers.Layer.quantize:
                return False
            if isinstance(layer, keras.layers.Embedding) and not with_embedding:
                chosen = filters is not None and of_tables and _matches(filters, layer)
            else:
                chosen = _matches(filters, layer)
            found.extend([layer.name] * chosen)
            return chosen

        super().quantize(mode, config=config, filters=asked, **kwargs | {"type_check": False})
        if not found:
            warnings.warn("the filters choose no layer; nothing is quantized", stacklevel=2)
        gc.collect()
        _give_back()


def _give_back() -> None:
    """Give memory that is free to the system, where its C library would keep it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _matches(filters: Filters, layer: keras.layers.Layer) -> bool:
    if filters is None:
        return True
    if callable(filters):
        return bool(filters(layer))
    patterns = [filters] if isinstance(filters, str) else filters
    return any(re.search(pattern, layer.name) for pattern in patterns)
