"""What compiled sections answer: the numbers of :class:`kvplug.errors.Code`, and a few that never leave this folder.

They are written out and then compared, not taken from there: a kernel that numba has kept on disk has them frozen in
it, and whether it may still be used is decided by the files of this folder alone (:mod:`kvplug.shm.jit`).
"""

from __future__ import annotations

from typing import Final

from kvplug.errors import Code

OK: Final = 0
EXISTS: Final = 1
PENDING: Final = 2
MISSING: Final = -1
IN_PROGRESS: Final = -2
FULL: Final = -3
TIMEOUT: Final = -4
CORRUPT: Final = -5
SIZE: Final = -6
BUDGET: Final = -7
STALE: Final = -8
RETIRED: Final = -9
PINNED: Final = -10

IS_SHUT: Final = -11
"""Of a section: this store was closed; callers raise StoreClosedError."""
NO_SESSION: Final = -20
"""Of reap.publish: the session that a client was to join has nobody left."""
ROW_TAKEN: Final = -21
"""Of reap.publish: the client's row is somebody's."""

assert {code.name: code.value for code in Code} == {name: globals().get(name) for name in Code.__members__}
assert not {IS_SHUT, NO_SESSION, ROW_TAKEN} & {code.value for code in Code}
