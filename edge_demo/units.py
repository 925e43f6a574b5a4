"""Formats numbers for people."""

from __future__ import annotations


def megabytes(num_bytes: int) -> str:
    """Formats a size in decimal units."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
