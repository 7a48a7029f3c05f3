"""Plain least recently used: for comparison, and for keys that are no prefixes."""

from __future__ import annotations

from typing import ClassVar

from kvplug.shm.policies.base import I64, Candidates, Touch, oldest


class Lru:
    """The longest unused first; of one batch, its head."""

    name: ClassVar[str] = "lru"
    number: ClassVar[int] = 1
    touch: ClassVar[Touch] = Touch.HEAD_FIRST

    def choose(self, candidates: Candidates, need: int) -> I64:
        """The smallest ticks."""
        return oldest(candidates.ticks, need)
