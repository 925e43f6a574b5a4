"""How much memory a bundle takes, how much there is, and what to do where that is little.

onnxruntime maps the weights file and copies what matrix products read, rearranged for this
processor, to memory of its own. The copies, the keys and values and the activations are there for
good ("anonymous"); mapped pages of files can be dropped and read again, so they are no reason to
refuse.

The constants are fitted to the sample on x86-64; `tests/edge_demo/test_memory.py` holds the
estimate against what a run takes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from edge_demo.bundle import Bundle, GraphSpec
from edge_demo.cache_size import cache_bytes
from edge_demo.errors import BundleError, EdgeError
from edge_demo.graph_weights import StoredWeight, stored_weights
from edge_demo.terminal import megabytes

FORCE = "EDGE_DEMO_FORCE"  # set to anything: load even what seems not to fit
CHUNKS = (512, 256, 128, 64)  # tokens of a prompt run at once: as many as there is memory for
_CONTEXT = 1024  # tokens that must fit, or all of a shorter context

_MB = 10**6
_PROCESS = 26 * _MB  # Python, numpy, onnxruntime
_LIBRARIES = 55 * _MB  # their code, mapped
_WORKING_SET = 64 * _MB  # of files, what cannot be missed for long: their code, rows of tables
_SESSION = 10 * _MB
_TOKENIZER = 9  # times the SentencePiece file
_ACTIVATIONS = 7.5  # arrays of the widest product, for each token of a chunk
_THREAD = 16 * _MB  # stacks of onnxruntime's and numpy's threads: data, most of it never touched
_DATA = 98 * _MB
_LOADING = 138 * _MB
_ADDRESSES = 140 * _MB


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes that running a graph takes.

    Attributes:
        process: Python and its libraries, the session and the tokenizer.
        weights: the copies that products read, as onnxruntime keeps them.
        cache: keys, values and rotary tables for the context.
        activations: of one chunk of the prompt, and logits.
        lookups: tables of which rows are read, mapped from the weights file.
        mapped: what is mapped while it loads: these, and what few-bit products are copied from.
        context: tokens the cache is for.
        chunk: tokens run at once.
    """

    process: int
    weights: int
    cache: int
    activations: int
    lookups: int
    mapped: int
    context: int
    chunk: int

    @property
    def anonymous(self) -> int:
        """What cannot be given back while it runs."""
        return self.process + self.weights + self.cache + self.activations

    @property
    def peak(self) -> int:
        """The most that is resident where memory is plenty: mapped files too."""
        return self.anonymous + _LIBRARIES + self.lookups

    @property
    def resident(self) -> int:
        """What has to be there: below this a device swaps, or ends the process."""
        return self.anonymous + min(_WORKING_SET, _LIBRARIES + self.lookups)

    @property
    def data(self) -> int:
        """What `RLIMIT_DATA` counts: mapped weights and untouched stacks too."""
        loading = self.process + self.weights + self.mapped + _LOADING
        return max(loading, self.anonymous + self.lookups + _DATA) + _THREAD * (os.cpu_count() or 1)

    @property
    def address_space(self) -> int:
        """What `RLIMIT_AS` counts."""
        return self.data + _ADDRESSES


def estimate(
    bundle: Bundle,
    graph: GraphSpec | None = None,
    context: int = _CONTEXT,
    chunk: int = CHUNKS[0],
    logit_rows: int = 1,
) -> Estimate:
    """What running a bundle takes.

    Args:
        bundle: opened.
        graph: to run; `None` is the one that greedy generation runs.
        context: tokens held, at most; no more than the bundle's context counts.
        chunk: tokens of a prompt run at once.
        logit_rows: positions whose logits are wanted at once.

    Raises:
        BundleError: the graph cannot be read.
    """
    graph = graph or bundle.candidates or bundle.engine
    context = min(context, bundle.context_length)
    weights = stored_weights(bundle.path / graph.file)
    read = {w.offset: w for w in weights if w.multiplied}.values()
    body = [w for w in read if bundle.vocabulary_size not in w.shape]
    widest = max((max(w.shape) for w in body if w.shape), default=0)
    tokenizer = bundle.files[bundle.tokenizer.file][0]
    return Estimate(
        process=_PROCESS + _SESSION + _TOKENIZER * tokenizer,
        weights=sum(map(_copied, read)),
        cache=cache_bytes(graph, bundle.ropes, bundle.windows, bundle.context_length, context),
        activations=int(min(chunk, context) * 4 * widest * _ACTIVATIONS)
        + 8 * logit_rows * bundle.vocabulary_size,
        lookups=_once(w for w in weights if w.looked_up),
        mapped=_once(w for w in weights if w.looked_up or "MatMulNBits" in w.used_by),
        context=context,
        chunk=chunk,
    )


def _once(weights: Iterable[StoredWeight]) -> int:
    """Bytes of weights, a place that two of them share counted once."""
    return sum({w.offset: w.num_bytes for w in weights}.values())


