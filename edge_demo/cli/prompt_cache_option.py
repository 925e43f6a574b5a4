"""`--prompt-cache FILE` as `generate` and `chat` understand it.

A command's answer is right with the file or without it. So what is wrong with it is told in a
sentence on stderr, and the answer goes on.
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
    """The option's value, or that it was not given.

    Args:
        path: of the file; `None` for no prompt cache.
        read_only: whether the file is only read.

    Attributes:
        report: what happened, for programs; `None` without a prompt cache.

    Raises:
        RequestError: the path cannot be one of a prompt cache, or there is none to be read only.
    """

    def __init__(self, path: str | None, read_only: bool) -> None:
        if path is None and read_only:
            raise RequestError("--prompt-cache-ro needs --prompt-cache FILE; add it")
        self._cache = None if path is None else PromptCache(path, read_only)
        self._untold: str | None = None
        self.report: dict[str, Any] | None = None

    def load(self, engine: TokenRunner) -> None:
        """Have the engine hold what the file holds, if it can be used."""
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
        """Write what the engine holds; what goes wrong is kept for `tell`."""
        if self._cache is None or self._cache.read_only:
            return
        try:
            self._cache.save(engine)
        except CacheError as error:
            self._untold = f"{error}; this does not change the answer"
            return
        if self.report is not None:
            self.report["saved"] = True

    def tell(self) -> None:
        """Say what went wrong, once no answer stands on the line."""
        if self._untold is not None:
            note(self._untold)
            self._untold = None

    def save_prompt(self, engine: TokenRunner, completion: Completion) -> None:
        """Write the prompt but its last token, which the engine holds, unless it was all there."""
        if completion.reused_tokens < len(engine.tokens):
            self.save(engine)
