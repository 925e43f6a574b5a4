"""Runs a Gemma bundle on a small device with onnxruntime, numpy and sentencepiece, without
Keras."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edge_demo import telemetry

if TYPE_CHECKING:
    from edge_demo.bundle.reader import Bundle
    from edge_demo.engine.runner import Engine
    from edge_demo.text.generator import Generator
    from edge_demo.text.sampling import Sampler

telemetry.turn_off()  # must happen before any module of this package imports onnxruntime

__all__ = ["Bundle", "Engine", "Generator", "Sampler"]

_HOMES = {
    "Bundle": "bundle.reader",
    "Engine": "engine.runner",
    "Generator": "text.generator",
    "Sampler": "text.sampling",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gemma-keras")
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_demo' has no attribute {name!r}")
    return getattr(import_module(f"edge_demo.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
