"""Draw `docs/images/quality.svg` from the tables of `docs/benchmarks.md`.

    python -m tools.quality_plot

Standard library only: the picture has six points.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "images" / "quality.svg"

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 740, 46, 340  # of the plot within the picture
SPEED = (40, 90)  # what the axes show
KL = (5e-4, 1.0)
OURS, THEIRS = "#1a73e8", "#8a6d3b"


class Point(NamedTuple):
    """A bundle or an engine: mean KL divergence in nats, decode speed in tokens a second."""

    name: str
    kl: float
    speed: float

    @property
    def ours(self) -> bool:
        """Whether it is a recipe of `export-onnx`."""
        return self.name.startswith("int")


def points(markdown: str) -> list[Point]:
    """What has both figures: a bundle or an engine of the tables of quality and of speed."""
    kl, speed = table(markdown, "mean KL"), table(markdown, "decode, tokens/s")
    return [
        Point(name, float(row["mean KL"]), float(speed[name]["decode, tokens/s"]))
        for name, row in kl.items()
        if name in speed
    ]


def table(markdown: str, heading: str) -> dict[str, dict[str, str]]:
    """The first table with that column: a row's name, without a bundle's size, to its cells."""
    lines = map(_cells, markdown.splitlines())
    titles = next(cells for cells in lines if heading in cells)
    next(lines)  # the rule
    rows = (dict(zip(titles, cells, strict=True)) for cells in itertools.takewhile(bool, lines))
    return {re.sub(r", \d+ MB$", "", row[titles[0]]): row for row in rows}


def _cells(line: str) -> list[str]:
    """Of a row, without marks of code, emphasis and options; empty for another line."""
    row = re.sub(r"[`*]|--recipe ", "", line).strip("|").split("|")
    return [cell.strip() for cell in row] if line.startswith("|") else []


def draw(rows: list[Point]) -> str:
    """An SVG picture, by itself on a white ground."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="13" fill="#333">',
        "<title>Mean KL divergence against decode speed</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>',
        f'<text x="{LEFT}" y="26" font-size="15">Gemma 3 270M: loss against speed. '
        "Lower right is better.</text>",
        *_axes(),
        *(_point(row) for row in rows),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _x(speed: float) -> float:
    share = (speed - SPEED[0]) / (SPEED[1] - SPEED[0])
    return round(LEFT + share * (RIGHT - LEFT), 1)


def _y(kl: float) -> float:
    share = math.log(kl / KL[0]) / math.log(KL[1] / KL[0])
    return round(BOTTOM - share * (BOTTOM - TOP), 1)


def _axes() -> list[str]:
    lines = [f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" stroke="#999" fill="none"/>']
    for kl in (0.001, 0.01, 0.1, 1):
        lines.append(f'<path d="M{LEFT} {_y(kl)}H{RIGHT}" stroke="#e4e4e4"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{_y(kl) + 4}" text-anchor="end">{kl:g}</text>')
    for speed in range(SPEED[0], SPEED[1] + 1, 10):
        x = _x(speed)
        lines.append(f'<text x="{x}" y="{BOTTOM + 20}" text-anchor="middle">{speed}</text>')
    middle = (LEFT + RIGHT) / 2
    lines.append(
        f'<text x="{middle}" y="{BOTTOM + 44}" text-anchor="middle">decode speed, tokens/s, 2 '
        "threads of an AMD EPYC</text>"
    )
    lines.append(
        f'<text transform="translate(18 {(TOP + BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        "mean KL divergence, nats (log)</text>"
    )
    return lines


def _point(row: Point) -> str:
    x, y, color = _x(row.speed), _y(row.kl), OURS if row.ours else THEIRS
    weight = ' font-weight="bold"' if row.ours else ""
    return (
        f'<circle cx="{x}" cy="{y}" r="5" fill="{color}"/>'
        f'<text x="{x + 9}" y="{y + 4}" fill="{color}"{weight}>{escape(row.name)}</text>'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(points(DATA.read_text())))
    print(f"wrote {PICTURE}")
