"""Recency, and within what was used together the tail of a prefix before its head.

A block is worth something only while every block before it is there, so the last block of a prefix is the one to
lose. A batch is dated backwards for that: its first key gets the latest tick.
"""

from __future__ import annotations

from typing import ClassVar

from kvplug.shm.policies.base import I64, Candidates, Touch, oldest


class TailFirst:
    """The default."""

    name: ClassVar[str] = "tail_first"
    number: ClassVar[int] = 0
    touch: ClassVar[Touch] = Touch.TAIL_FIRST

    def choose(self, candidates: Candidates, need: int) -> I64:
        """The longest unused first; of one batch, its tail."""
        return oldest(candidates.ticks, need)
