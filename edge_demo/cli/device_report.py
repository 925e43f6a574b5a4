"""Reports a device's hardware, the models that fit on it, and their expected speed."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from edge_demo.bundle.graph_weights import bytes_per_token
from edge_demo.bundle.manifest import ANY_TARGET, GraphSpec
from edge_demo.bundle.reader import Bundle
from edge_demo.device import hardware
from edge_demo.device.memory_limits import MemoryLimit, free_memory, memory_limits
from edge_demo.device.system_files import read_sizes, read_text
from edge_demo.engine import embedder_memory, memory
from edge_demo.engine.size_estimates import (
    RECIPES,
    SIZES,
    PublishedSize,
    RecipeBytes,
    estimate,
    read_per_token,
)
from edge_demo.unexpected import PACKAGES
from edge_demo.units import megabytes

# The share of "memory speed / bytes a token reads" that decoding reaches on two idle cores of a
# server: 0.47 with int4 and 0.54 with int8 of Gemma 3 270M, 0.62 with int4 of 2B's shape; on a busy
# one 0.2. See docs/lab-notes.md, and `benchmarks/edge.py`.
LIKELY_SHARE = (0.3, 0.6)

_PI_5 = "armv8.2"  # the target


def examine(bundles: Sequence[Bundle], root: Path = Path("/")) -> dict[str, Any]:
    """Collects everything known as one object; sizes in bytes, speeds per second.

    Args:
        bundles: to check; without any, the published model sizes are checked.
        root: the folder that contains `proc` and `sys`.
    """
    looked = hardware.look(root)
    room = memory_limits(root)
    free = free_memory(root)
    meminfo = read_sizes(read_text(root / "proc/meminfo"))
    speed = _memory_speed(looked.cores or 1, min((r.free for r in room), default=None))
    return {
        "device": dataclasses.asdict(looked),
        "runs_here": looked.bits == 64,
        "memory": {
            "total": meminfo.get("MemTotal") or _total(),
            "available": free,
            "bounds": [dataclasses.asdict(r) for r in room],
            "swap": meminfo.get("SwapTotal"),
            "swap_free": meminfo.get("SwapFree"),
            "read_bytes_per_s": speed,
        },
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in PACKAGES},
        "bundles": [_judge(bundle, speed, looked) for bundle in bundles],
        "sizes": [] if bundles else _judge_sizes(free, speed),
    }


def _memory_speed(threads: int, free: int | None) -> float | None:
    try:
        from edge_demo.device.throughput import memory_bytes_per_s
    except ImportError:  # no numpy on this device yet
        return None
    most = 256 << 20 if free is None else min(256 << 20, free // 4)
    try:
        return memory_bytes_per_s(threads, num_bytes=max(most, 1 << 20))
    except MemoryError:
        return None


def _judge_embedder(bundle: Bundle, looked: hardware.Device) -> dict[str, Any]:
    needed, short = embedder_memory.fitting(bundle)
    longest = embedder_memory.estimate(bundle, bundle.context_length)
    return {
        "path": str(bundle.path),
        "name": bundle.name,
        "recipe": bundle.recipe,
        "embeds": True,
        "needed": needed.resident if short is None else getattr(needed, short.counts),
        "peak": needed.peak,
        "tokens_at_once": needed.chunk,
        "needed_for_longest": longest.resident,
        "fits": short is None,
        "fits_for_longest": memory.shortage(longest) is None,
        "longest": bundle.context_length,
        "shortage": None if short is None else dataclasses.asdict(short),
        "disk": _disk(bundle),
        "advice": _advice(bundle, looked),
    }


def _judge(bundle: Bundle, speed: float | None, looked: hardware.Device) -> dict[str, Any]:
    if bundle.embedder is not None:
        return _judge_embedder(bundle, looked)
    graph = bundle.candidates or bundle.engine
    needed, peak, short = _memory(bundle, graph)
    whole, whole_peak, whole_short = _memory(bundle, bundle.engine)
    read = bytes_per_token(bundle.path / graph.file)
    return {
        "path": str(bundle.path),
        "name": bundle.name,
        "recipe": bundle.recipe,
        "needed": needed,
        "peak": peak,
        "needed_for_all_logits": whole,
        "peak_for_all_logits": whole_peak,
        "fits": short is None,
        "fits_for_all_logits": whole_short is None,
        "shortage": None if short is None else dataclasses.asdict(short),
        "longest_context": None if short else _longest_context(bundle),
        "bytes_per_token": read,
        # by rows x86 waits for its products, not for memory
        "tokens_per_s": None
        if bundle.embedding.by_rows and looked.machine == "x86_64"
        else _tokens_per_s(read, speed),
        "disk": _disk(bundle),
        "advice": _advice(bundle, looked),
    }


def _advice(bundle: Bundle, looked: hardware.Device) -> str | None:
    """What another export would improve on this processor, in a sentence."""
    dot_products = looked.dot_products
    if bundle.target == _PI_5 and (looked.machine != "aarch64" or looked.has_i8mm):
        return "this bundle is made for a Raspberry Pi 5; here, export without --target"
    if bundle.embedding.by_rows:
        if looked.machine == "x86_64":
            return (
                "this bundle is made for ARM boards without 8-bit dot products; on x86 it is many "
                "times slower than int8"
            )
        if not dot_products:
            return None
        better = "" if looked.has_i8mm else f" with --target {_PI_5}"
        return f"this processor has 8-bit dot products; int8{better} loses less here"
    if bundle.embedding.block_size and dot_products is False:
        return (
            "this processor has no 8-bit dot products and dequantizes these weights for every "
            "token; export int8 with --target armv8.0"
        )
    if bundle.embedder is not None:
        return None
    if dot_products and not looked.has_i8mm and bundle.target == ANY_TARGET and bundle.fused:
        return f"with --target {_PI_5} a token of context takes fewer instructions here"
    return None


def _memory(bundle: Bundle, graph: GraphSpec) -> tuple[int, int, MemoryLimit | None]:
    """What a graph takes, its peak with files, and the limit that is too small, if one is.

    Where one is, what that limit counts; else the least, with which prompts run as weights are
    stored.
    """
    needed, short = memory.fitting(bundle, graph)
    if short is not None:
        return getattr(needed, short.counts), needed.peak, short
    return memory.estimate(bundle, graph, chunk=needed.chunk).resident, needed.peak, None


def _longest_context(bundle: Bundle) -> int:
    """The longest context that fits, in tokens, to a sixteenth of the bundle's."""
    step = max(1, bundle.context_length // 16)
    for tokens in range(bundle.context_length, step, -step):
        chunk = memory.CHUNKS[-1]
        if memory.shortage(memory.estimate(bundle, context=tokens, chunk=chunk)) is None:
            return tokens
    return step


def _disk(bundle: Bundle) -> dict[str, Any] | None:
    try:
        from edge_demo.device.throughput import disk_speed
    except ImportError:
        return None
    speed = disk_speed(bundle.path / bundle.weights)
    return None if speed is None else dataclasses.asdict(speed)


def _judge_sizes(free: int | None, speed: float | None) -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        for name, recipe in RECIPES.items():
            needed = _needed(size, recipe, free)
            rows.append(
                {
                    "name": size.name,
                    "recipe": name,
                    "needed": needed,
                    "fits": None if free is None else needed <= free,
                    "tokens_per_s": _tokens_per_s(read_per_token(size, recipe), speed),
                }
            )
    return rows


def _needed(size: PublishedSize, recipe: RecipeBytes, free: int | None) -> int:
    """Returns the bytes it needs with the longest prompt chunk that fits, or with the shortest."""
    needed = [estimate(size, recipe, chunk).resident for chunk in memory.CHUNKS]
    return next((n for n in needed if free is None or n <= free), needed[-1])


def _tokens_per_s(read: int, speed: float | None) -> dict[str, Any] | None:
    """Returns decode speeds: the upper limit from memory speed, and the likely range."""
    if speed is None or not read:
        return None
    most = speed / read
    return {"most": most, "likely": [share * most for share in LIKELY_SHARE]}


def _total() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --- for people ----------------------------------------------------------------------------------


def describe(report: dict[str, Any]) -> str:
    """Returns a text from the result of `examine`."""
    looked, sizes = report["device"], report["memory"]
    names = [looked["board"], looked["processor"]]
    title = ", ".join(name for name in names if name) or "unknown processor"
    cores = "unknown" if looked["cores"] is None else str(looked["cores"])
    lines = [
        title,
        f"  system        {looked['system']} {looked['machine']}, {looked['bits']}-bit",
        f"  cores         {cores}",
        f"  instructions  {_instructions(looked)}",
        f"  memory        {_size(sizes['total'])}, {_size(sizes['available'])} available",
    ]
    for bound in sizes["bounds"][1:]:
        lines.append(f"                {megabytes(bound['free'])} {bound['bound']}")
    lines += [
        f"  swap          {_swap(sizes)}",
        f"  pages         {_pages(looked)}",
        f"  memory reads  {_speed(sizes['read_bytes_per_s'])}",
        f"  temperature   {_celsius(looked['celsius'])}",
        f"  throttling    {looked['throttled'] or 'unknown'}",
        f"  software      {_versions(report['versions'])}",
    ]
    if not report["runs_here"]:
        lines.append(
            "This is a 32-bit system (or Python): onnxruntime exists for 64 bits only. Install a "
            "64-bit system."
        )
        return "\n".join(lines)
    for bundle in report["bundles"]:
        lines += ["", *_bundle_lines(bundle)]
    if report["sizes"]:
        lines += [
            "",
            "Models that fit, with decode speed in tokens/s: upper limit from memory speed "
            "(likely range)",
        ]
        lines += [_size_line(size) for size in report["sizes"]]
    return "\n".join(lines)


def _instructions(looked: dict[str, Any]) -> str:
    if not looked["instructions"] and not looked["missing"]:
        return "unknown"
    has = ", ".join(looked["instructions"]) or "none that speeds up inference"
    return has + (f"; not {', '.join(looked['missing'])}" if looked["missing"] else "")


def _versions(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())


def _swap(sizes: dict[str, Any]) -> str:
    if sizes["swap"] is None:
        return "unknown"
    if not sizes["swap"]:
        return "none"
    return f"{megabytes(sizes['swap'])}, {_size(sizes['swap_free'])} free (slow: not counted)"


def _pages(looked: dict[str, Any]) -> str:
    size = f"{looked['page_bytes'] // 1024} KiB" if looked["page_bytes"] else "unknown"
    return f"{size}; huge pages: {looked['huge_pages'] or 'unknown'}"


def _size(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else megabytes(num_bytes)


def _speed(bytes_per_s: float | None) -> str:
    return "unknown" if bytes_per_s is None else f"{bytes_per_s / 1e9:.1f} GB/s"


def _celsius(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f} °C"


def _expected(speed: dict[str, Any] | None) -> str:
    if speed is None:
        return "unknown"
    least, most = speed["likely"]
    return f"at most {_figure(speed['most'])} tokens/s, {_figure(least)} to {_figure(most)} likely"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _embedder_lines(bundle: dict[str, Any]) -> list[str]:
    fits = (
        f"fits: takes {megabytes(bundle['needed'])} for {bundle['tokens_at_once']:,} tokens at "
        f"once, up to {megabytes(bundle['peak'])} with files"
    )
    if not bundle["fits"]:
        fits = _does_not_fit(bundle)
    longest = f"a text of {bundle['longest']:,} tokens takes "
    longest += megabytes(bundle["needed_for_longest"])
    if bundle["fits"] and not bundle["fits_for_longest"]:
        longest += ", which does not fit"
    return [
        f"{bundle['path']}: {bundle['name']} {bundle['recipe']}, an embedder",
        f"  memory        {fits}",
        f"                {longest}",
        *_last_lines(bundle),
    ]


def _does_not_fit(bundle: dict[str, Any]) -> str:
    short = bundle["shortage"]
    return (
        f"does not fit: takes {megabytes(bundle['needed'])}, {megabytes(short['free'])} is "
        f"available {short['bound']}"
    )


def _last_lines(bundle: dict[str, Any]) -> list[str]:
    """How fast its file is read, and advice."""
    disk = bundle["disk"]
    read = "unknown"
    if disk:
        kept = "" if disk["direct"] else " (perhaps from memory)"
        read = f"{megabytes(disk['bytes_per_s'])}/s{kept}"
    advice = [f"  advice        {bundle['advice']}"] if bundle["advice"] else []
    return [f"  disk          {read}", *advice]


def _bundle_lines(bundle: dict[str, Any]) -> list[str]:
    if bundle.get("embeds"):
        return _embedder_lines(bundle)
    if bundle["fits"]:
        fits = (
            f"fits: takes {megabytes(bundle['needed'])}, up to {megabytes(bundle['peak'])} with "
            f"files; room for {bundle['longest_context']:,} tokens"
        )
    else:
        fits = _does_not_fit(bundle)
    whole = f"sampling without --top-k takes {megabytes(bundle['needed_for_all_logits'])}"
    if bundle["fits_for_all_logits"]:
        whole += f", up to {megabytes(bundle['peak_for_all_logits'])} with files"
    elif bundle["fits"]:
        whole += ", which does not fit"
    return [
        f"{bundle['path']}: {bundle['name']} {bundle['recipe']}",
        f"  memory        {fits}",
        f"                {whole}",
        f"  decode        {_expected(bundle['tokens_per_s'])}, "
        f"{megabytes(bundle['bytes_per_token'])} read for each",
        *_last_lines(bundle),
    ]


def _size_line(size: dict[str, Any]) -> str:
    fits = {True: "fits", False: "does not fit", None: "unknown"}[size["fits"]]
    speed = size["tokens_per_s"]
    speeds = ""
    if speed and size["fits"] is not False:
        least, most = speed["likely"]
        speeds = f"  {_figure(speed['most']):>5}  ({_figure(least)} to {_figure(most)})"
    return (
        f"  {size['name']:<13} {size['recipe']}  {megabytes(size['needed']):>8}  {fits:<12}{speeds}"
    )