def _copied(weight: StoredWeight) -> int:
    # beside the scales of an integer product onnxruntime keeps a sum for each block
    scales = weight.name.endswith(".scales")
    return weight.num_bytes * (2 if scales else 1)


# --- what there is -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Room:
    """Memory that this process may still take, by one of the things that bound it.

    Attributes:
        bound: what bounds it, for people.
        counts: the property of `Estimate` that it is compared with.
        free: bytes.
    """

    bound: str
    counts: str
    free: int


def rooms(root: Path = Path("/")) -> list[Room]:
    """All that bounds this process's memory here, as far as it is known.

    Args:
        root: where `proc` and `sys` lie.
    """
    found = []
    meminfo = read_sizes(_text(root / "proc/meminfo"))
    if "MemAvailable" in meminfo:
        found.append(Room("of the device", "resident", meminfo["MemAvailable"]))
    groups = [free for free in control_group_rooms(root) if free is not None]
    if groups:
        found.append(Room("in its control group", "resident", min(groups)))
    status = read_sizes(_text(root / "proc/self/status"))
    for name, field, counts in (
        ("RLIMIT_DATA", "VmData", "data"),
        ("RLIMIT_AS", "VmSize", "address_space"),
    ):
        limit = _resource_limit(name)
        if limit is not None:
            found.append(Room(f"under {name}", counts, max(0, limit - status.get(field, 0))))
    return found


def read_sizes(text: str) -> dict[str, int]:
    """The fields of `/proc/meminfo` or `/proc/self/status` that are sizes, in bytes."""
    sizes = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            sizes[name] = int(words[0]) * 1024
    return sizes


def control_group_rooms(root: Path = Path("/")) -> Iterator[int | None]:
    """Bytes free in each control group this process is in, the outer ones too; `None` is no limit.

    What the group holds of files can be dropped, so it counts as free.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        if not controllers:
            bases, names = ("sys/fs/cgroup", "sys/fs/cgroup/unified"), _VERSION_2
        elif "memory" in controllers.split(","):
            bases, names = ("sys/fs/cgroup/memory",), _VERSION_1
        else:
            continue
        for base in bases:
            top = root / base
            group = top / path.lstrip("/")
            while True:
                yield _group_room(group, *names)
                if group == top or top not in group.parents:
                    break
                group = group.parent


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = ("memory.max", "memory.current", "")


def _group_room(group: Path, limit_name: str, usage_name: str, prefix: str) -> int | None:
    limit, usage = _text(group / limit_name).strip(), _text(group / usage_name).strip()
    if not limit.isdigit() or not usage.isdigit() or int(limit) >= 1 << 60:
        return None
    stat = dict(
        line.split() for line in _text(group / "memory.stat").splitlines() if line.count(" ") == 1
    )
    files = sum(int(stat.get(f"{prefix}{name}_file", "0")) for name in ("inactive", "active"))
    return max(0, int(limit) - max(0, int(usage) - files))


def _resource_limit(name: str) -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(getattr(resource, name))[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# --- what to do ----------------------------------------------------------------------------------


def shortage(needed: Estimate) -> Room | None:
    """The room that is too small, if one is, with what this process holds already added to it."""
    bare = dataclasses.replace(needed, weights=0, cache=0, activations=0, lookups=0, mapped=0)
    status = read_sizes(_text(Path("/proc/self/status")))
    fields = {"resident": "RssAnon", "data": "VmData", "address_space": "VmSize"}
    for room in rooms():
        # what other models hold here is none of what this one needs
        held = min(status.get(fields[room.counts], 0), getattr(bare, room.counts))
        if getattr(needed, room.counts) > room.free + held:
            return dataclasses.replace(room, free=room.free + held)
    return None


def admit(bundle: Bundle, graph: GraphSpec) -> int:
    """How many tokens of a prompt to run at once on this device.

    Raises:
        EdgeError: there is not enough memory for any number, and the environment does not have
            `EDGE_DEMO_FORCE`.
    """
    try:
        choices = [estimate(bundle, graph, chunk=chunk) for chunk in CHUNKS]
    except BundleError:
        return CHUNKS[0]  # onnxruntime will say what is wrong with it
    needed, short = choices[0], shortage(choices[0])
    for needed in choices:
        short = shortage(needed)
        if short is None:
            return needed.chunk
    if os.environ.get(FORCE):
        return CHUNKS[-1]
    assert short is not None
    raise EdgeError(
        f"{bundle.name} ({bundle.recipe}) takes about {megabytes(getattr(needed, short.counts))} "
        f"of memory, and {megabytes(short.free)} can be had {short.bound}; close other programs, "
        "export with fewer bits, or try it nevertheless with --force"
    )


def is_short(path: str | os.PathLike[str]) -> bool:
    """Whether a bundle fits so barely, or not at all, that memory should not be spent on speed."""
    if sys.platform != "linux":
        return False
    try:
        bundle = Bundle.open(path)
        return shortage(estimate(bundle, bundle.engine)) is not None
    except (EdgeError, OSError):
        return False  # the command itself will say what is wrong
