"""Which keys of a GGUF's architecture say nothing about the forward pass.

Keys outside the architecture's own (`general.`, `tokenizer.`, `quantize.`, `split.`, anybody's) do
not describe the model and are passed over. Of the architecture's own, those that are not read and
cannot change the mathematics stand here; any other is unknown, and the model is refused.

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
# They say something of YaRN alone, which is refused where it is chosen.
_YARN = """
    rope.scaling.beta_* rope.scaling.extrapolation_factor rope.scaling.original_context_length
    rope.scaling.yarn_*
"""
# Keys that other architectures have, and the values by which they mean what Gemma does.
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
    """Refuse what is left of an architecture's keys when everything known is taken.

    Args:
        keys: name after the architecture's to value.
        kind: the architecture.

    Raises:
        ConfigError: a key is unknown, or asks for what Gemma does not do.
    """
    left = {key: value for key, value in keys.items() if not _FAMILIES.match(key)}
    unknown = sorted(f"{kind}.{key}" for key in left if key not in _FIXED)
    if unknown:
        raise ConfigError(
            f"the GGUF metadata has keys this project does not know: {listed(unknown)}; "
            "one of them may change the mathematics, so the model is refused"
        )
    for key, value in left.items():
        if value not in _FIXED[key]:
            raise ConfigError(
                f"the GGUF metadata has {kind}.{key} = {quoted(value)}, which is not part of any "
                f"Gemma this project knows; Gemma's is {_FIXED[key][0]!r}"
            )
