"""The log of a guard's decisions: JSON lines, without texts unless they are wanted.

A line has no hash of the text either: who has the log could try texts until one has the hash.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_demo.errors import RequestError, sentence


class DecisionLog:
    """Adds a line to a file for each decision. The file has the mode 0600.

    Args:
        path: of the file, which is made if there is none.
        with_text: whether lines have the texts that were judged.

    Attributes:
        failures: lines that could not be written.

    Raises:
        RequestError: the file cannot be written.
    """

    def __init__(self, path: str | Path, with_text: bool = False) -> None:
        self.failures = 0
        self._with_text = with_text
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise RequestError(f"the log cannot be written: {sentence(error)}") from None

    def write(
        self,
        request: str,
        place: str,
        probabilities: Mapping[str, float],
        violated: Sequence[str],
        prompt: str,
        response: str | None,
    ) -> None:
        """Add a decision; where the disk is full or gone, an error is logged and the work goes on.

        Args:
            request: its id.
            place: `input` or `output`.
            probabilities: by the name of the policy.
            violated: names of policies.
            prompt, response: the texts.
        """
        line: dict[str, object] = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "request": request,
            "on": place,
            "decision": "refused" if violated else "passed",
            "violated": list(violated),
            "probabilities": {name: round(p, 6) for name, p in probabilities.items()},
        }
        if self._with_text:
            line |= {"prompt": prompt, "response": response}
        # lone surrogates are escaped, so that every line is UTF-8
        data = json.dumps(line, ensure_ascii=True).encode() + b"\n"
        try:
            written = os.write(self._file, data)  # at once: two processes may share the file
            if written < len(data):
                raise OSError("the disk is full")
        except OSError as error:
            self.failures += 1
            if self.failures == 1:
                logging.getLogger(__name__).error(
                    "edge-demo: the guard's log cannot be written: %s", sentence(error)
                )

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
