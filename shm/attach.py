"""Becoming a client of a pool: find or make the segment, take a liveness byte, publish a row."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from typing import Final

import numpy as np
import numpy.typing as npt

from kvplug.errors import ClientLimitError, Code, LockTimeoutError, PoolError, PoolNotFoundError
from kvplug.shm import failpoints, segment
from kvplug.shm import layout as lay
from kvplug.shm.codes import NO_SESSION, ROW_TAKEN
from kvplug.shm.jit import warm_up
from kvplug.shm.layout import DEFAULT_MIN_BLOCK_BYTES, Geometry
from kvplug.shm.liveness import close_private, count_locks, try_lock_byte, unlock_byte
from kvplug.shm.local import (
    L_BASE,
    L_FD,
    L_PID,
    L_PIN_BUDGET,
    L_RESERVE_BUDGET,
    L_SELF,
    L_TIMEOUT_NS,
    L_TOUCH,
    L_VERIFY,
    LOCAL_WORDS,
)
from kvplug.shm.policies import by_name, by_number
from kvplug.shm.policies.base import Touch
from kvplug.shm.reap import find_dead, free_clients, mark_dead, publish, reap_rows
from kvplug.shm.segment import Segment
from kvplug.shm.write import TOUCH_HEAD_FIRST, TOUCH_NONE, TOUCH_TAIL_FIRST

ATTEMPTS: Final = 3

assert (Touch.NONE, Touch.HEAD_FIRST, Touch.TAIL_FIRST) == (TOUCH_NONE, TOUCH_HEAD_FIRST, TOUCH_TAIL_FIRST)


@dataclasses.dataclass(frozen=True, slots=True)
class PoolOptions:
    """How a pool is made (ignored where it is there already) and how this client behaves in it. Sizes in bytes."""

    size: int
    min_block: int = DEFAULT_MIN_BLOCK_BYTES
    slab: int | None = None
    policy: str = "tail_first"
    until_last_exit: bool = False
    quarantine_grace_s: float = 1.0
    lock_timeout_s: float = 0.1
    pin_budget_share: float = 0.5
    reserve_budget_share: float = 0.5
    verify: bool = False
    prefault: bool = True


def attach(
    pool: str,
    options: PoolOptions,
    description: list[int],
    *,
    create: bool,
    session: int,
    pool_uuid: bytes | None,
) -> tuple[Segment, npt.NDArray[np.int64]]:
    """(segment, local words) of a new client. ``session`` 0 begins a session, else joins a living one.

    ``description`` gets the client's file description, for whoever has to close it if this call is interrupted.

    Raises PoolNotFoundError, PoolFormatError, PoolOwnerError, PoolSpaceError, ClientLimitError, LockTimeoutError,
    PoolError.
    """
    warm_up()
    with segment.name_lock(pool):
        for _ in range(ATTEMPTS):
            is_new = False
            try:
                seg = segment.open_segment(pool)
            except PoolNotFoundError:
                if not create:
                    raise
                segment.check_space(options.size)  # of what was asked for, as `kvplug doctor` does
                geometry = Geometry.plan(options.size, min_block=options.min_block, slab_bytes=options.slab)
                segment.create(
                    pool,
                    geometry,
                    policy=by_name(options.policy).number,
                    until_last_exit=options.until_last_exit,
                    grace_ns=int(options.quarantine_grace_s * 1e9),
                )
                is_new = True
                seg = _open_or_remove(pool)
                seg = seg._replace(is_new=True)
                # Memory for the first blocks, so that a new pool can be written to at once.
                with contextlib.suppress(OSError):
                    segment.reserve(seg.lock_fd, seg.geometry.data_offset, seg.geometry.slab_bytes)
            try:
                if pool_uuid is not None and seg.uuid != pool_uuid:
                    raise PoolError(
                        f"pool {pool!r} is another one than the session to be joined lives in: "
                        f"it was removed and made anew"
                    )
                if create and not is_new and _left_by_the_last(seg):
                    segment.remove_segment_file(seg.path)
                    close_private(seg.lock_fd)
                    continue
                local = _local_words(seg, options)
                description.append(seg.lock_fd)
                if _claim(seg, local, session, options) and seg.still_named():
                    return seg, local
            except BaseException:
                description.clear()
                close_private(seg.lock_fd)
                if is_new:
                    segment.remove_segment_file(seg.path)
                raise
            description.clear()
            close_private(seg.lock_fd)
    raise PoolError(f"pool {pool!r} was removed {ATTEMPTS} times while attaching to it")


def _open_or_remove(pool: str) -> Segment:
    """Open the segment that was made just now; where that fails, nothing of it is left. The name lock is held."""
    try:
        return segment.open_segment(pool)
    except BaseException:
        segment.remove_segment_file(segment.segment_path(pool))
        raise


def _left_by_the_last(seg: Segment) -> bool:
    """A pool that was to go with its last client, whose last client was killed before it could see to that."""
    return int(seg.table[lay.H_PERSIST]) == 1 and not count_locks(seg.lock_fd)


def _local_words(seg: Segment, options: PoolOptions) -> npt.NDArray[np.int64]:
    local = np.zeros(LOCAL_WORDS, np.int64)
    local[L_FD] = seg.lock_fd
    local[L_SELF] = local.ctypes.data
    local[L_TIMEOUT_NS] = int(options.lock_timeout_s * 1e9)
    local[L_PID] = os.getpid()
    local[L_BASE] = seg.base
    local[L_TOUCH] = int(by_number(int(seg.table[lay.H_POLICY])).touch)
    local[L_PIN_BUDGET] = max(1, int(seg.geometry.n_rows * options.pin_budget_share))
    local[L_RESERVE_BUDGET] = max(1, int(seg.geometry.n_rows * options.reserve_budget_share))
    local[L_VERIFY] = int(options.verify)
    failpoints.arm_from_environment(local)
    return local


def _claim(seg: Segment, local: npt.NDArray[np.int64], session: int, options: PoolOptions) -> bool:
    """Take a free client row. False if the segment was retired meanwhile."""
    t = seg.table
    offset = seg.geometry.o_client * 8
    if session:  # whose processes may all be dead, and their rows not say so yet
        reap_dead(seg, local)
    for attempt in range(2):
        for client in range(lay.MAX_CLIENTS):
            state = int(t[seg.geometry.o_client + client * lay.CLIENT_WORDS + lay.C_STATE])
            if state != lay.CLIENT_FREE or not try_lock_byte(seg.lock_fd, offset + client):
                continue
            answer = int(publish(t, local, client, session, time.time_ns()))
            if answer > 0:
                return True
            unlock_byte(seg.lock_fd, offset + client)
            if answer == ROW_TAKEN:
                continue
            if answer == Code.RETIRED:
                return False
            if answer == NO_SESSION:
                raise PoolError(
                    f"session {session} of pool {seg.pool!r} has no living process: it can't be joined any more"
                )
            raise LockTimeoutError(
                f"the lock of pool {seg.pool!r} was held for {options.lock_timeout_s} s by process "
                f"{int(t[lay.H_HOLDER])} (stopped?); attach again later"
            )
        if attempt == 0:
            reap_dead(seg, local)
    raise ClientLimitError(
        f"pool {seg.pool!r} has {lay.MAX_CLIENTS} clients attached, the most that one pool takes; stop some"
    )


def reap_dead(seg: Segment, local: npt.NDArray[np.int64], *, me: int = -1) -> int:
    """Reclaim what dead sessions left: pins, unfinished slots, rows. Their number of clients, or a lock code.

    Every step can be done again, by anyone, should this process die in it.
    """
    dead, dead_started = np.empty((2, lay.MAX_CLIENTS), np.int64)
    gone = int(find_dead(seg.table, local, seg.geometry.o_client * 8, me, dead, dead_started))
    if gone <= 0:
        return gone
    bits = np.zeros(lay.PIN_WORDS, np.int64)
    started = np.zeros(lay.MAX_CLIENTS, np.int64)
    n = int(mark_dead(seg.table, local, dead[:gone], dead_started[:gone], bits, started))
    if n <= 0:
        return n
    row = 0
    while row < seg.geometry.n_rows:
        row = int(reap_rows(seg.table, local, bits, started, row))
        if row < 0:
            return row
    return int(free_clients(seg.table, local, bits, started))
