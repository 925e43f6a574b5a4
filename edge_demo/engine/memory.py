"""How much memory a bundle takes, and what to do where there is too little.

onnxruntime maps the weights file and copies what matrix products read, rearranged for this
processor, to memory of its own. The copies, the keys and values and the activations are there for
good ("anonymous"); mapped pages of files can be dropped and read again, so they are no reason to
refuse. BatchDecoder of the embedding table are read, not mapped (`edge_demo.bundle.embedding`).
Prompts in float32 (`edge_demo.engine.float_prompts`) read the weights where they are mapped and
multiply out one at a time, if all of that fits.

The constants are fitted to the sample on x86-64; `tests/edge_demo/test_memory.py` holds the
estimate against what a run takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from edge_demo.bundle.graph_weights import ARM, StoredWeight, stored_weights
from edge_demo.bundle.manifest import GraphSpec
from edge_demo.bundle.reader import Bundle
from edge_demo.device.memory_limits import MemoryLimit, memory_limits
from edge_demo.device.system_files import read_sizes, read_text
from edge_demo.engine import float_prompts, low_plane
from edge_demo.engine.cache_size import cache_bytes
from edge_demo.errors import BundleError, EdgeError, TooLittleMemoryError
from edge_demo.units import megabytes

CHUNKS = (256, 128, 64)  # tokens of a prompt run at once: as many as there is memory for
FLOAT_CHUNK = 512  # the same in float32, which is chosen only where memory is plenty
_CONTEXT = 1024  # tokens that must fit, or all of a shorter context

_MB = 10**6
_PROCESS = 26 * _MB  # Python, numpy, onnxruntime
_LIBRARIES = 55 * _MB  # their code, mapped
_WORKING_SET = 64 * _MB  # of files, what cannot be missed for long: their code, rows of tables
_SESSION = 10 * _MB
_TOKENIZER = 9  # times the SentencePiece file
_ACTIVATIONS = 7.5  # arrays of the widest product, for each token of a chunk
_THREAD = 16 * _MB  # stacks of onnxruntime's and numpy's threads: data, most of it never touched
_STACK = 8 * _MB  # of a thread of the session for prompts
_DATA = 80 * _MB
_ADDRESSES = 160 * _MB
_OF_EVERY_PROCESS = {
    "process",
    "context",
    "chunk",
}  # fields of `MemoryEstimate` that are no model's bytes


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that running a graph takes.

    Attributes:
        process: Python and its libraries, the session and the tokenizer.
        weights: the copies that products read, as onnxruntime keeps them.
        cache: keys, values and rotary tables of all texts for the context.
        activation: of one token of a prompt.
        logits: of the positions where they are wanted at once.
        lookups: tables of which the graph reads rows, mapped from the weights file.
        copied_from: the largest weight that is copied, mapped until it is.
        context: tokens the cache is for.
        chunk: tokens run at once.
        low_plane: rows of the head's low plane that the device keeps.
        read_again: weights of the blocks, mapped for prompts in float32 too; 0 without those.
        mapped_again: all that is mapped for them, what they do not read included.
        multiplied_out: the most that the largest of them takes in float32.
    """

    process: int
    weights: int
    cache: int
    activation: int
    logits: int
    lookups: int
    copied_from: int
    context: int
    chunk: int
    low_plane: int = 0
    read_again: int = 0
    mapped_again: int = 0
    multiplied_out: int = 0

    @property
    def in_float(self) -> bool:
        """Whether prompts are run in float32."""
        return self.read_again > 0

    @property
    def activations(self) -> int:
        """Of one chunk of the prompt, and logits."""
        return min(self.chunk, self.context) * self.activation + self.logits

    @property
    def anonymous(self) -> int:
        """What cannot be given back while it runs."""
        own = self.process + self.weights + self.cache + self.low_plane
        return own + self.activations + self.multiplied_out

    @property
    def peak(self) -> int:
        """The most that is resident where memory is plenty: mapped files too."""
        return self._loaded_or_running + self.read_again + _LIBRARIES

    @property
    def resident(self) -> int:
        """What has to be there: below this a device swaps, or ends the process."""
        return self.anonymous + min(_WORKING_SET, _LIBRARIES + self.lookups)

    @property
    def data(self) -> int:
        """What `RLIMIT_DATA` counts: mapped weights and untouched stacks too."""
        threads = (_THREAD + _STACK * self.in_float) * (os.cpu_count() or 1)
        return self._loaded_or_running + self.mapped_again + _DATA + threads

    @property
    def address_space(self) -> int:
        """What `RLIMIT_AS` counts."""
        return self.data + _ADDRESSES

    @property
    def _loaded_or_running(self) -> int:
        loading = self.process + self.weights + self.copied_from
        return max(loading, self.anonymous + self.lookups)


