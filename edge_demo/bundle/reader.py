"""Opens a bundle: one folder with graphs, weights, tokenizer and `bundle.json`.

File sizes are checked when the bundle is opened. The SHA-256 of each file is checked before the
file is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_demo.bundle.manifest import (
    ANY_TARGET,
    MANIFEST,
    EmbedderSpec,
    EmbeddingSpec,
    GraphSpec,
    RopeSpec,
    TokenizerSpec,
    WindowSpec,
    count,
    factor,
    index,
    plain_name,
    read_embedder,
    read_embedding,
    read_graph,
    read_manifest,
    read_target,
    read_tokenizer,
    soft_cap,
    window_length,
)
from edge_demo.bundle.verified_files import VerifiedFiles
from edge_demo.errors import BundleError, RequestError


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An opened bundle: its manifest is checked, its files have the declared sizes.

    Attributes:
        path: the folder.
        name: of the model.
        recipe: how its weights are stored, such as `int8`.
        target: the processors that it is made for, as `export-onnx --target` names them, or `any`.
        context_length: the longest sequence, in tokens.
        vocabulary_size: of the logits.
        engine: the graph that returns all logits.
        candidates: the graph that returns the most likely tokens and their logits, or `None`.
        weights: the file that the graphs point into.
        embedding: the table whose rows are the input of the graphs.
        final_soft_cap: logits end as `cap * tanh(logits / cap)`; `None` for no cap.
        ropes: the rotary tables it needs.
        windows: the sliding windows of layers that store only the last window of keys and values.
        tokenizer: file and ids.
        embedder: what a bundle says that embeds texts; `None` in one that generates text.
        files: name to (bytes, SHA-256).
        manifest: all of `bundle.json`, for people: plan, provenance, quality, licence.
    """

    path: Path
    name: str
    recipe: str
    target: str
    context_length: int
    vocabulary_size: int
    engine: GraphSpec
    candidates: GraphSpec | None
    weights: str
    embedding: EmbeddingSpec
    final_soft_cap: float | None
    ropes: tuple[RopeSpec, ...]
    windows: tuple[WindowSpec, ...]
    tokenizer: TokenizerSpec
    embedder: EmbedderSpec | None
    files: Mapping[str, tuple[int, str]]
    manifest: Mapping[str, Any]

    @property
    def fused(self) -> bool:
        """Whether its graphs have onnxruntime's own operators, and not only standard ones."""
        return self.manifest.get("lowering") == "fused"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check `bundle.json`, and the presence and size of every file it lists.

        Raises:
            BundleError: the folder is not a bundle, has another version, or is incomplete.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
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

    def require_generator(self) -> None:
        """Raise an error for a bundle that embeds texts.

        Raises:
            RequestError: it does.
        """
        if self.embedder is not None:
            raise RequestError(
                f"{self.name} embeds texts and generates none; use edge-demo embed, or "
                "/v1/embeddings of edge-demo serve"
            )

    def require_embedder(self) -> EmbedderSpec:
        """What a bundle says that embeds texts.

        Raises:
            RequestError: it generates text.
        """
        if self.embedder is None:
            raise RequestError(
                f"{self.name} generates text and embeds none; give the bundle of an embedder, such "
                "as EmbeddingGemma's"
            )
        return self.embedder

    def _check_embedding(self) -> None:
        table, size = self.embedding, self.files[self.weights][0]
        wrong = None
        if table.rows != self.vocabulary_size:
            wrong = f"{table.rows:,} rows, but the vocabulary size is {self.vocabulary_size:,}"
        for graph in filter(None, (self.engine, self.candidates)):
            for spec in graph.inputs:
                if spec.name == "inputs_embeds" and spec.shape[-1:] != (table.width,):
                    wrong = (
                        f"rows of {table.width:,} numbers, which does not match the input of "
                        f"{graph.file}"
                    )
        if self.low_plane_apart and table.planes != 2:
            wrong = "one plane, but the candidates graph needs a second one"
        for name in table.layout:
            end = table.end_of(name)
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
            if spec.name == "candidate_ids" and isinstance(spec.shape[-1], int):
                return spec.shape[-1]
        return 0

    @property
    def low_plane_apart(self) -> bool:
        """Whether its candidates graph leaves the low plane of the head to the device."""
        outputs = self.candidates.outputs if self.candidates else ()
        return any(spec.name == "candidate_hidden" for spec in outputs)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that determines the output tokens, keys and values.

        It is computed from the hashes in the manifest, which `verify` compares with the files.
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
            self.final_soft_cap,
        ]
        if self.embedder is not None:
            facts.append(dataclasses.asdict(self.embedder))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def verify(self, *, use_memory: bool = True) -> None:
        """Compare every file with its SHA-256.

        Args:
            use_memory: whether to skip a large file that was checked before, if its size,
                modification time and inode are unchanged.

        Raises:
            BundleError: a file has changed.
        """
        memory = VerifiedFiles()
        for name, (_, expected) in self.files.items():
            file = self.path / name
            if use_memory and memory.knows(file, expected):
                continue
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != expected:
                raise BundleError(
                    f"{name} in the bundle {self.path} has changed since it was exported "
                    f"(SHA-256 {found[:12]}…, expected {expected[:12]}…); export or copy it again"
                )
            memory.remember(file, expected)


def _parse(folder: Path, manifest: dict[str, Any]) -> Bundle:
    model = manifest["model"]
    candidates = manifest["graphs"].get("candidates")
    return Bundle(
        path=folder,
        name=str(model["name"]),
        recipe=str(manifest["recipe"]),
        target=read_target(manifest.get("target", ANY_TARGET)),
        context_length=count(model["context_length"]),
        vocabulary_size=count(model["vocabulary_size"]),
        engine=read_graph(manifest["graphs"]["engine"]),
        candidates=None if candidates is None else read_graph(candidates),
        weights=plain_name(manifest["weights"]),
        embedding=read_embedding(manifest["embedding"]),
        final_soft_cap=soft_cap(model["config"]["final_soft_cap"]),
        ropes=tuple(
            RopeSpec(str(r["name"]), factor(r["theta"]), factor(r["scale"]), count(r["dims"]))
            for r in manifest["ropes"]
        ),
        windows=tuple(
            WindowSpec(str(w["name"]), window_length(w["length"], model["context_length"]))
            for w in manifest["windows"]
        ),
        tokenizer=read_tokenizer(manifest["tokenizer"]),
        embedder=read_embedder(manifest),
        files={
            plain_name(name): (index(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        },
        manifest=manifest,
    )
