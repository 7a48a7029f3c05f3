"""Clients: rows in the table, and what is done for those that are gone.

A row is taken and published in one section after its liveness byte was locked. A client that died keeps its row, pins
and reservations until its whole session is gone, since another process of that session may still be copying. Then its
pin bits are cleared and its unfinished slots quarantined, slab range by slab range, and the row is free last: every
step can be done again by somebody else.
"""

from __future__ import annotations

from typing import Any, Final

from kvplug.shm.atomics import fcntl, fence
from kvplug.shm.bits import bit_of, has_bit, word_of
from kvplug.shm.codes import NO_SESSION, ROW_TAKEN
from kvplug.shm.failpoints import ATTACH_LOCKED, REAP_HALF, fail
from kvplug.shm.jit import entry, kernel
from kvplug.shm.layout import (
    C_PID,
    C_PINS,
    C_RESERVED,
    C_SESSION,
    C_STARTED_NS,
    C_STATE,
    CLIENT_DEAD,
    CLIENT_FREE,
    CLIENT_LIVE,
    CLIENT_WORDS,
    H_C_REAPED_CLIENTS,
    H_C_REAPED_PINS,
    H_C_REAPED_WRITES,
    H_MAX_CLIENTS,
    H_N_ROWS,
    H_O_CLIENT,
    H_SESSION_NEXT,
    PIN_WORDS,
    QUARANTINED,
    R_NEXT,
    R_PIN,
    R_SESSION,
    R_WORD,
    STATE_MASK,
    WRITING,
)
from kvplug.shm.local import L_CLIENT, L_FD, L_FLOCK, L_PID, L_SELF, L_SESSION
from kvplug.shm.lock import clean, dirty, end_turn, enter, leave, take_turn
from kvplug.shm.places import row_at
from kvplug.shm.write import grace_end, quarantine

REAP_ROWS_A_SECTION = 8192
F_OFD_GETLK: Final = 36  # of <fcntl.h>, the same on both machines
F_WRLCK: Final = 1
F_UNLCK: Final = 2


@kernel
def client_at(T: Any, client: int) -> int:
    """Word offset of a client's row."""
    return T[H_O_CLIENT] + client * CLIENT_WORDS


@entry("i(I, I, i, i, i)")
def publish(T: Any, L: Any, client: int, session: int, now_unix_ns: int) -> int:
    """Fill a client row whose liveness byte the caller has locked. The session, or NO_SESSION, ROW_TAKEN, a lock code.

    ``session`` 0 begins a new one; else it must have a living member, or what it owned may be reclaimed already.
    """
    lock = enter(T, L)
    if lock < 0:
        return lock
    fail(L, ATTACH_LOCKED)
    session = _publish(T, L, client, session, now_unix_ns)
    leave(T, L)
    return session


@kernel
def _publish(T: Any, L: Any, client: int, session: int, now_unix_ns: int) -> int:
    if T[client_at(T, client) + C_STATE] != CLIENT_FREE:
        return ROW_TAKEN
    if session == 0:
        T[H_SESSION_NEXT] += 1
        session = T[H_SESSION_NEXT]
    else:
        alive = False
        for c in range(T[H_MAX_CLIENTS]):
            if T[client_at(T, c) + C_STATE] == CLIENT_LIVE and T[client_at(T, c) + C_SESSION] == session:
                alive = True
        if not alive:
            return NO_SESSION
    at = client_at(T, client)
    for w in range(CLIENT_WORDS):
        T[at + w] = 0
    T[at + C_PID] = L[L_PID]
    T[at + C_SESSION] = session
    T[at + C_STARTED_NS] = now_unix_ns
    T[at + C_STATE] = CLIENT_LIVE
    L[L_CLIENT] = client
    L[L_SESSION] = session
    return session


@entry("i(I, I, i, i, I, I)")
def find_dead(T: Any, L: Any, live_offset: int, me: int, dead: Any, started: Any) -> int:
    """Client rows whose process is gone, and when each had started, int64[MAX_CLIENTS]; how many, or a lock code.

    Asks the kernel about each client's byte, without the pool lock but in this store's turn: its description stays
    open meanwhile. ``me`` is passed over: no description conflicts with itself. Starts are read before the probe.
    """
    turn = take_turn(L, 0)
    if turn < 0:
        return turn
    n = 0
    for c in range(min(T[H_MAX_CLIENTS], len(dead))):  # whatever the header says by now
        at = client_at(T, c)
        state = T[at + C_STATE]
        if c == me or state == CLIENT_FREE:
            continue
        started[n] = T[at + C_STARTED_NS]
        if state != CLIENT_DEAD:
            fence()
            L[L_FLOCK] = F_WRLCK  # in the file as a whole: SEEK_SET is 0
            L[L_FLOCK + 1] = live_offset + c
            L[L_FLOCK + 2] = 1
            L[L_FLOCK + 3] = 0
            if fcntl(L[L_FD], F_OFD_GETLK, L[L_SELF] + 8 * L_FLOCK) != 0 or L[L_FLOCK] & 0xFFFF != F_UNLCK:
                continue
        dead[n] = c
        n += 1
    end_turn(L)
    return n


