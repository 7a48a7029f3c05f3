"""Named instants at which a test lets a process die or stop: one inside every state change. Off unless armed.

A failpoint is a comparison with a word of the process's own memory; :func:`arm` sets that word. The environment
variable ``KVPLUG_FAILPOINT=NAME[:SKIP[:SIGNAL]]`` arms one at attach, for processes that a test cannot reach
otherwise.
"""

from __future__ import annotations

import os
import signal
from typing import Any, Final

from kvplug.errors import ConfigError
from kvplug.shm.atomics import getpid, kill
from kvplug.shm.jit import entry
from kvplug.shm.local import L_FP_ID, L_FP_SIGNAL, L_FP_SKIP

ENV: Final = "KVPLUG_FAILPOINT"

LOCKED: Final = 1  # right after the lock was taken
UNLOCKING: Final = 2  # work done, lock still held
RESERVE_FIELDS: Final = 3  # fields of a slot written, its word not
RESERVE_WORD: Final = 4  # word says WRITING, index does not know it
RESERVE_INDEXED: Final = 5  # index knows it, still dirty
EVICT_WORD: Final = 6  # victim's word says FREE, index still names it
EVICT_UNINDEXED: Final = 7  # victim out of the index, not yet reused
WRITE_COPY: Final = 8  # between reserving and completing, no lock held
PART_RECORDED: Final = 9  # checksum written, done bit not
PART_DONE: Final = 10  # last done bit set, word still WRITING
SEALED_WORD: Final = 11  # word says SEALED, section not left
ABORT_WORD: Final = 12  # aborted word written, index still names it
ABORT_UNINDEXED: Final = 13  # out of the index, not on the free list
FREED_LISTED: Final = 14  # on the free list, still dirty
PINNED_BIT: Final = 15  # pin bit set, counters not
UNPINNED_BIT: Final = 16  # pin bit cleared, section not left
SLAB_CUT: Final = 17  # slab's stride written, state still FREE
SLAB_OWNED: Final = 18  # slab owned, its free list not built
DRAIN_STARTED: Final = 19  # slab DRAINING, blocks still in it
DRAIN_EMPTY: Final = 20  # all its slots free, state still DRAINING
REBUILD_CLEARED: Final = 21  # index zeroed, nothing inserted yet
REBUILD_HALF: Final = 22  # half the slabs' rows inserted
REAP_HALF: Final = 23  # some of a dead session's rows cleared, its client rows not free
ATTACH_LOCKED: Final = 24  # liveness byte locked, client row not published
INDEX_SHIFT: Final = 25  # an entry moved back over a hole, its old place not yet cleared
ACK_WORD: Final = 26  # quarantined slot's word says FREE, not on the free list
WATERMARK: Final = 27  # slab memory reserved, watermark not raised

NAMES: Final[dict[str, int]] = {
    name.lower(): value
    for name, value in list(globals().items())
    if name.isupper() and isinstance(value, int) and not name.startswith(("L_", "_"))
}
OUTSIDE_LOCK: Final = frozenset({"write_copy"})


@entry("v(I, i)")
def fail(L: Any, point: int) -> None:
    """Die (or stop) here if this point is armed and has been passed often enough."""
    if L[L_FP_ID] == point:
        L[L_FP_SKIP] -= 1
        if L[L_FP_SKIP] < 0:
            L[L_FP_ID] = 0
            kill(getpid(), L[L_FP_SIGNAL])


def arm(L: Any, name: str, *, skip: int = 0, sig: int = signal.SIGKILL) -> None:
    """Let the process that owns ``L`` get ``sig`` when it passes ``name`` for the ``skip + 1``-th time."""
    if name not in NAMES:
        raise ConfigError(f"no failpoint is called {name!r}; there are: {', '.join(sorted(NAMES))}")
    L[L_FP_SKIP] = skip
    L[L_FP_SIGNAL] = int(sig)
    L[L_FP_ID] = NAMES[name]


def arm_from_environment(L: Any) -> None:
    """Arm what ``KVPLUG_FAILPOINT`` names, if it is set."""
    text = os.environ.get(ENV)
    if not text:
        return
    name, _, rest = text.partition(":")
    skip, _, sig = rest.partition(":")
    try:
        arm(L, name, skip=int(skip or 0), sig=int(sig or signal.SIGKILL))
    except ValueError as e:
        raise ConfigError(f"{ENV}={text!r} is not NAME[:SKIP[:SIGNAL]]: {e}") from e
