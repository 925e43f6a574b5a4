"""What to say of a Hugging Face folder whose weights are integers of another tool.

A `quantization_config` alone refuses nothing: tools leave it in folders whose weights they have
written in 16 bits, and these are read as they are. Weights that are not there as floats are told by
what made them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from gemma_keras.errors import CheckpointError

# Method to what to do, other than taking the 16-bit model that it was made of.
_REMEDIES = {
    "bitsandbytes": "load it with transformers, call model.dequantize() and save it; an adapter "
    "that was trained on it is merged into the 16-bit base",
    "gptq": "have GPTQModel or transformers write it in 16 bits",
    "awq": "have transformers write it in 16 bits",
    "compressed-tensors": "load it with transformers (run_compressed=False) and save it",
    "mlx": "have MLX write it in 16 bits (mlx_lm.convert --dequantize)",
    "torchao": "save the model before it is quantized",
    "fp8": "load it with transformers (dequantize=True) and save it",
}
# How the names of their tensors end, for folders that do not say so.
_MARKS = {
    "bitsandbytes": (".absmax", ".quant_map", ".SCB", ".quant_state.bitsandbytes__nf4"),
    "gptq": (".qweight", ".qzeros"),
    "compressed-tensors": (".weight_packed", ".weight_scale"),
    "mlx": (".scales", ".biases"),
}


@contextlib.contextmanager
def told_if_quantized(
    folder: object, config: Mapping[str, Any], names: Collection[str]
) -> Iterator[None]:
    """What the block finds missing or of a wrong type is told as what it is, quantized weights.

    Args:
        folder: for people.
        config: the content of its `config.json`.
        names: of its tensors.

    Raises:
        CheckpointError: what the block raises.
    """
    try:
        yield
    except CheckpointError as error:
        method = _method(config, names)
        if method is None:
            raise
        remedy = _REMEDIES.get(method)
        raise CheckpointError(
            f"{folder} holds weights that {method} quantized, which are not read here; give the "
            f"16-bit model that it was made of{f', or {remedy}' if remedy else ''} ({error})"
        ) from error


def _method(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    text = config.get("text_config")
    for data in (config, text if isinstance(text, Mapping) else {}):
        found = data.get("quantization_config")
        if isinstance(found, Mapping) and isinstance(found.get("quant_method"), str):
            return found["quant_method"][:40]
        if data.get("quantization"):
            return "mlx"
    for method, ends in _MARKS.items():
        if any(name.endswith(ends) for name in names):
            return method
    return None
