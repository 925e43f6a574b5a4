"""Estimates whether the published model sizes fit on a device.

The device does not have `gemma_keras`, whose `sizes.py` defines the sizes. A test compares the two
tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from edge_demo.engine import memory
from edge_demo.engine.cache_size import SLACK

_TOKENIZER = 4_700_000  # bytes of Gemma 3's SentencePiece file; the older is a tenth less
_CONTEXT = 1024  # tokens that must fit, as for a bundle


@dataclasses.dataclass(frozen=True)
class PublishedSize:
    """One architecture.

    Attributes:
        name: for people.
        blocks: parameters of the decoder blocks and norms.
        table: parameters of the embedding table, which is the head too.
        vocabulary: rows of the table.
        ffw: width of the MLP.
        whole: numbers in the keys and values of one token, of the layers that keep the whole text.
        windowed: the same of the layers that keep a window, by its length in tokens.
    """

    name: str
    blocks: int
    table: int
    vocabulary: int
    ffw: int
    whole: int
    windowed: Mapping[int, int]

    @property
    def cache_bytes(self) -> int:
        """Keys and values for a context of 1,024 tokens, in float32."""
        windows = sum((length + SLACK) * numbers for length, numbers in self.windowed.items())
        return 4 * (_CONTEXT * self.whole + windows)


@dataclasses.dataclass(frozen=True)
class RecipeBytes:
    """Bytes for each parameter: of blocks and of the table, read by a token and kept copied."""

    block_read: float
    block_kept: float
    table_read: float
    table_kept: float


SIZES = (
    PublishedSize("Gemma 3 270M", 100_326_016, 167_772_160, 262_144, 2048, 1536, {512: 7680}),
    PublishedSize("Gemma 3 1B", 697_896_064, 301_989_888, 262_144, 6912, 2048, {512: 11_264}),
    PublishedSize("Gemma 2B", 1_981_884_416, 524_288_000, 256_000, 16_384, 9216, {}),
    PublishedSize("Gemma 2 2B", 2_024_517_888, 589_824_000, 256_000, 9216, 26_624, {4096: 26_624}),
    PublishedSize(
        "Gemma 3 4B", 3_209_010_688, 671_252_480, 262_208, 10_240, 10_240, {1024: 59_392}
    ),
    PublishedSize("Gemma 7B", 7_751_248_896, 786_432_000, 256_000, 24_576, 229_376, {}),
    PublishedSize(
        "Gemma 2 9B", 8_324_201_984, 917_504_000, 256_000, 14_336, 86_016, {4096: 86_016}
    ),
    PublishedSize(
        "Gemma 3 12B", 10_759_155_456, 1_006_878_720, 262_208, 15_360, 32_768, {1024: 163_840}
    ),
    PublishedSize(
        "Gemma 3 27B", 25_599_716_096, 1_409_630_208, 262_208, 21_504, 40_960, {1024: 212_992}
    ),
    PublishedSize(
        "Gemma 2 27B", 26_047_480_320, 1_179_648_000, 256_000, 36_864, 94_208, {4096: 94_208}
    ),
)

# int4: blocks of 128 with float32 scales, a quarter of the matrices in 8 bits; int8: blocks of 32.
# Half of the table is read.
RECIPES = {
    "int4": RecipeBytes(0.66, 0.79, 0.53, 0.56),
    "int8": RecipeBytes(1.14, 1.28, 0.625, 0.75),
}


def read_per_token(size: PublishedSize, recipe: RecipeBytes) -> int:
    """Bytes of weights that one step of decoding reads."""
    return int(size.blocks * recipe.block_read + size.table * recipe.table_read)


def estimate(size: PublishedSize, recipe: RecipeBytes, chunk: int) -> memory.MemoryEstimate:
    """Estimates the memory of a bundle of that size, as `memory.estimate` does for an existing one.

    Args:
        size: of the model.
        recipe: how it is stored.
        chunk: tokens of a prompt run at once.
    """
    return memory.estimate_of(
        weights=int(size.blocks * recipe.block_kept + size.table * recipe.table_kept),
        cache=size.cache_bytes,
        widest=2 * size.ffw,  # gate and up are one product
        tokenizer=_TOKENIZER,
        logits=8 * size.vocabulary,
        context=_CONTEXT,
        chunk=chunk,
    )
