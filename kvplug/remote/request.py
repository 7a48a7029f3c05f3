"""What an engine would like to have from other hosts, and how that stands; :mod:`~kvplug.remote.fetcher` does it."""

from __future__ import annotations

import dataclasses
import enum
import threading
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["Fetch", "Outcome", "Plan", "Planner", "Wanted", "leading"]

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PROGRESS_SHARE: Final = 0.5
"""Of the computing that was saved so far, by which a fetch's deadline moves on: speeds may be misjudged by half."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What of a prefix can be used, given which of its blocks there are."""

    index: I64
    """Positions in :attr:`Wanted.keys`, in the order in which they should come."""
    tokens: int
    """How long the hit is with them, in tokens; only differences count."""


Planner = Callable[[Bools], Plan]
"""From bool[N], which of the keys there are, to the best use of them. Called on the fetcher's threads."""


def leading(span: int) -> Planner:
    """A prefix of blocks of ``span`` tokens, each of which is worth nothing without all that are before it."""

    def plan(have: Bools) -> Plan:
        n = len(have) if have.all() else int(have.argmin())
        return Plan(np.arange(n), n * span)

    return plan


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """What an engine would like to find in its pool."""

    keys: U8
    """(N, 32) uint8, head of the prefix first."""
    nbytes: int | I64
    """Bytes of a block, or of each: int64[N]."""
    plan: Planner
    tokens: int
    """Tokens that need not be computed if all of it is there, beyond those that the pool could give already."""
    first: int = 0
    """Position of the first key that was not in the pool: by it requests for one prefix know each other."""


class Outcome(enum.Enum):
    """How a fetch ended."""

    PRESENT = "present"
    """Everything was here by the time that anybody looked."""
    FETCHED = "fetched"
    """What is to be had has arrived."""
    MISSING = "missing"
    """Nobody who answered has more than there is here."""
    NOT_WORTH_IT = "not_worth_it"
    """Computing is faster; what had arrived by then is here."""
    TIMEOUT = "timeout"
    """The deadline came first; what had arrived is here."""
    NO_ROOM = "no_room"
    """This host's pool had no slot for it."""
    GIVEN_UP = "given_up"
    """Nobody wants it any more, the fetcher was closed, or it failed."""


class Fetch:
    """One request's fetch, as the engine sees it. Any thread may call anything here; nothing raises."""

    def __init__(self, wanted: Wanted, budget_s: float, *, moves: bool, tokens_per_s: float | None) -> None:
        """For the fetcher. ``moves``: the deadline moves on with progress."""
        self.wanted, self.tokens_per_s = wanted, tokens_per_s
        self.began = time.monotonic()
        self.deadline = self.began + budget_s
        """time.monotonic() until which it may go on."""
        self.outcome: Outcome | None = None
        """None while it has not ended."""
        self.tokens = 0
        """Tokens by which the hit in the pool has grown by it."""
        self._budget_s, self._moves = budget_s, moves
        self._ended = threading.Event()
        self._mutex = threading.Lock()
        self._let_go: Callable[[], None] | None = None
        self.unwanted = False
        """Whether the engine has released it."""

    @property
    def done(self) -> bool:
        """Whether it has ended or its deadline has passed: look up again, and compute what is not there."""
        return self._ended.is_set() or time.monotonic() >= self.deadline

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end, the deadline, or so long; whether it is done."""
        until = time.monotonic() + timeout_s
        while not self.done and (left := min(until, self.deadline) - time.monotonic()) > 0:
            self._ended.wait(left)
        return self.done

    def release(self) -> None:
        """The engine has looked up what came, or does not want it: pins go, a fetch under way ends. Idempotent."""
        with self._mutex:
            self.unwanted = True
            let_go, self._let_go = self._let_go, None
        if let_go is not None:
            let_go()

    # ---- the fetcher's side ------------------------------------------------------------------------------------------

    def hold(self, let_go: Callable[[], None]) -> None:
        """Call ``let_go`` at the release: at once, if that has been."""
        with self._mutex:
            if not self.unwanted:
                self._let_go = let_go
                return
        let_go()

    def progress(self, tokens: int) -> None:
        """The hit has grown by so many tokens since the start."""
        self.tokens = tokens
        if self._moves and self.tokens_per_s:
            self.deadline = self.began + self._budget_s + PROGRESS_SHARE * tokens / self.tokens_per_s

    def end(self, outcome: Outcome) -> Fetch:
        """It is over. Itself."""
        self.outcome = outcome
        self._ended.set()
        return self
