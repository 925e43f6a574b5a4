"""Reads and checks `bundle.json`, the manifest of a bundle, and defines its schema.

The manifest may come from an untrusted source, so every entry is checked. File names must stay
inside the folder, and numbers must have a valid type and size.
"""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_demo.errors import BundleError

FORMAT = "gemma-keras-bundle"
FORMAT_VERSION = 5
# Version 4 lacks what a `ChatTemplate` says beyond Gemma's turns.
# Of bundles that embed texts, which earlier versions of edge-demo would take for generators.
EMBEDDER_VERSION = 6
READABLE_VERSIONS = (4, 5, 6)
MANIFEST = "bundle.json"
ANY_TARGET = "any"  # of bundles that are made for no processors in particular
_MAX_MANIFEST = 16 << 20
GENERATOR, EMBEDDER = "generator", "embedder"  # kinds of bundles
_MOST_PROMPTS, _LONGEST_PROMPT = 256, 4096  # characters
_BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: in the graph.
        dtype: numpy's name, such as `int64`.
        shape: numbers, and names for the dimensions that change from call to call.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """One ONNX file and its contract."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """A rotary table that the engine makes and the graph reads.

    The graph's inputs `{name}.cos` and `{name}.sin` are float32 `[positions, dims]`, of
    `position * frequency`, with frequencies `theta ** (-i / dims) / scale`, i from 0 to dims - 1.
    """

    name: str
    theta: float
    scale: float
    dims: int


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """A sliding window of layers that store only the last window of keys and values.

    Attributes:
        name: of the dimension that is the capacity of such a layer's keys and values.
        length: tokens that a token sees, itself among them.
    """

    name: str
    length: int


@dataclasses.dataclass(frozen=True)
class StoredPart:
    """The place of one part of a table's rows in the weights file, one row after another.

    Attributes:
        offset: of the first row, in bytes.
        dtype: numpy's name, such as `uint8`.
    """

    offset: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class EmbeddingSpec:
    """The embedding table, whose rows the device reads, multiplies by `scale` and feeds the graphs.

    A row of floats is its part `rows`. A row of integers is cut into blocks, the last one padded:
    a number is `(level - zero_point) * scales[block]`. Levels are the part `quantized`, or in two
    planes of 4 bits `high` and `low`, of which 16 times the high number and the low one are added
    up; the first is in the lowest bits of a byte. The zero point is the middle level, or stored
    as levels are in `zero_points`, in two planes for the low one.

    Attributes:
        rows: one for each token.
        width: numbers of a row, which the graphs take.
        bits: 32 or 16 for floats, 8, 4 or 2 for integers.
        block_size: numbers that share a scale; 0 for floats.
        symmetric: whether the zero point is the middle level in every block.
        planes: 2 where the integers of 8 bits are split in two of 4.
        scale: what each number is multiplied by, beside its block's scale.
        parts: name to place.
        by_rows: whether levels are int8 around 0 and a row is one block; each column then has a
            scale, too, in the part `columns`.
    """

    rows: int
    width: int
    bits: int
    block_size: int
    symmetric: bool
    planes: int
    scale: float
    parts: Mapping[str, StoredPart]
    by_rows: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of a row of integers."""
        return -(-self.width // self.block_size)

    @property
    def layout(self) -> dict[str, tuple[str, int]]:
        """Data type of each part that such a table has, and the bytes of a row of it.

        The part `columns` has only one row: see `end_of`.
        """
        if not self.block_size:
            return {"rows": (f"float{self.bits}", self.width * self.bits // 8)}
        if self.by_rows:
            return {
                "scales": ("float32", 4),
                "quantized": ("int8", self.width),
                "columns": ("float32", 4 * self.width),
            }
        levels = "uint8", self.blocks * self.block_size * (self.bits // self.planes) // 8
        parts: dict[str, tuple[str, int]] = {"scales": ("float32", 4 * self.blocks)}
        for name in ("quantized",) if self.planes == 1 else ("high", "low"):
            parts[name] = levels
        if not self.symmetric:
            parts["zero_points"] = "uint8", -(-self.blocks * (self.bits // self.planes) // 8)
        return parts

    def end_of(self, part: str) -> int:
        """Where a part ends in the weights file, in bytes."""
        rows = 1 if part == "columns" else self.rows
        return self.parts[part].offset + rows * self.layout[part][1]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A turn template, `<start_of_turn>ROLE\\nTEXT<end_of_turn>\\n` or its like, as data.

    Attributes:
        start_of_turn: control token id.
        end_of_turn: control token id, which ends an answer too.
        user: the user's role name.
        model: the model's role name.
        system: the role name of a turn for the system text; `None` puts the text and a blank line
            before the first user text.
        default_system: the system text of a conversation that has none; may be empty.
        strip: whether white space around a text is left out.
    """

    start_of_turn: int
    end_of_turn: int
    user: str
    model: str
    system: str | None = None
    default_system: str = ""
    strip: bool = True


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """The tokenizer's file and the ids that generation needs."""

    file: str
    bos: int
    stop: tuple[int, ...]
    chat: ChatTemplate | None


@dataclasses.dataclass(frozen=True)
class EmbedderSpec:
    """What a bundle that embeds texts says beside its graphs.

    Attributes:
        dimensions: of a vector.
        eos: id of the token after a text.
        pooling: how the tokens of a text become one; only `mean` is known.
        num_heads: the most query heads of a layer.
        projections: shapes of the matrices after the pooling, `(in, out)` each.
        prompts: name of a task to what is put before its texts.
        default_prompt_name: of the prompt that is used by default, or `None`.
    """

    dimensions: int
    eos: int
    pooling: str
    num_heads: int
    projections: tuple[tuple[int, int], ...]
    prompts: Mapping[str, str]
    default_prompt_name: str | None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a bundle; checks only its format and version.

    Raises:
        BundleError: the folder has none, or one of another version.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise BundleError(f"the bundle {folder} does not exist")
    if not path.is_file():
        if folder.is_file():
            raise BundleError(f"{folder} is a file; give the bundle's folder, {folder.parent}")
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}")
    if path.stat().st_size > _MAX_MANIFEST:
        raise BundleError(f"{path} is too large for a bundle manifest")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{path} does not describe a {FORMAT}")
    version = manifest.get("format_version")
    *first, last = map(str, READABLE_VERSIONS)
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise BundleError(
            f"{path} has format version {reprlib.repr(version)}, but this edge-demo reads "
            f"{', '.join(first)} and {last}. Export the bundle again, or "
            "install the edge-demo version that matches it"
        )
    return manifest


def read_graph(data: Mapping[str, Any]) -> GraphSpec:
    """Reads a graph's entry. The errors below mean that the manifest is damaged.

    Raises:
        BundleError: a file's name leaves the folder.
        KeyError, TypeError, ValueError, AttributeError: an entry is missing or not valid.
    """

    def tensors(entries: list[Any]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                str(e["name"]),
                str(e["dtype"]),
                tuple(d if isinstance(d, str) else count(d) for d in e["shape"]),
            )
            for e in entries
        )

    return GraphSpec(plain_name(data["file"]), tensors(data["inputs"]), tensors(data["outputs"]))


def read_tokenizer(data: Mapping[str, Any]) -> TokenizerSpec:
    """The tokenizer's entry; raises as `read_graph`."""
    chat = data["chat"]
    return TokenizerSpec(
        file=plain_name(data["file"]),
        bos=index(data["bos"]),
        stop=tuple(index(i) for i in data["stop"]),
        chat=None if chat is None else _read_chat(chat),
    )


def _read_chat(data: Mapping[str, Any]) -> ChatTemplate:
    system, strip = data.get("system"), data.get("strip", True)
    if not isinstance(strip, bool):
        raise ValueError(f"strip is {reprlib.repr(strip)}, neither true nor false")
    return ChatTemplate(
        index(data["start_of_turn"]),
        index(data["end_of_turn"]),
        str(data["user"]),
        str(data["model"]),
        None if system is None else str(system),
        str(data.get("default_system", "")),
        strip,
    )


def read_embedding(data: Mapping[str, Any]) -> EmbeddingSpec:
    """The embedding table's entry; raises as `read_graph`."""
    spec = EmbeddingSpec(
        rows=count(data["rows"]),
        width=count(data["width"]),
        bits=index(data["bits"]),
        block_size=index(data["block_size"]),
        symmetric=data["symmetric"],
        planes=index(data["planes"]),
        scale=factor(data["scale"]),
        parts={
            str(name): StoredPart(index(part["offset"]), str(part["dtype"]))
            for name, part in data["parts"].items()
        },
        by_rows=data.get("by_rows", False),
    )
    if spec.by_rows is True:
        good = (spec.bits, spec.block_size, spec.symmetric) == (8, spec.width, True)
    elif spec.block_size:
        good = spec.bits in (2, 4, 8) and spec.block_size in _BLOCK_SIZES
    else:
        good = spec.bits in (16, 32) and spec.symmetric is True
    if spec.planes != 1:
        good = good and (spec.planes, spec.bits, spec.symmetric) == (2, 8, False)
    if not good or not isinstance(spec.symmetric, bool) or not isinstance(spec.by_rows, bool):
        raise ValueError("the format of the embedding is not supported")
    dtypes = {name: dtype for name, (dtype, _) in spec.layout.items()}
    if dtypes != {name: part.dtype for name, part in spec.parts.items()}:
        raise ValueError(f"the parts of an embedding in this format must be {', '.join(dtypes)}")
    return spec


def read_embedder(manifest: Mapping[str, Any]) -> EmbedderSpec | None:
    """The entry about embedding texts; `None` in a bundle that generates text; raises as
    `read_graph`."""
    kind = manifest.get("kind", GENERATOR)
    if kind == GENERATOR:
        return None
    if kind != EMBEDDER:
        raise ValueError(f"the kind of bundle {reprlib.repr(kind)} is not supported")
    data = manifest["embedder"]
    prompts, default = data["prompts"], data["default_prompt_name"]
    if len(prompts) > _MOST_PROMPTS or not all(
        isinstance(text, str) and len(text) <= _LONGEST_PROMPT
        for text in (*prompts.keys(), *prompts.values())
    ):
        raise ValueError("the prompts are not texts, or are too many or too long")
    if default is not None and default not in prompts:
        raise ValueError(f"there is no prompt {reprlib.repr(default)}, the default one")
    if data["pooling"] != "mean":
        raise ValueError(f"pooling by {reprlib.repr(data['pooling'])} is not supported")
    return EmbedderSpec(
        dimensions=count(data["dimensions"]),
        eos=index(data["eos"]),
        pooling=data["pooling"],
        num_heads=count(data["num_heads"]),
        projections=tuple((count(wide), count(narrow)) for wide, narrow in data["projections"]),
        prompts=dict(prompts),
        default_prompt_name=default,
    )


def read_target(name: Any) -> str:
    """The processors that a bundle is made for, as an export names them; raises as `read_graph`."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9.-]{1,32}", name):
        raise ValueError(f"target is {reprlib.repr(name)}, not the name of a target")
    return name


def plain_name(name: Any) -> str:
    """Checks the name of a file in the bundle's folder.

    Raises:
        BundleError: it is not a plain file name.
    """
    good = isinstance(name, str) and name.isprintable() and "\\" not in name
    if not good or name in ("", "..") or Path(name).name != name:
        raise BundleError(
            f"bundle.json names a file outside the bundle's folder: {reprlib.repr(name)}"
        )
    return name


def count(value: Any) -> int:
    """A size: a whole number above 0. Raises `ValueError` otherwise."""
    if index(value) == 0:
        raise ValueError("a size must not be 0")
    return value


def index(value: Any) -> int:
    """A whole number that is not negative. Raises `ValueError` otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 50:
        raise ValueError(f"{reprlib.repr(value)} is not a valid size or index")
    return value


def window_length(value: Any, context_length: int) -> int:
    """A sliding window in tokens, shorter than the context. Raises `ValueError` otherwise."""
    if count(value) >= context_length:
        raise ValueError(f"a sliding window of {value:,} tokens must be shorter than the context")
    return value


def soft_cap(value: Any) -> float | None:
    """A soft cap of logits, or `None`. Raises `ValueError` otherwise."""
    return None if value is None else factor(value)


def factor(value: Any) -> float:
    """A positive number within reasonable limits. Raises `ValueError` otherwise."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-6 < value < 1e12:
        raise ValueError(f"{reprlib.repr(value)} is not a valid rotary base or scale")
    return float(value)
