"""What a run has done and found. A find is printed at once, with everything that is known about it."""

from __future__ import annotations

import collections
import sys
import threading
import time
from typing import Final, Literal

__all__ = ["Find", "Findings"]

Find = Literal["wrong", "unexplained", "hung", "violations", "leaked"]
FINDS: Final[tuple[Find, ...]] = ("wrong", "unexplained", "hung", "violations", "leaked")


class Findings:
    """Counts, by name. Used by all threads of a run.

    wrong: an answer that differs from the witness's. unexplained: an error, or the end of an engine, that no kill
    accounts for. hung: no answer while the engine lives. violations: of the pool's invariants. leaked: slots and
    clients that nobody is there for.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.counts: collections.Counter[str] = collections.Counter()
        self.slowest_s = 0.0
        self._lock = threading.Lock()

    def add(self, name: str, number: int = 1) -> None:
        """Counts."""
        with self._lock:
            self.counts[name] += number

    def answered(self, seconds: float) -> None:
        """A right answer, and how long it took while nothing was stopped or killed."""
        with self._lock:
            self.counts["right"] += 1
            self.slowest_s = max(self.slowest_s, seconds)

    def find(self, kind: Find, what: str, number: int = 1) -> None:
        """Something that must not be."""
        self.add(kind, number)
        self.say(f"! {kind}: {what}")

    def say(self, line: str) -> None:
        """One line on standard error, with the time since the run began."""
        print(f"{time.monotonic() - self.began:7.1f} {line}", file=sys.stderr, flush=True)

    @property
    def bad(self) -> int:
        """How much must not have been."""
        return sum(self.counts[kind] for kind in FINDS)

    def summary(self, seed: int) -> str:
        """The line that a run ends with."""
        c = self.counts
        return (
            f"requests={c['requests']} wrong={c['wrong']} unexplained={c['unexplained']} hung={c['hung']} "
            f"kills={c['kills']} violations={c['violations']} leaked={c['leaked']} seed={seed}"
        )
