"""An unfinished bundle, whose weights and graphs can be written several times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edge_demo.bundle.manifest import EmbeddingSpec
from edge_demo.bundle.reader import Bundle
from export.bundle import writer
from export.bundle.ecosystem import write_ecosystem_files
from export.calibrate.kv_scales import measure_kv_scales
from export.calibrate.text import page
from export.formats.formats import Format, Plan
from export.formats.packing import Quantized
from export.formats.targets import TARGETS
from export.graph.contract import (
    NO_WINDOWS,
    WEIGHTS_FILE,
    candidates_contract,
    engine_contract,
    interchange_contract,
    ropes,
    whole_layers,
    windows,
)
from export.graph.fused import build_graph
from export.graph.store_weights import embedding_spec, store_weights
from export.graph.traced import build_traced_graph
from export.graph.weights_file import WeightsFile
from gemma_keras.checkpoints.adapters.write import PeftFiles
from gemma_keras.checkpoints.names import head_table
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.config import GemmaConfig

Progress = Callable[[str, float], None]

_KV_ROWS = 8  # of the page of text that the scales of keys and values are measured on

# A function for each of `export.options.LOWERINGS`.
LOWERINGS = {"fused": build_graph, "traced": build_traced_graph}


def _low_plane_apart(config: GemmaConfig, plan: Plan) -> bool:
    """Whether the device adds the low plane of the head. It can if the head is the embedding table,
    whose rows it reads."""
    return config.tied_head and plan[head_table(config)].planes == 2


class BundleDraft:
    """The contents of an unfinished folder.

    Args:
        folder: empty.
        checkpoint: the model.
        recipe: its name.
        lowering: the name of the way to graphs.
        max_context: the longest sequence the bundle is for, in tokens.
        kv_cache_dtype: one of `export.options.KV_CACHE_DTYPES`: how the engine's graphs keep keys
        and values of
            layers that keep those of the whole text.
        target: one of `export.formats.targets.TARGETS`.
        on_progress: called with (stage, share of it that is done).
        adapters: name to the files of an adapter that stays apart from the model.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        recipe: str,
        lowering: str,
        max_context: int,
        kv_cache_dtype: str,
        target: str,
        on_progress: Progress,
        adapters: Mapping[str, PeftFiles] = MappingProxyType({}),
    ) -> None:
        config = checkpoint.config
        self.folder = folder
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.lowering = lowering
        self.max_context = max_context
        self.target = target
        self._on_progress = on_progress
        # Standard operators have no cache of a window's length.
        self._windows = windows(config, max_context) if lowering == "fused" else NO_WINDOWS
        int8 = kv_cache_dtype == "int8"
        self._int8_layers = whole_layers(config, self._windows) if int8 else ()
        self._graphs = {
            "interchange": interchange_contract(config),
            "engine": engine_contract(config, self._windows, self._int8_layers),
        }
        self._tokenizer = writer.write_tokenizer(folder, checkpoint)
        self._licence = writer.write_notices(folder, checkpoint, recipe)
        write_ecosystem_files(folder, checkpoint, self._tokenizer, max_context)
        self._adapters = writer.write_adapters(folder, adapters)
        self._plan: Plan = {}
        self._embedding: EmbeddingSpec | None = None
        # Measured once: what else a plan rounds moves them by far less than their margin.
        self._kv_scales: dict[str, np.ndarray] = {}
        self._bundle: Bundle | None = None

    @property
    def bundle(self) -> Bundle:
        """The bundle as written by the last `store`."""
        assert self._bundle is not None
        return self._bundle

    def store(
        self,
        weights: Mapping[str, np.ndarray],
        plan: Plan,
        rounded: Callable[[str, Format], Quantized | None] = lambda name, fmt: None,
    ) -> Bundle:
        """Write weights, graphs and manifest; earlier ones are replaced.

        The bundle is also kept as `bundle`.

        Args:
            weights: canonical name to float array.
            plan: canonical name to format.
            rounded: what is on a grid already, by name and format.
        """
        config = self.checkpoint.config
        build = LOWERINGS[self.lowering]
        if TARGETS[self.target].one_token_attention:
            build = functools.partial(build_graph, one_token_attention=True)
        self._plan = plan
        self._on_progress("weights", 0)
        with WeightsFile(self.folder / WEIGHTS_FILE) as file:
            store_weights(
                config,
                weights,
                plan,
                file,
                lambda done, total: self._on_progress("weights", done / total),
                rounded,
            )
        self._embedding = embedding_spec(config, plan, file)
        self._graphs["candidates"] = candidates_contract(
            config, self._windows, self._int8_layers, _low_plane_apart(config, plan)
        )
        for number, contract in enumerate(self._graphs.values()):
            self._on_progress("graphs", number / len(self._graphs))
            graph = build(config, plan, file, contract, self.max_context, self._kv_scales)
            ir.save(graph, self.folder / contract.file)
            onnx.checker.check_model(str(self.folder / contract.file))
            if self._int8_layers and not self._kv_scales:  # by the first graph, which keeps floats
                self._kv_scales = self._measure_kv_scales()
        self._on_progress("graphs", 1)
        return self.describe({})

    def _measure_kv_scales(self) -> dict[str, np.ndarray]:
        tokenizer = writer.open_tokenizer(self.checkpoint)
        text = page(tokenizer, self.max_context).rows[:_KV_ROWS]
        return measure_kv_scales(
            self.folder,
            self.checkpoint.config,
            text,
            self._int8_layers,
            lambda done, total: self._on_progress("keys and values", done / total),
        )

    def describe(self, report: Mapping[str, Any]) -> Bundle:
        """Write the manifest of the folder.

        Args:
            report: its entries about quality and rounding, and further content of the model card.
        """
        assert self._embedding is not None
        writer.write_manifest(
            self.folder,
            self.checkpoint,
            self.recipe,
            self.target,
            self.lowering,
            self._plan,
            self._graphs,
            self._embedding,
            ropes(self.checkpoint.config).values(),
            self._windows.values(),
            self._tokenizer,
            self._licence,
            self.max_context,
            report,
            self._adapters,
        )
        self._bundle = Bundle.open(self.folder)
        return self._bundle
