"""One folder, three readers: small random Gemmas that transformers, KerasHub and this project load.

The weights follow from a seed by integers of PCG64, whose stream numpy keeps the same, scaled by
float32 multiplications: the same bits on every machine, so a golden holds the seed, not the weights.
`CASES` keep to what KerasHub can express too (its rotary bases, its norm epsilon, a tied head);
`tests.models` has models beyond that.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from gemma_keras.checkpoints.hf.config import config_from_hf
from gemma_keras.checkpoints.names import weight_specs
from tests.models import VOCABULARY_SIZE, WINDOW, random_ids, weight_statistics

GOLDENS = Path(__file__).parent / "goldens"
SEED = 0
TOLERANCE = 1e-4  # of the values' spread

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
_GEMMA2 = _COMMON | {
    "model_type": "gemma2",
    "num_hidden_layers": 5,
    "query_pre_attn_scalar": 32,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 6.0,
}
_GEMMA3 = _COMMON | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 8,
    "query_pre_attn_scalar": 32,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 10_000.0,
    "rope_theta": 1_000_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
# The content of each config.json, in the keys of the published files. The two of 27B have a quarter
# of its head_dim, so that queries are scaled by as much more than head_dim says: 144 and 168 to 128.
CASES: dict[str, dict[str, Any]] = {
    "gemma": _COMMON | {"model_type": "gemma", "num_hidden_layers": 3},
    "gemma2": _GEMMA2,
    "gemma2 as 27B": _GEMMA2 | {"hidden_size": 4 * 36, "query_pre_attn_scalar": 36},
    "gemma3": _GEMMA3,
    "gemma3 as 27B": _GEMMA3 | {"hidden_size": 4 * 42, "query_pre_attn_scalar": 42},
}
AS_27B = tuple(case for case in CASES if "27B" in case)


class Outputs(NamedTuple):
    """What a model makes of token ids.

    Attributes:
        hidden: what the head multiplies, float32 `(batch, length, hidden_dim)`.
        logits: float32 `(batch, length, vocabulary_size)`.
    """

    hidden: np.ndarray
    logits: np.ndarray


# --- a folder ------------------------------------------------------------------------------------


def seeded_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A float32 weight by its name and shape in a file of transformers'; evenly distributed."""
    bits = np.random.PCG64([seed, zlib.crc32(name.encode())])
    raw = bits.random_raw(int(np.prod(shape))) >> np.uint64(40)  # 24 bits, which float32 holds
    noise = (raw.astype(np.float32) - np.float32(1 << 23)) / np.float32(1 << 23)  # from -1 to 1
    mean, deviation = weight_statistics(name, shape)
    return (np.float32(mean) + np.float32(3**0.5 * deviation) * noise).reshape(shape)


def seeded_weights(config: dict[str, Any], seed: int = SEED) -> dict[str, np.ndarray]:
    """Name to array, as transformers names them, of a `config.json`'s content."""
    specs = weight_specs(config_from_hf(config)).values()
    return {spec.hf: seeded_weight(spec.hf, spec.file_shape, seed) for spec in specs}


def digest(weights: Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 of names and float32 bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name, array in sorted(weights, key=lambda item: item[0]):
        sha.update(f"{name} {list(array.shape)}\n".encode())
        sha.update(np.ascontiguousarray(array, "<f4").tobytes())
    return sha.hexdigest()


def write_folder(folder: Path, config: dict[str, Any], seed: int = SEED) -> Path:
    """Write `config.json` and `model.safetensors`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(
        seeded_weights(config, seed), folder / "model.safetensors", {"format": "pt"}
    )
    return folder


# --- its readers ---------------------------------------------------------------------------------


def read_by_transformers(folder: Path):
    """transformers' model of a folder, in float32, by the plain formulas."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def run_by_transformers(model, ids: np.ndarray) -> Outputs:
    """The outputs of a transformers model."""
    import torch

    with torch.no_grad():
        found = model(torch.tensor(ids, dtype=torch.int64), output_hidden_states=True)
    return Outputs(found.hidden_states[-1].numpy(), found.logits.numpy())


def run_by_keras_hub(folder: Path, ids: np.ndarray, tell_attention: bool = True) -> Outputs:
    """The outputs of KerasHub's model of a folder, which its own converter reads, in float32.

    Args:
        folder: with `config.json` and `model.safetensors`.
        ids: int `(batch, length)`.
        tell_attention: pass `query_head_dim_normalize` on to attention. KerasHub 0.32 does not, and
            so scales the queries of every size by `head_dim ** -0.5`, those of 27B too.
    """
    import keras_hub

    backbone = keras_hub.models.Backbone.from_preset(str(folder), dtype="float32")
    if tell_attention:
        for block in backbone.transformer_layers:
            block.attention.query_head_dim_normalize = backbone.query_head_dim_normalize
    return _run_backbone(backbone, ids)


def run_here(folder: Path, ids: np.ndarray) -> Outputs:
    """The outputs of this project's model of a folder, in float32."""
    from gemma_keras import GemmaCausalLM, open_checkpoint

    model = GemmaCausalLM.from_checkpoint(open_checkpoint(folder), dtype="float32")
    return _run_backbone(model.backbone, ids)


def _run_backbone(backbone, ids: np.ndarray) -> Outputs:
    from keras import ops

    hidden = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    logits = backbone.token_embedding(hidden, reverse=True)
    return Outputs(*(ops.convert_to_numpy(ops.stop_gradient(x)) for x in (hidden, logits)))


# --- goldens -------------------------------------------------------------------------------------

IDS = random_ids()  # (3, 24): over three times the window
# Of all outputs a golden keeps those at some positions, which are on either side of the window.
POSITIONS = (0, 5, 6, 7, 14, 23)
VOCABULARY_IDS = tuple(range(0, VOCABULARY_SIZE, 19))
HIDDEN_DIMS = tuple(range(0, 96, 12))


def kept(outputs: Outputs) -> Outputs:
    """The part of the outputs that a golden holds."""
    return Outputs(
        outputs.hidden[:, POSITIONS][..., HIDDEN_DIMS],
        outputs.logits[:, POSITIONS][..., VOCABULARY_IDS],
    )


def golden_path(case: str) -> Path:
    """The file of a case."""
    return GOLDENS / f"{case.replace(' ', '_')}.json"


def read_golden(case: str) -> dict[str, Any]:
    """The golden of a case, as `tools/make_goldens.py` writes it."""
    return json.loads(golden_path(case).read_text(encoding="utf-8"))


def distance(found: Outputs, golden: dict[str, Any]) -> float:
    """Greatest difference from a golden's values of one project, in units of their spread.

    Args:
        found: all outputs.
        golden: `hidden`, `logits` and their spread, as `golden_values` makes them.
    """
    return max(
        np.abs(values - np.array(golden[name], np.float32)).max() / golden[f"{name}_spread"]
        for name, values in kept(found)._asdict().items()
    )


def golden_values(outputs: Outputs) -> dict[str, Any]:
    """What a golden holds of one project's outputs: some values, and the spread of all."""
    values = {}
    for name, array in kept(outputs)._asdict().items():
        values[f"{name}_spread"] = float(f"{getattr(outputs, name).std():.6g}")
        values[name] = [[[float(f"{x:.9g}") for x in row] for row in rows] for rows in array]
    return values
