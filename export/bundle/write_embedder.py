"""Writes the bundle of an embedder into an unfinished folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edge_demo.bundle.manifest import EmbedderSpec, EmbeddingSpec
from edge_demo.bundle.reader import Bundle
from export.bundle import writer
from export.bundle.draft import Progress
from export.formats.formats import Format, Plan
from export.formats.packing import Quantized
from export.graph.contract import (
    WEIGHTS_FILE,
    embedder_engine_contract,
    embedder_interchange_contract,
)
from export.graph.embedder import build_embedder
from export.graph.store_weights import embedding_spec, store_projections, store_weights
from export.graph.weights_file import WeightsFile
from gemma_keras.checkpoints.opening.sentence_transformers import EmbedderCheckpoint


class EmbedderDraft:
    """The contents of an unfinished folder.

    Args:
        folder: empty.
        checkpoint: the embedder.
        recipe: its name.
        target: one of `export.formats.targets.TARGETS`.
        max_tokens: of a text, those of its beginning and end included.
        on_progress: called with (stage, share of it that is done).
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: EmbedderCheckpoint,
        recipe: str,
        target: str,
        max_tokens: int,
        on_progress: Progress,
    ) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.target = target
        self.max_tokens = max_tokens
        self._on_progress = on_progress
        transformer = checkpoint.transformer
        self._tokenizer = writer.write_tokenizer(folder, transformer)
        self._licence = writer.write_notices(folder, transformer, recipe)
        self.spec = EmbedderSpec(
            dimensions=checkpoint.projections[-1].shape[1]
            if checkpoint.projections
            else transformer.config.hidden_dim,
            eos=writer.open_tokenizer(transformer).eos_id(),
            pooling="mean",
            num_heads=max(layer.num_heads for layer in transformer.config.layers),
            projections=tuple((m.shape[0], m.shape[1]) for m in checkpoint.projections),
            prompts=checkpoint.prompts,
            default_prompt_name=checkpoint.default_prompt_name,
        )
        self._graphs = {
            "interchange": embedder_interchange_contract(self.spec.dimensions),
            "engine": embedder_engine_contract(transformer.config, self.spec.dimensions),
        }
        self._plan: Plan = {}
        self._embedding: EmbeddingSpec | None = None

    def store(
        self,
        weights: Mapping[str, np.ndarray],
        plan: Plan,
        rounded: Callable[[str, Format], Quantized | None],
    ) -> None:
        """Write weights and graphs.

        Args:
            weights: canonical name to float array, of the model below the pooling.
            plan: canonical name to format, projections included.
            rounded: what is on a grid already, by name and format.
        """
        config = self.checkpoint.transformer.config
        self._plan = plan

        def stored(done: int, total: int) -> None:
            self._on_progress("weights", done / total)

        self._on_progress("weights", 0)
        with WeightsFile(self.folder / WEIGHTS_FILE) as file:
            store_weights(config, weights, plan, file, stored, rounded, has_head=False)
            store_projections(self.checkpoint.projections, plan, file)
        self._embedding = embedding_spec(config, plan, file)
        for number, contract in enumerate(self._graphs.values()):
            self._on_progress("graphs", number / len(self._graphs))
            graph = build_embedder(
                config, self.spec.projections, plan, file, contract, self.max_tokens
            )
            ir.save(graph, self.folder / contract.file)
            onnx.checker.check_model(str(self.folder / contract.file))
        self._on_progress("graphs", 1)

    def describe(self, report: Mapping[str, Any]) -> Bundle:
        """Write the manifest of the folder.

        Args:
            report: its entries about quality and rounding.
        """
        assert self._embedding is not None
        writer.write_manifest(
            self.folder,
            self.checkpoint.transformer,
            self.recipe,
            self.target,
            "fused",
            self._plan,
            self._graphs,
            self._embedding,
            (),
            (),
            self._tokenizer,
            self._licence,
            self.max_tokens,
            report,
            {},
            self.spec,
        )
        return Bundle.open(self.folder)
