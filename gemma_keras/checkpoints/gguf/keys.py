"""Lists the GGUF keys that do not affect the forward pass, and rejects unknown ones.

Keys outside the architecture's own (`general.`, `tokenizer.`, `quantize.`, `split.` and others) do
not describe the model and are ignored. The architecture's own keys that are not read and cannot
change the computation are listed here. A model with any other key is not loaded.

Sources: llama.cpp's `llama-arch.cpp` and `llm_load_hparams`, and Ollama's `convert_gemma3.go`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

from gemma_keras.errors import ConfigError, listed, quoted

# Names after the architecture's, and families of them.
_INERT = """
    decoder_start_token_id mm.* rope.scaling.finetuned tensor_data_layout vision.*
"""
# They only configure YaRN, which is rejected elsewhere.
_YARN = """
    rope.scaling.beta_* rope.scaling.extrapolation_factor rope.scaling.original_context_length
    rope.scaling.yarn_*
"""
# Keys of other architectures, and the values with which they have no effect on a Gemma.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.shared_kv_layers": (0,),
    "embedding_length_per_layer_input": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (1,),
    "use_parallel_residual": (False,),
}
_FAMILIES = re.compile("|".join(fnmatch.translate(name) for name in (_INERT + _YARN).split()))


def refuse_unknown(keys: Mapping[str, Any], kind: str) -> None:
    """Raise an error for an architecture's keys that are not known.

    Args:
        keys: name after the architecture's to value.
        kind: the architecture.

    Raises:
        ConfigError: a key is unknown, or has a value that Gemma does not support.
    """
    left = {key: value for key, value in keys.items() if not _FAMILIES.match(key)}
    unknown = sorted(f"{kind}.{key}" for key in left if key not in _FIXED)
    if unknown:
        raise ConfigError(
            f"the GGUF metadata has keys this project does not know: {listed(unknown)}; "
            "they may change the computation, so the model is not loaded"
        )
    for key, value in left.items():
        if value not in _FIXED[key]:
            raise ConfigError(
                f"the GGUF metadata has {kind}.{key} = {quoted(value)}, which no supported "
                f"Gemma uses; the value must be {_FIXED[key][0]!r}"
            )
