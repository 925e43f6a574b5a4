"""Checks that logits are finite, and explains the cause if they are not."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from gemma_keras.errors import NotFiniteError


def require_finite_logits(model: keras.Model, finite: Sequence[bool], lengths) -> None:
    """Raise an error that names the cause if logits are not finite.

    Args:
        model: that computed them.
        finite: of each row, whether its logits are.
        lengths: of each row, tokens of the prompt, or of prompt and continuation so far.

    Raises:
        NotFiniteError: the logits of a row are not.
    """
    if np.all(finite):
        return
    row = int(np.argmin(finite))
    rows = f"row {row} of {len(finite)}" if len(finite) > 1 else "the prompt"
    raise NotFiniteError(
        f"the logits after {rows} (tokens: {int(lengths[row]):,}) are not finite, so no next token "
        f"can be chosen: {_reason(model)}"
    )


def _reason(model: keras.Model) -> str:
    damaged = first_not_finite(model)
    if damaged is not None:
        return (
            f"the weight {damaged} holds values that are not finite. Load the model again; "
            "if training caused them, use a lower learning rate, or train in "
            "mixed_bfloat16 or float32"
        )
    policy = model.dtype_policy.name
    if "float16" in policy.replace("bfloat16", ""):
        return (
            f"the dtype policy {policy} overflows with this model; load it with dtype='bfloat16' "
            "or 'float32'"
        )
    return f"its weights are finite, but the computation in {policy} overflows; check the weights"


def first_not_finite(model: keras.Model) -> str | None:
    """The path of the first weight that holds a number that is not finite, or `None`."""
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            sums = ops.sum(ops.cast(ops.logical_not(ops.isfinite(variable)), "int32"))
            if int(ops.convert_to_numpy(sums)):
                return variable.path
    return None
