"""Keeps keys and values of prompts, so that prompts which begin alike are not run again."""

from __future__ import annotations

import dataclasses

from edge_demo.engine.kv_cache import Snapshot
from edge_demo.engine.prompt_chunks import UNIT
from edge_demo.engine.runner import TokenRunner, common_prefix


@dataclasses.dataclass(eq=False)
class _Entry:
    namespace: str
    snapshot: Snapshot
    num_bytes: int


class PrefixStore:
    """Snapshots of prompts, those that were used last; never shared between namespaces.

    Args:
        most_bytes: that all of them may take; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._entries: list[_Entry] = []  # the one used last comes last

    @property
    def num_bytes(self) -> int:
        """What they take."""
        return sum(entry.num_bytes for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def best(
        self, namespace: str, engine: TokenRunner, ids: list[int]
    ) -> tuple[int, Snapshot | None]:
        """The snapshot that saves most of running a prompt.

        Args:
            namespace: of the request.
            engine: that runs it.
            ids: of the prompt without its last token.

        Returns:
            How many tokens need not be run, and the snapshot; 0 and `None` if none helps.
        """
        found, best = 0, None
        for entry in self._entries:
            if entry.namespace == namespace:
                saved = engine.saved_by(entry.snapshot, ids)
                if saved > found:
                    found, best = saved, entry
        if best is None:
            return 0, None
        self._entries.remove(best)
        self._entries.append(best)
        return found, best.snapshot

    def keep(self, namespace: str, engine: TokenRunner) -> None:
        """Keep what an engine holds now; the least recently used go to make room."""
        snapshot = engine.snapshot()
        size = sum(array.nbytes for array in snapshot.filled.values())
        if not snapshot.tokens or size > self.most_bytes:
            return
        self._entries = [
            entry
            for entry in self._entries
            if entry.namespace != namespace or not _stands_for(snapshot, entry.snapshot, engine)
        ]
        while self._entries and self.num_bytes + size > self.most_bytes:
            del self._entries[0]
        self._entries.append(_Entry(namespace, snapshot.copy(), size))

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()


def _stands_for(new: Snapshot, old: Snapshot, engine: TokenRunner) -> bool:
    """Whether a snapshot saves what an older one saves, but for less than a unit of tokens."""
    if common_prefix(new.tokens, old.tokens) < len(old.tokens):
        return False
    return engine.saved_by(new, old.tokens) >= len(old.tokens) // UNIT * UNIT
