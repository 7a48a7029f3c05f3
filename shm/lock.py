"""The pool lock: how it is taken, what it promises, and what it cannot promise.

One short lock guards every change of the tables. It is ``flock`` on a file description that belongs to one attached
store: opened for this purpose alone, never mapped, never handed to a child. The kernel drops it when the description
is closed for the last time, so a process that is killed inside a section frees the lock, whatever it was doing, and
nobody has to judge by PIDs or heartbeats whether it lives. Two things would spoil that, both seen in practice:

* a mapping, or a forked child, keeps the description open after its owner's death. Hence the description of its own,
  and the child closes its copy right after the fork (closing does not unlock: the parent's copy still holds).
* ``flock`` belongs to the description, not to the thread. Hence a thread lock around it in :mod:`kvplug.shm.pool`.

*Sections are compiled.* A kernel takes the lock, works and releases it without the GIL. A section written in Python
keeps the lock for as long as another Python thread keeps the GIL (5 ms a turn); these keep it for microseconds
whatever the interpreter does, and no signal handler or finaliser can run inside them.

*The lock is never stolen.* A holder that is stopped (SIGSTOP, a debugger) keeps it; when it goes on it finds the
tables as it left them. Waiters give up at their deadline: their caller answers "miss" or "not stored". From then on
every call of that store tries once and gives up at once, until one try succeeds. Reads do not need the lock at all.

*Dirty.* A section that changes index or lists sets ``H_DIRTY`` first and clears it last. Whoever takes the lock and
finds it set knows that the holder before died half-way, and rebuilds before anything else.
"""

from __future__ import annotations

from typing import Any, Final

from kvplug.shm.atomics import cpu_pause, fence, flock, now_ns, store_release, usleep
from kvplug.shm.failpoints import LOCKED, UNLOCKING, fail
from kvplug.shm.jit import kernel
from kvplug.shm.layout import H_DIRTY, H_HOLDER, H_RETIRED
from kvplug.shm.local import (
    HOLD_RING,
    HOLD_RING_LEN,
    L_BASE,
    L_DOWN,
    L_FD,
    L_HOLD_MAX_NS,
    L_HOLDS,
    L_PID,
    L_T0,
    L_TIMEOUT_NS,
    L_TIMEOUTS,
)
from kvplug.shm.rebuild import rebuild

LOCK_EX_NB: Final = 2 | 4
LOCK_UN: Final = 8
SPINS: Final = 16
PAUSES_A_SPIN: Final = 32
SLEEP_US: Final = 20

ENTERED: Final = 0
TIMED_OUT: Final = -4  # Code.TIMEOUT
IS_RETIRED: Final = -9  # Code.RETIRED


@kernel
def enter(T: Any, L: Any) -> int:
    """Take the lock: 0, or Code.TIMEOUT, or Code.RETIRED (then it is not held). Rebuilds if the pool is dirty."""
    fd = L[L_FD]
    tries = 0
    deadline = 0
    while flock(fd, LOCK_EX_NB) != 0:
        if L[L_DOWN] != 0:
            L[L_TIMEOUTS] += 1
            return TIMED_OUT
        tries += 1
        if tries <= SPINS:
            for _ in range(PAUSES_A_SPIN):
                cpu_pause()
            continue
        now = now_ns()
        if deadline == 0:
            deadline = now + L[L_TIMEOUT_NS]
        if now >= deadline:
            L[L_DOWN] = 1
            L[L_TIMEOUTS] += 1
            return TIMED_OUT
        usleep(SLEEP_US)
    L[L_DOWN] = 0
    if T[H_RETIRED] != 0:
        flock(fd, LOCK_UN)
        return IS_RETIRED
    T[H_HOLDER] = L[L_PID]
    L[L_T0] = now_ns()
    fail(L, LOCKED)
    if T[H_DIRTY] != 0:
        rebuild(T, L)
        clean(T, L)
    return ENTERED


@kernel
def leave(T: Any, L: Any) -> None:
    """Release the lock and note how long it was held."""
    fail(L, UNLOCKING)
    T[H_HOLDER] = 0
    fence()
    flock(L[L_FD], LOCK_UN)
    held = now_ns() - L[L_T0]
    n = L[L_HOLDS]
    L[HOLD_RING + n % HOLD_RING_LEN] = held
    L[L_HOLDS] = n + 1
    L[L_HOLD_MAX_NS] = max(L[L_HOLD_MAX_NS], held)


@kernel
def dirty(T: Any, L: Any) -> None:
    """From here on index and lists may be half-changed."""
    store_release(L[L_BASE] + 8 * H_DIRTY, 1)
    fence()


@kernel
def clean(T: Any, L: Any) -> None:
    """They are whole again: on normal completion only."""
    store_release(L[L_BASE] + 8 * H_DIRTY, 0)
