"""Looking at a pool without being its client: no row, no lock, nothing written, and room for it is always there.

What is seen is a copy-on-write mapping of the tables, in which nobody writes: it shows what the pool's clients do, and
is off by what they do meanwhile.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvplug.errors import PoolError, PoolNotFoundError, PoolOwnerError
from kvplug.shm import layout as lay
from kvplug.shm.layout import Geometry
from kvplug.shm.liveness import close_private, is_locked, open_private
from kvplug.shm.policies import by_number
from kvplug.shm.policies.base import Policy
from kvplug.shm.segment import check_layout, read_header, segment_path
from kvplug.shm.stats import PoolStats, pool_stats

__all__ = ["Visit", "visit"]


class Visit(NamedTuple):
    """A pool as somebody sees it who only looks."""

    name: str
    T: npt.NDArray[np.int64]
    geometry: Geometry
    policy: Policy
    alive: npt.NDArray[np.bool_]
    """bool[MAX_CLIENTS]: rows whose client has its liveness lock."""

    def stats(self) -> PoolStats:
        """The pool's figures; clients that have died and were not reaped yet are not counted."""
        return pool_stats(self, self.alive)

    @property
    def is_full(self) -> bool:
        """Whether the table of clients has no room for another process. Rows of the dead are room."""
        return bool(self.alive.all())


@contextlib.contextmanager
def visit(pool: str) -> Iterator[Visit]:
    """Look at a pool. Raises PoolNotFoundError, or the gate that it failed, as attaching to it would."""
    path = segment_path(pool)
    try:
        fd = open_private(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError as e:
        raise PoolNotFoundError(f"there is no pool {pool!r} ({path})") from e
    except OSError as e:
        raise PoolOwnerError(f"cannot open {path}: {e.strerror}") from e
    try:
        words, st = read_header(fd, path)
        geometry = check_layout(words, st, path)
        offset = words[lay.P_LIVE_OFFSET]
        alive = np.array([is_locked(fd, offset + client) for client in range(lay.MAX_CLIENTS)], np.bool_)
        try:
            mapping = mmap.mmap(fd, geometry.data_offset, access=mmap.ACCESS_COPY)
        except OSError as e:
            raise PoolError(f"cannot map the {geometry.data_offset} bytes of tables of {path}: {e.strerror}") from e
        table = np.frombuffer(mapping, np.int64)
        yield Visit(pool, table, geometry, by_number(int(table[lay.H_POLICY])), alive)
    finally:
        close_private(fd)
