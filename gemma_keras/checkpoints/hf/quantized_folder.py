"""Explains errors of Hugging Face folders whose weights another tool has quantized.

A `quantization_config` alone is not an error: tools leave it in folders after writing the weights
in 16 bits, and these can be read. If weights are not floats, the error names the tool that
quantized them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from gemma_keras.errors import CheckpointError

# Method to advice, besides using the original 16-bit model.
_REMEDIES = {
    "bitsandbytes": "load it with transformers, call model.dequantize() and save it; merge an "
    "adapter that was trained on it into the 16-bit base",
    "gptq": "convert it to 16 bits with GPTQModel or transformers",
    "awq": "convert it to 16 bits with transformers",
    "compressed-tensors": "load it with transformers (run_compressed=False) and save it",
    "mlx": "convert it to 16 bits with MLX (mlx_lm.convert --dequantize)",
    "torchao": "save the model before you quantize it",
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
    """Turn errors about missing tensors or wrong types into an error about quantized weights.

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
            f"{folder} holds weights that {method} quantized, which cannot be read; give "
            f"the 16-bit model that they were made from{f', or {remedy}' if remedy else ''} "
            f"({error})"
        ) from error


def _method(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    text = config.get("text_config")
    for data in (config, text if isinstance(text, Mapping) else {}):
        quantization = data.get("quantization_config")
        if isinstance(quantization, Mapping) and isinstance(quantization.get("quant_method"), str):
            return quantization["quant_method"][:40]
        if data.get("quantization"):
            return "mlx"
    for method, ends in _MARKS.items():
        if any(name.endswith(ends) for name in names):
            return method
    return None
