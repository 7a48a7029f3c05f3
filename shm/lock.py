"""The pool lock: how it is taken, what it promises, and what it cannot promise.

One short lock guards every change of the tables. It is ``flock`` on a file description that belongs to one attached
store: opened for this purpose alone, never mapped, never handed to a child. The kernel drops it when the description
is closed for the last time, so a process that is killed inside a section frees the lock, whatever it was doing, and
nobody has to judge by PIDs or heartbeats whether it lives. Two things would spoil that, both seen in practice:

* a mapping, or a forked child, keeps the description open after its owner's death. Hence the description of its own,
  and the child closes its copy right after the fork (closing does not unlock: the parent's copy still holds).
* ``flock`` belongs to the description, not to the thread. Hence ``L_THREAD`` in front of it, a word of the store's own
  memory: one of its threads at a time. It is taken and given back inside of the compiled call as well, so that there is
  no instant at which Python code holds it: an exception that a signal handler raises (KeyboardInterrupt, an alarm's)
  finds either a section that has not begun, or one that is over.

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

from kvplug.shm.atomics import compare_exchange, cpu_pause, fence, flock, now_ns, store_release, usleep
from kvplug.shm.codes import IS_SHUT, RETIRED, TIMEOUT
from kvplug.shm.failpoints import LOCKED, UNLOCKING, fail
from kvplug.shm.jit import entry, kernel
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
    L_SELF,
    L_SHUT,
    L_T0,
    L_THREAD,
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


@kernel
def take_turn(L: Any, deadline: int) -> int:
    """Wait until none of this store's other threads is inside: 0, Code.TIMEOUT, or IS_SHUT (then it is not held)."""
    word = L[L_SELF] + 8 * L_THREAD
    tries = 0
    while not compare_exchange(word, 0, 1):
        tries += 1
        if tries <= SPINS:
            for _ in range(PAUSES_A_SPIN):
                cpu_pause()
            continue
        if deadline == 0:
            deadline = now_ns() + L[L_TIMEOUT_NS]
        elif now_ns() >= deadline:
            return TIMEOUT
        usleep(SLEEP_US)
    if L[L_SHUT] != 0:
        end_turn(L)
        return IS_SHUT
    return ENTERED


@kernel
def end_turn(L: Any) -> None:
    """Let the store's other threads in."""
    store_release(L[L_SELF] + 8 * L_THREAD, 0)


@entry("i(I, i)")
def shut(L: Any, timeout_ns: int) -> int:
    """No section begins any more, and none is under way: the description may be closed. 0 or Code.TIMEOUT."""
    turn = take_turn(L, now_ns() + timeout_ns)
    if turn == TIMEOUT:
        return turn
    if turn == ENTERED:
        L[L_SHUT] = 1
        end_turn(L)
    return 0


@kernel
def enter(T: Any, L: Any) -> int:
    """Take the lock: 0, or Code.TIMEOUT, Code.RETIRED or IS_SHUT (then it is not held). Rebuilds a dirty pool."""
    turn = take_turn(L, 0)
    if turn < 0:
        if turn == TIMEOUT:
            L[L_TIMEOUTS] += 1
        return turn
    fd = L[L_FD]
    tries = 0
    deadline = 0
    while flock(fd, LOCK_EX_NB) != 0:
        tries += 1
        if L[L_DOWN] == 0 and tries <= SPINS:
            for _ in range(PAUSES_A_SPIN):
                cpu_pause()
            continue
        now = now_ns()
        if deadline == 0:
            deadline = now + L[L_TIMEOUT_NS]
        if L[L_DOWN] != 0 or now >= deadline:
            L[L_DOWN] = 1
            L[L_TIMEOUTS] += 1
            end_turn(L)
            return TIMEOUT
        usleep(SLEEP_US)
    L[L_DOWN] = 0
    if T[H_RETIRED] != 0:
        flock(fd, LOCK_UN)
        end_turn(L)
        return RETIRED
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
    end_turn(L)


@kernel
def dirty(T: Any, L: Any) -> None:
    """From here on index and lists may be half-changed."""
    store_release(L[L_BASE] + 8 * H_DIRTY, 1)
    fence()


@kernel
def clean(T: Any, L: Any) -> None:
    """They are whole again: on normal completion only."""
    store_release(L[L_BASE] + 8 * H_DIRTY, 0)


@kernel
def give_way(T: Any, L: Any) -> int:
    """In the middle of a dirty section: end it, let others in, and begin another. 0, or why it is not held any more."""
    clean(T, L)
    leave(T, L)
    lock = enter(T, L)
    if lock == ENTERED:
        dirty(T, L)
    return lock
