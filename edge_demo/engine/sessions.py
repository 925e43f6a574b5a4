"""Makes onnxruntime sessions: one for a bundle's graph, and one for prompts in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from edge_demo.bundle.manifest import GraphSpec, TensorSpec
from edge_demo.bundle.reader import Bundle
from edge_demo.device.mapped_files import forget_pages
from edge_demo.engine.float_prompts import graph_in_float
from edge_demo.errors import BundleError, EdgeError, RequestError, brief

_MOST_THREADS = 1024
_DTYPES = {"tensor(float)": "float32"} | {f"tensor({n})": n for n in ("int64", "int32", "int8")}
_WITH_KLEIDIAI = ("int4",)  # recipes that lose little by one scale for a token's activations


@dataclasses.dataclass(frozen=True)
class Session:
    """A graph that is ready to run.

    Attributes:
        run: onnxruntime's.
        outputs: what it returns beside the keys and values, which are updated in place.
    """

    run: ort.InferenceSession
    outputs: tuple[TensorSpec, ...]


def open_session(
    bundle: Bundle, graph: GraphSpec, outputs: Sequence[TensorSpec], threads: int | None
) -> Session:
    """Make a graph ready; weights that products read are copied, rearranged for this processor.

    Args:
        bundle: opened, its files checked.
        graph: of the bundle.
        outputs: beside the keys and values.
        threads: for one operator; `None` lets onnxruntime take the physical cores.

    Raises:
        BundleError: onnxruntime cannot load it.
        EdgeError: memory ran out.
    """
    session = _load(bundle, graph, bundle.path / graph.file, threads)
    forget_pages(bundle.path / bundle.weights)
    return Session(session, tuple(outputs))


def open_for_prompts(bundle: Bundle, threads: int | None) -> Session:
    """Make the graph of all logits ready to run prompts in float32; nothing is copied.

    Do not request its logits, because then the head would be dequantized too.

    Raises:
        BundleError: onnxruntime cannot load it.
        EdgeError: memory ran out.
    """
    entries = {
        "session.model_external_initializers_file_folder_path": str(bundle.path),
        "session.disable_prepacking": "1",  # no copies
        "session.force_spinning_stop": "1",  # at the end of a run: the other threads continue
    }
    # Without an arena, dequantized weights are freed at once, which takes no extra time.
    graph = graph_in_float(bundle)
    session = _load(bundle, bundle.engine, graph, threads, entries, arena=False)
    return Session(session, (all_logits(bundle),))


def all_logits(bundle: Bundle) -> TensorSpec:
    """The outputs of the graph of all logits besides keys and values."""
    return TensorSpec("logits", "float32", ("batch", "num_logits", bundle.vocabulary_size))


def candidates(bundle: Bundle) -> list[TensorSpec]:
    """The outputs of the graph of candidates besides keys and values."""
    shape = ("batch", "num_logits", bundle.num_candidates)
    ids = TensorSpec("candidate_ids", "int64", shape)
    if not bundle.low_plane_apart:
        return [ids, TensorSpec("candidate_logits", "float32", shape)]
    hidden = ("batch", "num_logits", bundle.embedding.width)
    return [
        ids,
        TensorSpec("candidate_high", "float32", shape),
        TensorSpec("candidate_hidden", "float32", hidden),
    ]


def check_threads(threads: int | None) -> None:
    """Raise an error for a number of threads that no operator can have.

    Raises:
        RequestError: it is out of range.
    """
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise RequestError(f"threads must be 1 to {_MOST_THREADS:,}, not {brief(f'{threads:,}')}")


def check_contract(
    run: ort.InferenceSession,
    graph: GraphSpec,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> None:
    """Compare what a loaded graph takes and returns with its bundle and with what it is fed.

    Args:
        run: the loaded graph.
        graph: its entry in `bundle.json`.
        inputs: that the engine feeds.
        outputs: that the engine reads.

    Raises:
        BundleError: a tensor is missing, unexpected, or of another type or shape.
    """
    for found, specs, bound in (
        (run.get_inputs(), graph.inputs, inputs),
        (run.get_outputs(), graph.outputs, outputs),
    ):
        has = {(f.name, _DTYPES.get(f.type, f.type), tuple(f.shape)) for f in found}
        for expected, whose in ((specs, "bundle.json"), (bound, "the engine")):
            wrong = has ^ {(s.name, s.dtype, s.shape) for s in expected}
            if wrong:
                name = min(name for name, _, _ in wrong)
                raise BundleError(
                    f"{graph.file} does not match {whose}: {name!r} is missing, unexpected "
                    "or of another type or shape; export the bundle again"
                )


def _load(
    bundle: Bundle,
    graph: GraphSpec,
    model: Path | bytes,
    threads: int | None,
    entries: dict[str, str] | None = None,
    arena: bool = True,
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised, so they are not printed too
    options.enable_cpu_mem_arena = arena
    # On ARM its products of 4 bits round a token's activations with one scale, not one a block.
    # They take half the instructions; `int4` loses 0.002 nats by that (docs/benchmarks.md).
    if bundle.recipe not in _WITH_KLEIDIAI:
        options.add_session_config_entry("mlas.disable_kleidiai", "1")
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    if threads is not None:
        options.intra_op_num_threads = threads
    given: Any = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class of their own
        if "bad_alloc" in str(error):
            raise EdgeError(
                f"not enough memory to load {graph.file}; close other programs, or export "
                "with fewer bits"
            ) from error
        raise BundleError(
            f"onnxruntime {ort.__version__} cannot load {graph.file}: {error}"
        ) from error
