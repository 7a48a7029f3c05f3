"""The pool's figures, read without the lock: a snapshot that may be off by what happens meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvplug.shm import layout as lay
from kvplug.shm.scan import tally

if TYPE_CHECKING:
    from kvplug.shm.layout import Geometry
    from kvplug.shm.policies.base import Policy


class Tables(Protocol):
    """What figures are made of: a pool that this process is attached to, or one that it only looks at."""

    @property
    def name(self) -> str:
        """The pool's."""

    @property
    def T(self) -> npt.NDArray[np.int64]:  # noqa: N802 - as it is called everywhere
        """The tables."""

    @property
    def geometry(self) -> Geometry:
        """Where they lie."""

    @property
    def policy(self) -> Policy:
        """Who is evicted."""


class ClassStats(NamedTuple):
    """One size class."""

    stride_bytes: int
    slabs: int
    sealed_blocks: int
    sealed_bytes: int


class PoolStats(NamedTuple):
    """Figures of a pool; counts since it was created unless said otherwise. Bytes, blocks and slots as named."""

    pool: str
    policy: str
    size_bytes: int
    table_bytes: int
    slab_bytes: int
    min_block_bytes: int
    slabs: int
    reserved_slabs: int
    sealed_blocks: int
    """Now."""
    sealed_bytes: int
    """Now."""
    writing_slots: int
    """Now."""
    quarantined_slots: int
    """Now."""
    pinned_slots: int
    """Now; a slot pinned by several clients counts once."""
    clients: int
    """Attached now."""
    sessions: int
    """With at least one attached client now."""
    hits: int
    """Blocks read by the clients that are attached now."""
    misses: int
    read_bytes: int
    written_bytes: int
    corrupt_blocks: int
    thread_errors: int
    """Errors that nobody foresaw in threads of the processes that are attached now: their logs have them."""
    dead_threads: int
    """Threads of theirs that must live and could not be started."""
    stored_blocks: int
    evicted_blocks: int
    removed_blocks: int
    aborted_blocks: int
    quarantined_blocks: int
    released_blocks: int
    refused_full: int
    rebuilds: int
    reaped_clients: int
    reaped_pins: int
    reaped_writes: int
    slab_moves: int
    event_seq: int
    epoch: int
    lock_holder_pid: int
    """Inside a section now, 0 for nobody."""
    classes: tuple[ClassStats, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same by name, as JSON has it: each class likewise."""
        return self._asdict() | {"classes": [one._asdict() for one in self.classes]}


def pool_stats(pool: Tables, alive: npt.NDArray[np.bool_] | None = None) -> PoolStats:
    """A snapshot of ``pool``. ``alive``: which rows' clients live, bool[MAX_CLIENTS]; default: as the rows say."""
    t, g = pool.T, pool.geometry
    states = np.zeros(4, np.int64)
    per_class = np.zeros((lay.MAX_CLASSES, 4), np.int64)
    live = np.zeros(lay.MAX_CLASSES, np.int64)
    pinned = int(tally(t, states, live, per_class))
    rows = t[g.o_client : g.o_client + lay.MAX_CLIENTS * lay.CLIENT_WORDS].reshape(-1, lay.CLIENT_WORDS)
    live_rows = rows[:, lay.C_STATE] == lay.CLIENT_LIVE
    attached = rows[live_rows if alive is None else live_rows & alive]

    def total(word: int) -> int:
        return int(attached[:, word].sum())

    def of_processes(word: int) -> int:
        """Each client of a process has the same number; of containers' processes with one PID, the highest counts."""
        by_pid: dict[int, int] = {}
        for pid, n in attached[:, (lay.C_PID, word)].tolist():
            by_pid[pid] = max(n, by_pid.get(pid, 0))
        return sum(by_pid.values())

    classes = tuple(ClassStats(*(int(x) for x in per_class[c])) for c in np.flatnonzero(live))
    return PoolStats(
        pool=pool.name,
        policy=pool.policy.name,
        size_bytes=g.segment_bytes,
        table_bytes=g.data_offset,
        slab_bytes=g.slab_bytes,
        min_block_bytes=g.min_block,
        slabs=g.n_slabs,
        reserved_slabs=int(t[lay.H_WATERMARK]),
        sealed_blocks=int(states[lay.SEALED]),
        sealed_bytes=sum(c.sealed_bytes for c in classes),
        writing_slots=int(states[lay.WRITING]),
        quarantined_slots=int(states[lay.QUARANTINED]),
        pinned_slots=pinned,
        clients=len(attached),
        sessions=len(set(attached[:, lay.C_SESSION].tolist())),
        hits=total(lay.C_HITS),
        misses=total(lay.C_MISSES),
        read_bytes=total(lay.C_READ_BYTES),
        written_bytes=total(lay.C_WRITTEN_BYTES),
        corrupt_blocks=total(lay.C_CORRUPT),
        thread_errors=of_processes(lay.C_THREAD_ERRORS),
        dead_threads=of_processes(lay.C_DEAD_THREADS),
        stored_blocks=int(t[lay.H_C_SEALED]),
        evicted_blocks=int(t[lay.H_C_EVICTED]),
        removed_blocks=int(t[lay.H_C_REMOVED]),
        aborted_blocks=int(t[lay.H_C_ABORTED]),
        quarantined_blocks=int(t[lay.H_C_QUARANTINED]),
        released_blocks=int(t[lay.H_C_RELEASED]),
        refused_full=int(t[lay.H_C_FULL]),
        rebuilds=int(t[lay.H_C_REBUILDS]),
        reaped_clients=int(t[lay.H_C_REAPED_CLIENTS]),
        reaped_pins=int(t[lay.H_C_REAPED_PINS]),
        reaped_writes=int(t[lay.H_C_REAPED_WRITES]),
        slab_moves=int(t[lay.H_C_SLAB_MOVES]),
        event_seq=int(t[lay.H_EVENT_SEQ]),
        epoch=int(t[lay.H_EPOCH]),
        lock_holder_pid=int(t[lay.H_HOLDER]),
        classes=classes,
    )
