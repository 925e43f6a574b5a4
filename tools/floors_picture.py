"""Draw `docs/images/floors.svg` from the floors of `tests/test_architecture.py`.

python -m tools.floors_picture
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "floors.svg"

_COLUMN, _GAP, _LINE, _PAD = 280, 16, 17, 8
_TOP, _BASE = 64, 40  # above and below the columns
_COLORS = {
    "gemma_keras": ("#e8f0fe", "#1a73e8"),
    "export": ("#fef3e0", "#e37400"),
    "edge_demo": ("#e6f4ea", "#188038"),
}
Floors = tuple[tuple[str, ...], ...]


def draw(floors: dict[str, Floors]) -> str:
    """An SVG picture: a column for each package, its lowest floor at the bottom."""
    tallest = max(sum(_height(floor) for floor in floors[name]) for name in _COLORS)
    width = len(_COLORS) * (_COLUMN + _GAP) + _GAP
    height = _TOP + tallest + _BASE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="monospace" font-size="13" fill="#222">',
        "<title>The floors of the three packages</title>",
        f'<rect width="{width}" height="{height}" rx="10" fill="#fff"/>',
        f'<text x="{_GAP}" y="26" font-family="sans-serif" font-size="14">A file imports its own '
        "wing and the floors below it.</text>",
    ]
    for column, name in enumerate(_COLORS):
        x = _GAP + column * (_COLUMN + _GAP)
        parts.append(
            f'<text x="{x + _COLUMN / 2}" y="{_TOP - 12}" text-anchor="middle" '
            f'font-weight="bold">{name}</text>'
        )
        parts += _column(floors[name], name, x, _TOP + tallest)
    parts.append(
        f'<text x="{_GAP}" y="{height - 14}" font-family="sans-serif">export also imports '
        "gemma_keras and parts of edge_demo; those two import neither export nor each other."
        "</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _height(floor: tuple[str, ...]) -> int:
    return len(floor) * _LINE + 2 * _PAD


def _column(floors: Floors, package: str, x: int, bottom: int) -> list[str]:
    fill, edge = _COLORS[package]
    parts = []
    for floor in floors:
        bottom -= _height(floor)
        parts.append(
            f'<rect x="{x}" y="{bottom + 2}" width="{_COLUMN}" height="{_height(floor) - 4}" '
            f'rx="6" fill="{fill}" stroke="{edge}"/>'
        )
        for line, wing in enumerate(floor):
            label = wing.removeprefix(f"{package}.") if wing != package else "__init__"
            y = bottom + _PAD + line * _LINE + 13
            parts.append(f'<text x="{x + 12}" y="{y}">{escape(label)}</text>')
    return parts


if __name__ == "__main__":
    from tests.test_architecture import FLOORS

    PICTURE.write_text(draw(FLOORS))
    print(f"wrote {PICTURE}")
