"""Groups of blocks that the controller keeps in the pool: each leaves whole, or a death has parted it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np

from kvplug import KvStore
from kvplug.errors import Code
from tests.stress import content
from tests.stress.board import Board

KEPT: Final = 24
PATIENCE_S: Final = 10.0
_ids = iter(range(1 << 62))


class KeptGroups:
    """Groups in one pool. ``wake``: continue whoever is paused, so that the lock comes back."""

    def __init__(self, store: KvStore, board: Board, wake: Callable[[], None]) -> None:
        self._store, self._board, self._wake = store, board, wake
        self._kept: dict[int, list[bytes]] = {}
        self._parted = 0

    def _in_part(self) -> set[int]:
        """Groups of which a part is there and a part is not. Those that are gone are forgotten."""
        parts = {n: self._store.exists(names) for n, names in self._kept.items()}
        self._kept = {n: names for n, names in self._kept.items() if parts[n].any()}
        return {n for n in self._kept if not parts[n].all()}

    def check(self, when: str, deaths: int) -> None:
        """A death in a section may part the one group that was just leaving; nothing else parts any. Keeps new ones."""
        parted = self._in_part()
        if parted and self._had_lock():  # whoever was at it then has ended since
            parted &= self._in_part()
            self._parted += len(parted)
            self._kept = {n: names for n, names in self._kept.items() if n not in parted}
            if self._parted > deaths:
                self._board.violation("parted", f"{when}: {self._parted} groups left in part after {deaths} deaths")
        while len(self._kept) < KEPT and (names := self._new()):
            self._kept[next(_ids)] = names
        # One of each is dated as new: the others are victims long before it.
        self._store.touch([names[0] for names in self._kept.values()])

    def one_leaves(self) -> None:
        """With nobody else there: what is removed takes its siblings along, but for one that is pinned."""
        if names := self._new():
            with self._store.pin(names[2:3]):
                self._store.remove(names[:1])
                if (there := self._store.exists(names).tolist()) != [False, False, True]:
                    self._board.violation("parted", f"of a group whose last is pinned: {there}")

    def _new(self) -> list[bytes]:
        """The keys of one more group, whole; empty if it could not be stored, or was evicted meanwhile."""
        number = next(_ids)
        names = [content.sibling("kept group", number, i) for i in range(content.GROUP)]
        for i, name in enumerate(names):
            data = content.words(name, content.GROUP_BYTES)
            at = np.array([[data.ctypes.data]])
            if self._store.put_fragments([name], at, [data.nbytes], siblings=(content.GROUP, i))[0] != Code.OK:
                return []
        return names if self._store.exists(names).all() else []

    def _had_lock(self) -> bool:
        """Whether the lock was had once: every section that was under way before is over."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self._store.remove([content.key("nobody's", 0, 0)])[0] != Code.TIMEOUT:
                return True
            self._wake()
            time.sleep(0.01)
        return False
