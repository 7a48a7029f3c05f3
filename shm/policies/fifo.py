"""First in, first out: reads date nothing, so a read writes no shared word at all."""

from __future__ import annotations

from typing import ClassVar

from kvplug.shm.policies.base import I64, Candidates, Touch, oldest


class Fifo:
    """The earliest stored first."""

    name: ClassVar[str] = "fifo"
    number: ClassVar[int] = 2
    touch: ClassVar[Touch] = Touch.NONE

    def choose(self, candidates: Candidates, need: int) -> I64:
        """The smallest ticks, which are those of storing."""
        return oldest(candidates.ticks, need)