def estimate(
    bundle: Bundle,
    graph: GraphSpec | None = None,
    context: int = _CONTEXT,
    chunk: int = CHUNKS[0],
    logit_rows: int = 1,
    texts: int = 1,
    in_float: bool = False,
) -> MemoryEstimate:
    """What running a bundle takes.

    Args:
        bundle: opened.
        graph: to run; `None` is the one that greedy generation runs.
        context: tokens held, at most; no more than the bundle's context counts.
        chunk: tokens of a prompt run at once.
        logit_rows: positions whose logits are wanted at once.
        texts: whose keys and values are held at once.
        in_float: whether prompts are run in float32.

    Raises:
        BundleError: the graph cannot be read.
    """
    graph = graph or bundle.candidates or bundle.engine
    context = min(context, bundle.context_length)
    weights = stored_weights(bundle.path / graph.file)
    read = {w.offset: w for w in weights if w.multiplied}.values()
    body = [w for w in read if w.name.startswith("layers.")]
    widest = max((max(w.shape) for w in body if w.shape), default=0)
    tokenizer = bundle.files[bundle.tokenizer.file][0]
    again = stored_weights(bundle.path / bundle.engine.file) if in_float else []
    blocks = [w for w in again if w.name.startswith("layers.")]
    apart = graph is bundle.candidates and bundle.low_plane_apart
    return MemoryEstimate(
        process=_PROCESS + _SESSION + _TOKENIZER * tokenizer,
        weights=sum(map(_copied, read)),
        cache=texts
        * cache_bytes(graph, bundle.ropes, bundle.windows, bundle.context_length, context),
        activation=int(4 * widest * _ACTIVATIONS),
        logits=8 * logit_rows * bundle.vocabulary_size,
        lookups=_once(w for w in weights if w.looked_up),
        copied_from=max((w.num_bytes for w in read), default=0),
        context=context,
        chunk=chunk,
        low_plane=low_plane.memory_needed(bundle.embedding, bundle.num_candidates) if apart else 0,
        read_again=_once(blocks),
        mapped_again=_once(again),
        # two weights of 4 bits are a byte, and 8 of float32; of 8 bits it is half as much
        multiplied_out=max((8 * w.num_bytes for w in blocks), default=0),
    )


def estimate_of(
    *, weights: int, cache: int, widest: int, tokenizer: int, logits: int, context: int, chunk: int
) -> MemoryEstimate:
    """What a bundle would take of which no more is known than some sizes.

    Args:
        weights: bytes of the copies that products read.
        cache: bytes of keys and values.
        widest: numbers in the widest product of a token.
        tokenizer: bytes of the SentencePiece file.
        logits: bytes of logits.
        context: tokens the cache is for.
        chunk: tokens run at once.
    """
    return MemoryEstimate(
        process=_PROCESS + _SESSION + _TOKENIZER * tokenizer,
        weights=weights,
        cache=cache,
        activation=int(4 * widest * _ACTIVATIONS),
        logits=logits,
        lookups=0,
        copied_from=0,
        context=context,
        chunk=chunk,
    )


