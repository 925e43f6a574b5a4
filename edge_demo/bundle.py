"""The bundle: one folder with graphs, weights, tokenizer and `bundle.json`; its schema and reader.

`bundle.json` is data about files that may come from anywhere, so nothing in it is believed before
it is checked: file names stay inside the folder, sizes are compared before anything is opened, and
every file's SHA-256 is compared before it is used. The check of a large file is remembered with the
file's size, modification time and inode, so the next start need not read it all again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import reprlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_demo.errors import BundleError

FORMAT = "gemma-keras-bundle"
FORMAT_VERSION = 4
MANIFEST = "bundle.json"
_MAX_MANIFEST = 16 << 20
_ALWAYS_HASH = 8 << 20
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
    """A sliding window, and the layers that keep no more than it.

    Attributes:
        name: of the dimension that is the capacity of such a layer's keys and values.
        length: tokens that a token sees, itself among them.
    """

    name: str
    length: int


@dataclasses.dataclass(frozen=True)
class StoredPart:
    """Where one part of every row of a table lies in the weights file, one row after another.

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
    """

    rows: int
    width: int
    bits: int
    block_size: int
    symmetric: bool
    planes: int
    scale: float
    parts: Mapping[str, StoredPart]

    @property
    def blocks(self) -> int:
        """Blocks of a row of integers."""
        return -(-self.width // self.block_size)

    @property
    def layout(self) -> dict[str, tuple[str, int]]:
        """Data type of each part that such a table has, and the bytes of a row of it."""
        if not self.block_size:
            return {"rows": (f"float{self.bits}", self.width * self.bits // 8)}
        levels = "uint8", self.blocks * self.block_size * (self.bits // self.planes) // 8
        parts: dict[str, tuple[str, int]] = {"scales": ("float32", 4 * self.blocks)}
        for name in ("quantized",) if self.planes == 1 else ("high", "low"):
            parts[name] = levels
        if not self.symmetric:
            parts["zero_points"] = "uint8", -(-self.blocks * (self.bits // self.planes) // 8)
        return parts


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Gemma's turn template, `<start_of_turn>ROLE\\nTEXT<end_of_turn>\\n`, as data.

    Attributes:
        start_of_turn: control token id.
        end_of_turn: control token id, which ends an answer too.
        user: the user's role name.
        model: the model's role name.
    """

    start_of_turn: int
    end_of_turn: int
    user: str
    model: str


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """The tokenizer's file and the ids that generation needs."""

    file: str
    bos: int
    stop: tuple[int, ...]
    chat: ChatTemplate | None


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An opened bundle: its manifest is checked, its files have the declared sizes.

    Attributes:
        path: the folder.
        name: of the model.
        recipe: how its weights are stored, such as `int8`.
        context_length: the longest sequence, in tokens.
        vocabulary_size: of the logits.
        engine: the graph that returns all logits.
        candidates: the graph that returns the most likely tokens and their logits; `None` in
            bundles that have none.
        weights: the file that the graphs point into.
        embedding: the table of it whose rows the graphs are fed.
        ropes: the rotary tables it needs.
        windows: the sliding windows of layers that keep no more than theirs.
        tokenizer: file and ids.
        files: name to (bytes, SHA-256).
        manifest: all of `bundle.json`, for people: plan, provenance, quality, licence.
    """

    path: Path
    name: str
    recipe: str
    context_length: int
    vocabulary_size: int
    engine: GraphSpec
    candidates: GraphSpec | None
    weights: str
    embedding: EmbeddingSpec
    ropes: tuple[RopeSpec, ...]
    windows: tuple[WindowSpec, ...]
    tokenizer: TokenizerSpec
    files: Mapping[str, tuple[int, str]]
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check `bundle.json`, and the presence and size of every file it lists.

        Raises:
            BundleError: the folder is no bundle, of another version, or incomplete.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        try:
            bundle = _parse(folder, manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f"{folder / MANIFEST} is damaged: {type(error).__name__} {error}"
            ) from error
        for name, (size, _) in bundle.files.items():
            bundle._check_size(name, size)
        used = [bundle.engine.file, bundle.weights, bundle.tokenizer.file]
        if bundle.candidates is not None:
            used.append(bundle.candidates.file)
        for name in used:
            if name not in bundle.files:
                raise BundleError(f"{folder / MANIFEST} uses {name} but does not list it")
        bundle._check_embedding()
        return bundle

    def _check_embedding(self) -> None:
        table, size = self.embedding, self.files[self.weights][0]
        wrong = None
        if table.rows != self.vocabulary_size:
            wrong = f"{table.rows:,} rows for a vocabulary of {self.vocabulary_size:,}"
        for graph in filter(None, (self.engine, self.candidates)):
            for spec in graph.inputs:
                if spec.name == "inputs_embeds" and spec.shape[-1:] != (table.width,):
                    wrong = f"rows of {table.width:,} numbers, which {graph.file} does not take"
        for name, (_, row_bytes) in table.layout.items():
            end = table.parts[name].offset + table.rows * row_bytes
            if end > size:
                wrong = f"{name!r} up to byte {end:,} of {self.weights}, which has {size:,}"
        if wrong is not None:
            raise BundleError(f"{self.path / MANIFEST} describes an embedding of {wrong}")

    def _check_size(self, name: str, expected: int) -> None:
        file = self.path / name
        try:
            found = file.stat().st_size
        except FileNotFoundError:
            raise BundleError(
                f"the bundle {self.path} lacks the file {name}; export or copy it again"
            ) from None
        except OSError as error:
            raise BundleError(
                f"{reprlib.repr(name)} in the bundle {self.path} cannot be read: {error.strerror}"
            ) from error
        if not file.is_file():
            raise BundleError(f"{name} in the bundle {self.path} is not a file")
        if found != expected:
            raise BundleError(
                f"{name} in the bundle {self.path} has {found:,} bytes, not {expected:,}; "
                "export or copy it again"
            )

    @property
    def num_bytes(self) -> int:
        """Size of all its files, in bytes."""
        return sum(size for size, _ in self.files.values())

    @property
    def num_candidates(self) -> int:
        """How many tokens its candidates graph returns at each position; 0 without one."""
        for spec in self.candidates.outputs if self.candidates else ():
            if spec.name == "candidate_logits" and isinstance(spec.shape[-1], int):
                return spec.shape[-1]
        return 0

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that decides which tokens and which keys and values come out.

        It is made of the hashes in the manifest, which `verify` compares with the files.
        """
        graphs = [self.engine, *([self.candidates] if self.candidates else [])]
        names = [*(graph.file for graph in graphs), self.weights, self.tokenizer.file]
        facts = [
            self.context_length,
            [self.files[name] for name in names],
            [dataclasses.astuple(rope) for rope in self.ropes],
            [dataclasses.astuple(window) for window in self.windows],
            dataclasses.astuple(self.tokenizer),
            dataclasses.asdict(self.embedding),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def verify(self, *, use_memory: bool = True) -> None:
        """Compare every file with its SHA-256.

        Args:
            use_memory: whether a large file that was checked before, and has kept its size,
                modification time and inode, may be passed over.

        Raises:
            BundleError: a file has changed.
        """
        memory = _VerifiedFiles()
        for name, (size, expected) in self.files.items():
            file = self.path / name
            if use_memory and size > _ALWAYS_HASH and memory.knows(file, expected):
                continue
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != expected:
                raise BundleError(
                    f"{name} in the bundle {self.path} has changed since it was exported "
                    f"(SHA-256 {found[:12]}…, expected {expected[:12]}…); export or copy it again"
                )
            if size > _ALWAYS_HASH:
                memory.remember(file, expected)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.exists():
        raise BundleError(f"the bundle {folder} does not exist")
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}")
    if path.stat().st_size > _MAX_MANIFEST:
        raise BundleError(f"{path} is larger than a manifest can be")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{path} does not describe a {FORMAT}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {reprlib.repr(manifest.get('format_version'))}; this "
            f"edge-demo reads {FORMAT_VERSION}; export it again, or run the one it was made for"
        )
    return manifest


