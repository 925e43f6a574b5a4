"""The bundles of the real Gemma 3 270M for emulated boards, which the Makefile makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tools.arm64.user_space import Processor, SetupError


@dataclasses.dataclass(frozen=True)
class BoardBundle:
    """A bundle, and the boards that it is for.

    Attributes:
        folder: its name in the folder of builds.
        recipe: for people.
        most_kl: mean divergence that two processors' rounding explains, in nats.
        exact: whether a clear choice of a token is the same on each processor.
        dot_products: what a processor must have or lack; `None` where it does not matter.
    """

    folder: str
    recipe: str
    most_kl: float
    exact: bool = True
    dot_products: bool | None = None

    def suits(self, processor: Processor) -> bool:
        """Whether it is run there."""
        return self.dot_products in (None, processor.dot_product)


# Divergences: of float32, of activations in 8 bits, and of those with weights whose own rounding
# costs 0.03, which leaves no margin for the same tokens.
BUNDLES = (
    BoardBundle("sample-fp32", "fp32", 1e-6),
    BoardBundle("sample-int4", "int4", 0.015, exact=False),
    BoardBundle("sample-int8", "int8", 0.003),
    BoardBundle("armv8.2-int4", "int4 for armv8.2", 0.015, exact=False, dot_products=True),
    BoardBundle("armv8.2-int8", "int8 for armv8.2", 0.003, dot_products=True),
    BoardBundle("armv8.0-int8", "int8 for armv8.0", 0.003, dot_products=False),
)


def check_made(folder: Path, target: str, bundles: tuple[BoardBundle, ...] = BUNDLES) -> None:
    """Refuse a folder in which a bundle is missing.

    Raises:
        SetupError: one is; it says which `make` target makes it.
    """
    for bundle in bundles:
        if not (folder / bundle.folder / "bundle.json").exists():
            raise SetupError(f"{folder} holds no {bundle.folder}; make {target} makes it")
