"""Words of one attached store's private memory, an int64 array ``L`` that kernels get beside the shared ``T``."""

from __future__ import annotations

from typing import Final

L_FD: Final = 0  # file description of this store's own: pool lock (flock) and liveness byte (OFD lock)
L_TIMEOUT_NS: Final = 1
L_CLIENT: Final = 2  # row in the client table
L_SESSION: Final = 3
L_PID: Final = 4
L_BASE: Final = 5  # address of the mapping
L_DOWN: Final = 6  # the lock timed out: one try a call until it is had again
L_T0: Final = 7  # when the section began
L_FP_ID: Final = 8
L_FP_SKIP: Final = 9
L_FP_SIGNAL: Final = 10
L_TOUCH: Final = 11  # order in which a batch is touched (policy): 0 not at all, 1 head first, 2 tail first
L_PIN_BUDGET: Final = 12  # rows: slots times the smallest blocks that each has room for
L_RESERVE_BUDGET: Final = 13  # rows
L_VERIFY: Final = 14
L_SELF: Final = 15  # address of this array
L_HOLDS: Final = 16  # sections so far
L_HOLD_MAX_NS: Final = 17
L_TIMEOUTS: Final = 18
L_THREAD: Final = 19  # 1 while one of this store's threads is in a section, or waits for the pool's lock to begin one
L_SHUT: Final = 20  # the store was closed: no section begins any more, and the file description may be gone
L_FLOCK: Final = 24  # four words: struct flock, for a question to the kernel
HOLD_RING: Final = 32  # the last hold times, ns
HOLD_RING_LEN: Final = 4096
LOCAL_WORDS: Final = HOLD_RING + HOLD_RING_LEN
