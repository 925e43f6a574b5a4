"""The table of published Gemma sizes: their architectures and checkpoints.

Sources: the technical reports, the ``config.json`` files on the Hugging Face Hub, and KerasHub's
presets (``gemma_presets.py``, ``gemma3_presets.py``), whose parameter counts the tests compare.
Everything that names a size reads it here. A device does not have this package: what
`edge-demo doctor` says of sizes is `edge_demo/engine/size_estimates.py`, which a test holds to this
table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Release:
    """One set of weights that was published.

    Attributes:
        repository: its name on the Hugging Face Hub.
        tuned: whether it was tuned to answer in Gemma's turn template.
        preset: its name among KerasHub's presets, if it is there.
    """

    repository: str
    tuned: bool
    preset: str | None = None


@dataclasses.dataclass(frozen=True)
class Size:
    """A published size.

    Attributes:
        name: as `named_config` takes it.
        title: for people.
        parameters: how many it has; of a multimodal model, its text part.
        hf: the keys of its ``config.json``; those that are absent have transformers' defaults.
        releases: the checkpoints that have it.
        alias_of: the name of the size whose architecture this is, if it has none of its own.
        licence: the name of its terms on the Hugging Face Hub.
    """

    name: str
    title: str
    parameters: int
    hf: Mapping[str, Any]
    releases: tuple[Release, ...]
    alias_of: str | None = None
    licence: str = "gemma"

    @property
    def causal(self) -> bool:
        """Whether it predicts the next token, so that it can be exported."""
        return not self.hf.get("use_bidirectional_attention", False)


def _hf(
    kind: str, hidden: int, ffw: int, layers: int, heads: int, kv_heads: int, **others: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": ffw,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    } | others


def _base(repository: str, preset: str | None = None) -> Release:
    return Release(f"google/{repository}", False, preset)


def _tuned(repository: str, preset: str | None = None) -> Release:
    return Release(f"google/{repository}", True, preset)


_GEMMA3_SHORT = {"vocab_size": 262_144, "sliding_window": 512, "max_position_embeddings": 32_768}
_GEMMA3_LONG = {
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}

_OWN = (
    Size(
        "gemma_2b",
        "Gemma 2B",
        2_506_172_416,
        _hf("gemma", 2048, 16_384, 18, 8, 1),
        (
            _base("gemma-2b", "gemma_2b_en"),
            _tuned("gemma-2b-it", "gemma_instruct_2b_en"),
            _tuned("gemma-1.1-2b-it", "gemma_1.1_instruct_2b_en"),
        ),
    ),
    Size(
        "gemma_7b",
        "Gemma 7B",
        8_537_680_896,
        _hf("gemma", 3072, 24_576, 28, 16, 16),
        (
            _base("gemma-7b", "gemma_7b_en"),
            _tuned("gemma-7b-it", "gemma_instruct_7b_en"),
            _tuned("gemma-1.1-7b-it", "gemma_1.1_instruct_7b_en"),
        ),
    ),
    Size(
        "gemma2_2b",
        "Gemma 2 2B",
        2_614_341_888,
        _hf("gemma2", 2304, 9216, 26, 8, 4),
        (_base("gemma-2-2b", "gemma2_2b_en"), _tuned("gemma-2-2b-it", "gemma2_instruct_2b_en")),
    ),
    Size(
        "gemma2_9b",
        "Gemma 2 9B",
        9_241_705_984,
        _hf("gemma2", 3584, 14_336, 42, 16, 8),
        (_base("gemma-2-9b", "gemma2_9b_en"), _tuned("gemma-2-9b-it", "gemma2_instruct_9b_en")),
    ),
    Size(
        "gemma2_27b",
        "Gemma 2 27B",
        27_227_128_320,
        _hf("gemma2", 4608, 36_864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144),
        (_base("gemma-2-27b", "gemma2_27b_en"), _tuned("gemma-2-27b-it", "gemma2_instruct_27b_en")),
    ),
    Size(
        "gemma3_270m",
        "Gemma 3 270M",
        268_098_176,
        _hf("gemma3_text", 640, 2048, 18, 4, 1, **_GEMMA3_SHORT),
        (
            _base("gemma-3-270m", "gemma3_270m"),
            _tuned("gemma-3-270m-it", "gemma3_instruct_270m"),
        ),
    ),
    Size(
        "gemma3_1b",
        "Gemma 3 1B",
        999_885_952,
        _hf("gemma3_text", 1152, 6912, 26, 4, 1, **_GEMMA3_SHORT),
        (_base("gemma-3-1b-pt", "gemma3_1b"), _tuned("gemma-3-1b-it", "gemma3_instruct_1b")),
    ),
    # The files of the larger have 262,208 rows, KerasHub's presets 262,144.
    Size(
        "gemma3_4b",
        "Gemma 3 4B",
        3_880_263_168,
        _hf("gemma3_text", 2560, 10_240, 34, 8, 4, **_GEMMA3_LONG),
        (
            _base("gemma-3-4b-pt", "gemma3_4b_text"),
            _tuned("gemma-3-4b-it", "gemma3_instruct_4b_text"),
        ),
    ),
    Size(
        "gemma3_12b",
        "Gemma 3 12B",
        11_766_034_176,
        _hf("gemma3_text", 3840, 15_360, 48, 16, 8, **_GEMMA3_LONG),
        (
            _base("gemma-3-12b-pt", "gemma3_12b_text"),
            _tuned("gemma-3-12b-it", "gemma3_instruct_12b_text"),
        ),
    ),
    Size(
        "gemma3_27b",
        "Gemma 3 27B",
        27_009_346_304,
        _hf(
            "gemma3_text",
            5376,
            21_504,
            62,
            32,
            16,
            head_dim=128,
            query_pre_attn_scalar=168,
            **_GEMMA3_LONG,
        ),
        (
            _base("gemma-3-27b-pt", "gemma3_27b_text"),
            _tuned("gemma-3-27b-it", "gemma3_instruct_27b_text"),
        ),
    ),
    # Only its transformer; pooling and projections are not part of it.
    Size(
        "embeddinggemma_300m",
        "EmbeddingGemma 300M",
        302_863_104,
        _hf(
            "gemma3_text",
            768,
            1152,
            24,
            3,
            1,
            use_bidirectional_attention=True,
            **_GEMMA3_SHORT | {"max_position_embeddings": 2048},
        ),
        (_base("embeddinggemma-300m"),),
    ),
)


_HEALTH = "health-ai-developer-foundations"


def _alias(name: str, title: str, of: str, *releases: Release, licence: str = "gemma") -> Size:
    size = next(size for size in _OWN if size.name == of)
    return dataclasses.replace(
        size, name=name, title=title, releases=releases, alias_of=of, licence=licence
    )


_ALIASES = (
    _alias(
        "codegemma_2b",
        "CodeGemma 2B",
        "gemma_2b",
        _base("codegemma-2b", "code_gemma_2b_en"),
        _base("codegemma-1.1-2b", "code_gemma_1.1_2b_en"),
    ),
    _alias(
        "codegemma_7b",
        "CodeGemma 7B",
        "gemma_7b",
        _base("codegemma-7b", "code_gemma_7b_en"),
        _tuned("codegemma-7b-it", "code_gemma_instruct_7b_en"),
        _tuned("codegemma-1.1-7b-it", "code_gemma_1.1_instruct_7b_en"),
    ),
    _alias(
        "shieldgemma_2b",
        "ShieldGemma 2B",
        "gemma2_2b",
        _tuned("shieldgemma-2b", "shieldgemma_2b_en"),
    ),
    _alias(
        "shieldgemma_9b",
        "ShieldGemma 9B",
        "gemma2_9b",
        _tuned("shieldgemma-9b", "shieldgemma_9b_en"),
    ),
    _alias(
        "shieldgemma_27b",
        "ShieldGemma 27B",
        "gemma2_27b",
        _tuned("shieldgemma-27b", "shieldgemma_27b_en"),
    ),
    _alias(
        "functiongemma_270m",
        "FunctionGemma 270M",
        "gemma3_270m",
        _tuned("functiongemma-270m-it", "function_gemma_instruct_270m"),
    ),
    _alias(
        "medgemma_4b",
        "MedGemma 4B",
        "gemma3_4b",
        _base("medgemma-4b-pt", "medgemma_4b"),
        _tuned("medgemma-4b-it", "medgemma_instruct_4b"),
        _tuned("medgemma-1.5-4b-it", "medgemma_1.5_instruct_4b"),
        licence=_HEALTH,
    ),
    _alias(
        "medgemma_27b",
        "MedGemma 27B",
        "gemma3_27b",
        _tuned("medgemma-27b-it", "medgemma_instruct_27b"),
        _tuned("medgemma-27b-text-it", "medgemma_instruct_27b_text"),
        licence=_HEALTH,
    ),
    _alias(
        "translategemma_4b",
        "TranslateGemma 4B",
        "gemma3_4b",
        _tuned("translategemma-4b-it", "translategemma_4b_it"),
    ),
    _alias(
        "translategemma_12b",
        "TranslateGemma 12B",
        "gemma3_12b",
        _tuned("translategemma-12b-it", "translategemma_12b_it"),
    ),
    _alias(
        "translategemma_27b",
        "TranslateGemma 27B",
        "gemma3_27b",
        _tuned("translategemma-27b-it", "translategemma_27b_it"),
    ),
)

SIZES: dict[str, Size] = {size.name: size for size in (*_OWN, *_ALIASES)}


def releases() -> Iterator[tuple[Size, Release]]:
    """Every published checkpoint, with the size that it has."""
    for size in SIZES.values():
        for release in size.releases:
            yield size, release
