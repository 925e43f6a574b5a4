"""`/metrics` for Prometheus: its text format, version 0.0.4.

prometheus.io, "Exposition formats".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from edge_demo.device.memory_limits import rss_bytes
from edge_demo.guard.decisions import Guard
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


def metrics(
    worker: Worker | EmbeddingWorker, unknown_fields: int, guard: Guard | None = None
) -> str:
    """All numbers as Prometheus reads them.

    Args:
        worker: whose numbers they are.
        unknown_fields: of all requests so far.
        guard: whose decisions are counted.
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
    if guard is not None:
        lines += _of_guard(guard)
    return "\n".join([*lines, ""])


def _of_guard(guard: Guard) -> list[str]:
    tokens = guard.judge.counts
    decisions = {f'on="{on}",decision="{d}"': n for (on, d), n in guard.decisions.items()}
    refusals = {f'policy="{name}"': count for name, count in guard.refusals.items()}
    of_tokens = {f'of="{of}"': n for of, n in dataclasses.asdict(tokens).items()}
    failures = guard.log.failures if guard.log else 0
    lines = []
    for name, text, values in (
        ("decisions", "Texts that the guard judged.", decisions),
        ("refusals", "Violations of a policy that the guard found.", refusals),
        ("tokens", "Tokens of the guard: of texts, of texts held already, of policies.", of_tokens),
        ("seconds", "Seconds that the guard took.", {"": round(guard.seconds, 3)}),
        ("log_failures", "Decisions that could not be logged.", {"": failures}),
    ):
        lines += _metrics(f"guard_{name}_total", "counter", text, values)
    return lines


def _metric(name: str, kind: str, text: str, value: int) -> list[str]:
    return _metrics(name, kind, text, {"": value})


def _metrics(name: str, kind: str, text: str, values: Mapping[str, float]) -> list[str]:
    """One number for each set of labels, which may be empty."""
    name = f"edge_demo_{name}"
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    return lines + [f"{name}{{{of}}} {n}" if of else f"{name} {n}" for of, n in values.items()]
