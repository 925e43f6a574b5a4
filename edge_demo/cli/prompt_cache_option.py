"""Implements `--prompt-cache FILE` for `generate` and `chat`.

The answer is the same with and without the file. So a problem with the file prints a warning on
stderr, and the command continues.
"""

from __future__ import annotations

import time
from typing import Any

from edge_demo.cli.terminal import note
from edge_demo.engine.runner import TokenRunner
from edge_demo.errors import RequestError
from edge_demo.text.generator import Completion
from edge_demo.text.prompt_cache import CacheError, PromptCache


class PromptCacheOption:
    """The value of the option; also represents an option that was not given.

    Args:
        path: of the file; `None` for no prompt cache.
        read_only: whether the file is only read.

    Attributes:
        report: what happened, for programs; `None` without a prompt cache.

    Raises:
        RequestError: the path is not valid for a prompt cache, or `read_only` is set without a
            path.
    """

    def __init__(self, path: str | None, read_only: bool) -> None:
        if path is None and read_only:
            raise RequestError("--prompt-cache-ro needs --prompt-cache FILE; add it")
        self._cache = None if path is None else PromptCache(path, read_only)
        self._warning: str | None = None
        self.report: dict[str, Any] | None = None

    def load(self, engine: TokenRunner) -> None:
        """Load the file into the engine, if it can be used."""
        if self._cache is None:
            return
        start = time.perf_counter()
        loaded = 0
        without = "the prompt is run without the cache"
        try:
            loaded = self._cache.load(engine)
            if self._cache.read_only and not loaded:
                note(f"the prompt cache {self._cache.path} does not exist; {without}")
        except CacheError as error:
            note(f"{error}; {without if self._cache.read_only else 'the file is recreated'}")
        load_s = time.perf_counter() - start
        self.report = {"loaded_tokens": loaded, "load_s": load_s, "saved": False}

    def save(self, engine: TokenRunner) -> None:
        """Write the engine's keys and values to the file; an error is stored for `tell`."""
        if self._cache is None or self._cache.read_only:
            return
        try:
            self._cache.save(engine)
        except CacheError as error:
            self._warning = f"{error}; this does not change the answer"
            return
        if self.report is not None:
            self.report["saved"] = True

    def tell(self) -> None:
        """Print the stored error, after the answer has ended."""
        if self._warning is not None:
            note(self._warning)
            self._warning = None

    def save_prompt(self, engine: TokenRunner, completion: Completion) -> None:
        """Write the prompt except its last token, unless the file already has all of it."""
        if completion.reused_tokens < len(engine.tokens):
            self.save(engine)