def _once(weights: Iterable[StoredWeight]) -> int:
    """Bytes of weights, a place that two of them share counted once."""
    return sum({w.offset: w.num_bytes for w in weights}.values())


def _copied(weight: StoredWeight) -> int:
    machine = platform.machine()
    if machine in ARM:
        return weight.read_bytes(machine)
    # beside the scales of an integer product onnxruntime keeps a sum for each block
    scales = weight.name.endswith(".scales")
    return weight.num_bytes * (2 if scales else 1)


# --- what to do ----------------------------------------------------------------------------------


def shortage(needed: MemoryEstimate) -> MemoryLimit | None:
    """The room that is too small, if one is, with what this process holds already added to it."""
    of_this_model = {field.name for field in dataclasses.fields(needed)} - _OF_EVERY_PROCESS
    bare = dataclasses.replace(needed, **dict.fromkeys(of_this_model, 0))
    status = read_sizes(read_text(Path("/proc/self/status")))
    fields = {"resident": "RssAnon", "data": "VmData", "address_space": "VmSize"}
    for room in memory_limits():
        # what other models hold here is none of what this one needs
        held = min(status.get(fields[room.counts], 0), getattr(bare, room.counts))
        if getattr(needed, room.counts) > room.free + held:
            return dataclasses.replace(room, free=room.free + held)
    return None


def fitting(
    bundle: Bundle, graph: GraphSpec | None = None, texts: int = 1
) -> tuple[MemoryEstimate, MemoryLimit | None]:
    """How a bundle is run on this device: as fast as there is memory for.

    Args:
        bundle: opened.
        graph: to run; `None` is the one that greedy generation runs.
        texts: whose keys and values are held at once.

    Returns:
        What it then takes, and the room that is too small for even the least, if one is.

    Raises:
        BundleError: the graph cannot be read.
    """
    if float_prompts.preferred(bundle):
        with contextlib.suppress(BundleError):  # whoever runs the other graph will say it
            needed = estimate(bundle, graph, chunk=FLOAT_CHUNK, texts=texts, in_float=True)
            # read for every chunk, so they should stay where they are
            held = dataclasses.replace(needed, weights=needed.weights + needed.read_again)
            if shortage(held) is None:
                return needed, None
    needed, short = estimate(bundle, graph, texts=texts), None
    for chunk in CHUNKS:
        needed = dataclasses.replace(needed, chunk=chunk)
        short = shortage(needed)
        if short is None:
            break
    return needed, short


def check_fits(
    bundle: Bundle, graph: GraphSpec, texts: int = 1, force: bool = False
) -> tuple[int, bool]:
    """How to run prompts on this device.

    Args:
        bundle: opened.
        graph: to run.
        texts: whose keys and values are held at once.
        force: whether to run what seems not to fit.

    Returns:
        How many tokens to run at once, and whether in float32.

    Raises:
        TooLittleMemoryError: there is not enough memory for any number.
    """
    try:
        needed, short = fitting(bundle, graph, texts)
    except BundleError:
        return CHUNKS[0], False  # onnxruntime will say what is wrong with it
    if short is None or force:
        return needed.chunk, needed.in_float
    raise TooLittleMemoryError(
        f"{bundle.name} ({bundle.recipe}) needs about "
        f"{megabytes(getattr(needed, short.counts))} of memory, but only "
        f"{megabytes(short.free)} is available {short.bound}; close other programs, export "
        "with fewer bits, or try it anyway with --force"
    )


def is_short(path: str | os.PathLike[str]) -> bool:
    """Whether a bundle fits so barely, or not at all, that memory should not be spent on speed."""
    try:
        bundle = Bundle.open(path)
        return shortage(estimate(bundle, bundle.engine)) is not None
    except (EdgeError, OSError):
        return False  # the command itself will say what is wrong
