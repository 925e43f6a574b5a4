"""Describes the contents of a bundle as text."""

from __future__ import annotations

import collections
from typing import Any

from edge_demo.bundle.manifest import ANY_TARGET, MANIFEST
from edge_demo.bundle.reader import Bundle
from edge_demo.errors import BundleError
from edge_demo.units import megabytes


def describe(bundle: Bundle, *, verified: bool) -> str:
    """Returns a text about the bundle.

    Args:
        bundle: opened.
        verified: whether its files were compared with their hashes.

    Raises:
        BundleError: an informational entry of the manifest is missing or not valid.
    """
    try:
        return _page(bundle, verified)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            f"{bundle.path / MANIFEST} is damaged: {type(error).__name__} {error}"
        ) from error


def _page(bundle: Bundle, verified: bool) -> str:
    manifest = bundle.manifest
    model, quality = manifest["model"], manifest.get("quality")
    formats = collections.Counter(_format(entry) for entry in manifest["plan"].values())
    kind = "instruction-tuned" if bundle.tokenizer.chat else "base"
    if bundle.embedder is not None:
        kind = "embedder"
    lines = [
        f"{bundle.name}  ({kind}, {model['parameters']:,} parameters)",
        f"  recipe      {bundle.recipe}: "
        + ", ".join(f"{n} tensors {name}" for name, n in formats.most_common())
        + (f"; for --target {bundle.target}" if bundle.target != ANY_TARGET else ""),
        *_use(bundle),
        f"  source      {_provenance(manifest.get('provenance', {}))}",
        f"  licence     {manifest['license']['name']}, see {manifest['license']['notice']}",
    ]
    if quality:
        lines.append(f"  quality     {_quality(quality, bundle.embedder is not None)}")
        lines.append(f"              {quality['against']}, {quality['tokens']} tokens")
    else:
        lines.append("  quality     not measured")
    state = "SHA-256 checked" if verified else "sizes checked; --verify compares SHA-256"
    lines.append(f"  files       {megabytes(bundle.num_bytes)} in all ({state})")
    lines += [f"    {name:<24} {size:>14,}" for name, (size, _) in bundle.files.items()]
    return "\n".join(lines)


def _use(bundle: Bundle) -> list[str]:
    """How long a text may be, and what is kept or made of it."""
    if bundle.embedder is None:
        return [f"  context     {bundle.context_length:,} tokens, {_kept(bundle)}"]
    names = ", ".join(sorted(bundle.embedder.prompts)) or "none"
    return [
        f"  texts       up to {bundle.context_length:,} tokens, a vector of "
        f"{bundle.embedder.dimensions:,} numbers for each",
        f"  prompts     {names}",
    ]


def _quality(quality: dict[str, Any], embeds: bool) -> str:
    if embeds:
        return (
            f"cosine to the reference at least {quality['least_cosine']:.6f}, in the mean "
            f"{quality['mean_cosine']:.6f}"
        )
    return (
        f"mean KL {quality['mean_kl']:.2g}, same top token {quality['same_top_token']:.1%}, "
        f"greatest logit difference {quality['max_logit_difference']:.2g}"
    )


def _kept(bundle: Bundle) -> str:
    keys = [s for s in bundle.engine.inputs if s.name.endswith(".key")]
    windowed = sum(s.shape[2] != "capacity" for s in keys)
    integers = sum(s.dtype == "int8" for s in keys)
    parts = ["keys and values in float32"]
    if integers:
        parts.append(f"int8 in {integers} layers")
    if windowed:
        parts.append(f"sliding window in {windowed} layers")
    return ", ".join(parts)


def _format(entry: dict[str, Any]) -> str:
    if entry.get("terms"):
        return f"int{entry['bits']} by rows"
    return f"int{entry['bits']} block {entry['block_size']}" if entry["block_size"] else "float32"


def _provenance(entry: dict[str, Any]) -> str:
    return " ".join(str(entry[key]) for key in ("format", "file") if key in entry) or "unknown"
