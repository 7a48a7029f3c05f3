"""Memory that the controller and all its children share: who does what since when, and what went wrong."""

from __future__ import annotations

import mmap
import os
import time
from typing import Final

import numpy as np

MAX_ACTORS: Final = 64
COLUMNS: Final = 8
PID: Final = 0
SINCE_NS: Final = 1  # when the call under way began; 0: none
CALLS: Final = 2
HITS: Final = 3
SLOWEST_NS: Final = 4
CHILD: Final = 5
TEXT_BYTES: Final = 4096


class Board:
    """Made before the forks. Each actor writes its own row only, except for violations, which go to a file."""

    def __init__(self, path: str) -> None:
        self._memory = mmap.mmap(-1, MAX_ACTORS * COLUMNS * 8)
        self.rows = np.frombuffer(self._memory, np.int64).reshape(MAX_ACTORS, COLUMNS)
        self.path = path

    def begin(self, actor: int, pid: int) -> None:
        """A new process has this row."""
        self.rows[actor] = 0
        self.rows[actor, PID] = pid

    def call(self, actor: int) -> None:
        """A call begins."""
        self.rows[actor, SINCE_NS] = time.monotonic_ns()

    def done(self, actor: int) -> None:
        """It has ended."""
        took = time.monotonic_ns() - int(self.rows[actor, SINCE_NS])
        self.rows[actor, SINCE_NS] = 0
        self.rows[actor, CALLS] += 1
        self.rows[actor, SLOWEST_NS] = max(took, int(self.rows[actor, SLOWEST_NS]))

    def violation(self, kind: str, what: str) -> None:
        """Something that must never be: one line, written at once (the writer may be killed in a moment)."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(fd, f"{kind}\t{what}\n".encode()[:TEXT_BYTES])
        os.close(fd)

    def violations(self) -> list[tuple[str, str]]:
        """All so far."""
        try:
            with open(self.path) as file:
                return [(line.split("\t", 1)[0], line.rstrip("\n").split("\t", 1)[-1]) for line in file]
        except FileNotFoundError:
            return []
