"""What is assumed of known boards, to say how fast a bundle can be there at most."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Board:
    """A board.

    Attributes:
        name: as the board's own name begins.
        cores: of its processor.
        hertz: clock of a core.
        instructions_per_cycle: assumed of a core, in products of integers.
        bytes_per_s: assumed of memory, read by all cores.
        dot_products: whether the processor has 8-bit dot products.
    """

    name: str
    cores: int
    hertz: float
    instructions_per_cycle: float
    bytes_per_s: float
    dot_products: bool

    @property
    def instructions_per_s(self) -> float:
        """Of all cores."""
        return self.cores * self.hertz * self.instructions_per_cycle

    def __str__(self) -> str:
        return (
            f"{self.name}: assumed {self.cores} cores of {self.hertz / 1e9:.1f} GHz, "
            f"{self.instructions_per_cycle:g} instructions a cycle, "
            f"{self.bytes_per_s / 1e9:.1f} GB/s"
        )


# Clocks are the makers'. The other two are assumptions, to be replaced by what boards report.
BOARDS = (
    Board("Raspberry Pi 3", 4, 1.2e9, 0.8, 2.0e9, False),
    Board("Raspberry Pi 4", 4, 1.5e9, 1.0, 4.0e9, False),
    Board("Raspberry Pi 5", 4, 2.4e9, 2.0, 9.5e9, True),
)


def board_named(name: str | None) -> Board | None:
    """The board of a name such as `Raspberry Pi 5 Model B Rev 1.0`."""
    return next((board for board in BOARDS if (name or "").startswith(board.name)), None)
