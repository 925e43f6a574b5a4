"""Exports a Gemma checkpoint or a Keras model as a bundle of ONNX graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_demo import telemetry

if TYPE_CHECKING:
    from export.pipeline import ExportResult, export_onnx

telemetry.turn_off()  # before anything here imports onnxruntime

__all__ = ["ExportResult", "export_onnx"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'export' has no attribute {name!r}")
    from export import pipeline

    return getattr(pipeline, name)
