"""What an eviction policy decides, and nothing else: how a batch is touched, and who goes first.

A policy never touches the pool. It is given candidates that were found without the lock and orders them; each is
checked again, under the lock, when its slot is taken.
"""

from __future__ import annotations

import enum
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


class Touch(enum.IntEnum):
    """How a batch of keys, in the order of their prefix, is dated when it is used."""

    NONE = 0
    HEAD_FIRST = 1
    """The head is the oldest of its batch, as plain LRU has it."""
    TAIL_FIRST = 2
    """The tail is the oldest of its batch: a prefix is eaten from its end."""


class Candidates(NamedTuple):
    """Unpinned sealed blocks, in no order. All arrays int64[N]."""

    slots: I64
    words: I64
    ticks: I64
    nbytes: I64


class Policy(Protocol):
    """One policy. ``number`` stands in the segment and never changes its meaning."""

    name: ClassVar[str]
    number: ClassVar[int]
    touch: ClassVar[Touch]

    def choose(self, candidates: Candidates, need: int) -> I64:
        """Indices of at most ``need`` candidates, the one to go first at the front."""
        ...


def oldest(ticks: I64, need: int) -> I64:
    """Indices of the ``need`` smallest ticks, smallest first."""
    n = len(ticks)
    if need < n // 4:
        part = np.argpartition(ticks, need)[:need]
        return part[np.argsort(ticks[part], kind="stable")].astype(np.int64, copy=False)
    return np.argsort(ticks, kind="stable")[:need].astype(np.int64, copy=False)
