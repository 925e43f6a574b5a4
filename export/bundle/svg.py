"""Draws a bar chart as SVG; one chart does not justify a plotting library."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

_ROW, _BAR, _LABEL, _WIDTH, _TOP = 20, 14, 200, 760, 40  # pixels
_VALUE = 80


def bar_chart(values: Mapping[str, float], title: str) -> str:
    """Draws a labelled horizontal bar for each value, in the given order.

    Args:
        values: label to value, not negative, at least one.
        title: above the bars; says the unit.

    Returns:
        An SVG document; it is readable on light and dark pages, since it has its own ground.
    """
    most = max(values.values()) or 1.0
    height = _TOP + _ROW * len(values) + 10
    room = _WIDTH - _LABEL - _VALUE
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="24" font-size="14" fill="#202124">{escape(title)}</text>',
    ]
    for row, (label, value) in enumerate(values.items()):
        top = _TOP + _ROW * row
        base = top + _BAR - 3
        length = room * max(value, 0.0) / most
        lines += [
            f'<text x="{_LABEL - 8}" y="{base}" text-anchor="end" fill="#202124">'
            f"{escape(label)}</text>",
            f'<rect x="{_LABEL}" y="{top}" width="{length:.1f}" height="{_BAR}" fill="#1a73e8"/>',
            f'<text x="{_LABEL + length + 6:.1f}" y="{base}" fill="#5f6368">{value:.3g}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"
