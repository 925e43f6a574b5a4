"""`/metrics` for Prometheus: its text format, version 0.0.4.

prometheus.io, "Exposition formats".
"""

from __future__ import annotations

from edge_demo.device.memory_limits import rss_bytes
from edge_demo.server.worker.embedding_worker import EmbeddingWorker
from edge_demo.server.worker.worker import Worker

_COUNTERS = {
    "requests": "Prompts whose answers were begun.",
    "refused": "Prompts refused because too many were waiting.",
    "failures": "Times the engine failed.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that had been run before.",
    "completion_tokens": "Tokens generated.",
}
_EMBEDDING_COUNTERS = {
    "requests": "Requests for vectors that were begun.",
    "refused": "Requests refused because too many were waiting.",
    "failures": "Times the engine failed.",
    "texts": "Texts embedded.",
    "prompt_tokens": "Tokens of texts.",
}
_GAUGES = {
    "waiting": "Prompts that wait.",
    "reading": "Prompts that are being run.",
    "reading_ahead": "Conversations whose next prompts are begun while there is time.",
    "answering": "Answers that grow.",
    "cache_bytes": "Bytes of keys and values kept of earlier prompts.",
    "cache_entries": "Prompts whose keys and values are kept.",
}
_EMBEDDING_GAUGES = {
    "waiting": "Requests that wait.",
    "running": "Requests whose texts are being embedded.",
}


def metrics(worker: Worker | EmbeddingWorker, unknown_fields: int) -> str:
    """All numbers as Prometheus reads them.

    Args:
        worker: whose numbers they are.
        unknown_fields: of all requests so far.
    """
    embeds = isinstance(worker, EmbeddingWorker)
    counters = _EMBEDDING_COUNTERS if embeds else _COUNTERS
    gauges = _EMBEDDING_GAUGES if embeds else _GAUGES
    lines = []
    for name, text in counters.items():
        lines += _metric(f"{name}_total", "counter", text, worker.counts[name])
    text = "Unknown fields of requests."
    lines += _metric("unknown_fields_total", "counter", text, unknown_fields)
    for name, text in gauges.items():
        lines += _metric(name, "gauge", text, worker.state[name])
    lines += _metric("resident_bytes", "gauge", "Resident memory.", rss_bytes())
    return "\n".join([*lines, ""])


def _metric(name: str, kind: str, text: str, value: int) -> list[str]:
    name = f"edge_demo_{name}"
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
