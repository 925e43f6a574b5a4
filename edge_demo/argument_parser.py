"""Defines the argument parser of the commands, which reports an error in one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from edge_demo.errors import brief


class ArgumentParser(argparse.ArgumentParser):
    """Reports what is wrong in one line, without the usage, and names the help that explains it.

    Attributes:
        goes_on: name of a positional argument of any number of values, the last one, whose values
            may stand after options too; `None` for none.
    """

    goes_on: str | None = None

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {brief(message)}; see {self.prog} --help\n")

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """As `argparse` does, but what a command does not know is that command's own error."""
        found, unknown = super().parse_known_args(*arguments, **options)
        if self.goes_on is not None and not any(value.startswith("-") for value in unknown):
            getattr(found, self.goes_on).extend(unknown)
            unknown = []
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown
