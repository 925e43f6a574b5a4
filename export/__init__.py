"""Exports a Gemma checkpoint or a Keras model as a bundle of ONNX graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_demo import telemetry

if TYPE_CHECKING:
    from export.options import ExportOptions
    from export.pipeline import ExportResult, export_onnx

telemetry.turn_off()  # before anything here imports onnxruntime

__all__ = ["ExportOptions", "ExportResult", "export_onnx"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gemma-keras")
    if name not in __all__:
        raise AttributeError(f"module 'export' has no attribute {name!r}")
    from export import options, pipeline

    return getattr(options if name == "ExportOptions" else pipeline, name)