@entry("i(I, I, I, I, I, I)")
def mark_dead(T: Any, L: Any, dead: Any, dead_started: Any, bits: Any, started: Any) -> int:
    """Note which clients died; fill ``bits`` with the rows of sessions with nobody left. Their number or a lock code.

    A row says when its client started, and that is compared in every step: by the time of a step another process may
    have done the work and a new client, with pins of its own, may have the row. ``dead_started`` was read before the
    probe.
    """
    lock = enter(T, L)
    if lock < 0:
        return lock
    for i in range(dead.shape[0]):
        at = client_at(T, dead[i])
        if T[at + C_STATE] == CLIENT_LIVE and T[at + C_STARTED_NS] == dead_started[i]:
            T[at + C_STATE] = CLIENT_DEAD
    n = 0
    for w in range(PIN_WORDS):
        bits[w] = 0
    for c in range(T[H_MAX_CLIENTS]):
        if T[client_at(T, c) + C_STATE] != CLIENT_DEAD:
            continue
        session = T[client_at(T, c) + C_SESSION]
        alive = False
        for o in range(T[H_MAX_CLIENTS]):
            if T[client_at(T, o) + C_STATE] == CLIENT_LIVE and T[client_at(T, o) + C_SESSION] == session:
                alive = True
        if not alive:
            bits[word_of(c)] |= bit_of(c)
            started[c] = T[client_at(T, c) + C_STARTED_NS]
            n += 1
    leave(T, L)
    return n


@kernel
def still_theirs(T: Any, bits: Any, started: Any) -> None:
    """Take those rows out of ``bits`` that somebody else has reaped meanwhile."""
    for c in range(T[H_MAX_CLIENTS]):
        at = client_at(T, c)
        if has_bit(bits, c) and (T[at + C_STATE] != CLIENT_DEAD or T[at + C_STARTED_NS] != started[c]):
            bits[word_of(c)] &= ~bit_of(c)


@entry("i(I, I, I, I, i)")
def reap_rows(T: Any, L: Any, bits: Any, started: Any, begin: int) -> int:
    """Clear pins, quarantine unfinished slots of the clients in ``bits``, from row ``begin``; next row, a lock code."""
    lock = enter(T, L)
    if lock < 0:
        return lock
    still_theirs(T, bits, started)
    dirty(T, L)
    end = min(begin + REAP_ROWS_A_SECTION, T[H_N_ROWS])
    until = grace_end(T)
    for row in range(begin, end):
        r = row_at(T, row)
        for w in range(PIN_WORDS):
            gone = T[r + R_PIN + w] & bits[w]
            if gone != 0:
                T[r + R_PIN + w] &= ~gone
                for c in range(64):
                    T[H_C_REAPED_PINS] += (gone >> c) & 1
        if T[r + R_WORD] & STATE_MASK == WRITING:
            for c in range(T[H_MAX_CLIENTS]):
                if has_bit(bits, c) and T[client_at(T, c) + C_SESSION] == T[r + R_SESSION]:
                    quarantine(T, L, row, until)
                    T[H_C_REAPED_WRITES] += 1
                    break
        elif T[r + R_WORD] & STATE_MASK == QUARANTINED:
            for c in range(T[H_MAX_CLIENTS]):
                if has_bit(bits, c) and T[client_at(T, c) + C_SESSION] == T[r + R_SESSION]:
                    if T[r + R_NEXT] > until:  # waiting for an acknowledgement that will not come
                        T[r + R_NEXT] = until
                    break
    fail(L, REAP_HALF)
    clean(T, L)
    leave(T, L)
    return end


@entry("i(I, I, I, I)")
def free_clients(T: Any, L: Any, bits: Any, started: Any) -> int:
    """Let the rows of reaped clients be used again. Number freed, or a lock code."""
    lock = enter(T, L)
    if lock < 0:
        return lock
    still_theirs(T, bits, started)
    n = 0
    for c in range(T[H_MAX_CLIENTS]):
        at = client_at(T, c)
        if has_bit(bits, c):
            T[at + C_PINS] = 0
            T[at + C_RESERVED] = 0
            T[at + C_SESSION] = 0
            T[at + C_STATE] = CLIENT_FREE
            T[H_C_REAPED_CLIENTS] += 1
            n += 1
    leave(T, L)
    return n


@entry("i(I, I)")
def withdraw(T: Any, L: Any) -> int:
    """An orderly end: the row says dead; whoever reaps next (usually this client) clears the rest. 0 or a lock code."""
    lock = enter(T, L)
    if lock < 0:
        return lock
    T[client_at(T, L[L_CLIENT]) + C_STATE] = CLIENT_DEAD
    leave(T, L)
    return 0