def _parse(folder: Path, manifest: dict[str, Any]) -> Bundle:
    model, tokenizer = manifest["model"], manifest["tokenizer"]
    chat = tokenizer["chat"]
    candidates = manifest["graphs"].get("candidates")
    return Bundle(
        path=folder,
        name=str(model["name"]),
        recipe=str(manifest["recipe"]),
        context_length=_count(model["context_length"]),
        vocabulary_size=_count(model["vocabulary_size"]),
        engine=_graph(manifest["graphs"]["engine"]),
        candidates=None if candidates is None else _graph(candidates),
        weights=_plain_name(manifest["weights"]),
        embedding=_embedding(manifest["embedding"]),
        ropes=tuple(
            RopeSpec(str(r["name"]), _factor(r["theta"]), _factor(r["scale"]), _count(r["dims"]))
            for r in manifest["ropes"]
        ),
        windows=tuple(
            WindowSpec(str(w["name"]), _window(w["length"], model["context_length"]))
            for w in manifest["windows"]
        ),
        tokenizer=TokenizerSpec(
            file=_plain_name(tokenizer["file"]),
            bos=_index(tokenizer["bos"]),
            stop=tuple(_index(i) for i in tokenizer["stop"]),
            chat=None
            if chat is None
            else ChatTemplate(
                _index(chat["start_of_turn"]),
                _index(chat["end_of_turn"]),
                str(chat["user"]),
                str(chat["model"]),
            ),
        ),
        files={
            _plain_name(name): (_index(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        },
        manifest=manifest,
    )


def _graph(data: Mapping[str, Any]) -> GraphSpec:
    def tensors(entries: list[Any]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                str(e["name"]),
                str(e["dtype"]),
                tuple(d if isinstance(d, str) else _count(d) for d in e["shape"]),
            )
            for e in entries
        )

    return GraphSpec(_plain_name(data["file"]), tensors(data["inputs"]), tensors(data["outputs"]))


def _embedding(data: Mapping[str, Any]) -> EmbeddingSpec:
    spec = EmbeddingSpec(
        rows=_count(data["rows"]),
        width=_count(data["width"]),
        bits=_index(data["bits"]),
        block_size=_index(data["block_size"]),
        symmetric=data["symmetric"],
        planes=_index(data["planes"]),
        scale=_factor(data["scale"]),
        parts={
            str(name): StoredPart(_index(part["offset"]), str(part["dtype"]))
            for name, part in data["parts"].items()
        },
    )
    if spec.block_size:
        good = spec.bits in (2, 4, 8) and spec.block_size in _BLOCK_SIZES
    else:
        good = spec.bits in (16, 32) and spec.symmetric is True
    if spec.planes != 1:
        good = good and (spec.planes, spec.bits, spec.symmetric) == (2, 8, False)
    if not good or not isinstance(spec.symmetric, bool):
        raise ValueError("there is no such format of an embedding")
    dtypes = {name: dtype for name, (dtype, _) in spec.layout.items()}
    if dtypes != {name: part.dtype for name, part in spec.parts.items()}:
        raise ValueError(f"an embedding of that format has the parts {', '.join(dtypes)}")
    return spec


def _plain_name(name: Any) -> str:
    good = isinstance(name, str) and name.isprintable() and "\\" not in name
    if not good or name in ("", "..") or Path(name).name != name:
        raise BundleError(
            f"the bundle names a file that cannot be in its folder: {reprlib.repr(name)}"
        )
    return name


def _count(value: Any) -> int:
    if _index(value) == 0:
        raise ValueError("a size must not be 0")
    return value


def _index(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 50:
        raise ValueError(f"{reprlib.repr(value)} is not a size or an index")
    return value


def _window(value: Any, context_length: int) -> int:
    if _count(value) >= context_length:
        raise ValueError(f"a sliding window of {value:,} tokens is not shorter than the context")
    return value


def _factor(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-6 < value < 1e12:
        raise ValueError(f"{reprlib.repr(value)} is not a rotary base or a scale")
    return float(value)


class _VerifiedFiles:
    """Large files whose SHA-256 was checked, in `$XDG_CACHE_HOME/gemma-keras/verified.json`.

    Losing it, or failing to write it, only costs time.
    """

    _MOST = 64

    def __init__(self) -> None:
        self._path: Path | None = None
        self._entries: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, RuntimeError):
            # RuntimeError: the user has no home, or the JSON is nested without end
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            self._path = cache / "gemma-keras/verified.json"
            self._entries = dict(json.loads(self._path.read_bytes()))

    @staticmethod
    def _stamp(file: Path, sha256: str) -> list[Any]:
        stat = file.stat()
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, sha256]

    def knows(self, file: Path, sha256: str) -> bool:
        return self._entries.get(str(file.resolve())) == self._stamp(file, sha256)

    def remember(self, file: Path, sha256: str) -> None:
        key = str(file.resolve())
        self._entries.pop(key, None)
        self._entries[key] = self._stamp(file, sha256)
        while len(self._entries) > self._MOST:
            self._entries.pop(next(iter(self._entries)))
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _replace(self._path, json.dumps(self._entries))


def _replace(path: Path, text: str) -> None:
    """Write a file that others may be reading, whole or not at all."""
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(unfinished, path)
    except OSError:
        os.unlink(unfinished)
        raise
