"""Who will be evicted next, and which of those are worth keeping: looked at without the lock, changed by nothing.

A forecast orders what :mod:`kvplug.shm.victims` would propose, by the same policy and from windows of the same size,
and takes the first of it until an :data:`AHEAD_SHARE` of the pool would be free. What is in that part goes soon.

Rows do not count how often a block was used; but every use dates it (``R_TICK``) or pins it, and whoever looks again
and again sees that. So each row has a word of this process's own memory: the generation and the tick that it had at
the last look, how many uses were seen since it was first there, and whether it was offered to somebody since its last
use. That is 8 bytes a row, a two-thousandth of the pool at most. Uses between two looks count as one.

One use is none: an engine dates what a request has stored once more when the request is over. So a block is worth
keeping from :data:`WORTH_USES` uses on, or when somebody was seen reading it. What was there before the first look is
given the benefit of the doubt.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvplug.shm import layout as lay
from kvplug.shm.bits import bit_of, word_of
from kvplug.shm.jit import entry
from kvplug.shm.layout import (
    GEN_SHIFT,
    H_ROWS_PER_SLAB,
    PIN_WORDS,
    R_PIN,
    R_SIZE,
    R_TICK,
    R_WORD,
    S_NSLOTS,
    S_ROW_STEP,
    S_STATE,
    SEALED,
    SLAB_OWNED,
    STATE_MASK,
    Geometry,
)
from kvplug.shm.local import L_CLIENT
from kvplug.shm.places import row_at, slab_at
from kvplug.shm.policies.base import Candidates, Policy
from kvplug.shm.read import exists
from kvplug.shm.rows import row_table, slab_table
from kvplug.shm.victims import SHARE_OF_WINDOW, WINDOW_SLOTS

I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

AHEAD_SHARE: Final = 1 / 8
"""Of the pool: what goes next until so much of it would be free is at risk."""
WORTH_USES: Final = 2
MOST_USES = 3
OFFERED = 4
GEN_MASK = (1 << 21) - 1
SEEN_GEN_SHIFT = 3
SEEN_TICK_SHIFT = 24
TICK_MASK = (1 << 39) - 1

assert MOST_USES | OFFERED == (1 << SEEN_GEN_SHIFT) - 1
assert (GEN_MASK + 1) << SEEN_GEN_SHIFT == 1 << SEEN_TICK_SHIFT
assert (TICK_MASK + 1) << SEEN_TICK_SHIFT == 1 << 63


class AtRisk(NamedTuple):
    """Blocks worth keeping that go soon, the most worth first, siblings side by side."""

    keys: U8
    """(N, 32)."""
    nbytes: I64
    slots: I64
    """-1: a sibling of one that was found, looked up by its key alone."""
    gens: I64

    @classmethod
    def nothing(cls) -> AtRisk:
        """None at all."""
        e = np.empty(0, np.int64)
        return cls(np.empty((0, 32), np.uint8), e, e, e)


@entry("i(I, I, I, i, i, i, I, I, I, I)")
def survey(
    T: Any, L: Any, seen: Any, begin: int, end: int, first_uses: int, rows: Any, words: Any, ticks: Any, sizes: Any
) -> int:
    """Look at the sealed slots of slabs ``begin … end``, bring ``seen`` up to date, and list the unpinned ones.

    ``first_uses``: what counts as seen of a block that was not there at the last look. ``sizes``: whole size words.
    """
    rps = T[H_ROWS_PER_SLAB]
    mine = bit_of(L[L_CLIENT])
    my_word = word_of(L[L_CLIENT])
    n = 0
    for slab in range(begin, end):
        s = slab_at(T, slab)
        if T[s + S_STATE] != SLAB_OWNED or T[s + S_ROW_STEP] <= 0:
            continue
        for i in range(T[s + S_NSLOTS]):
            row = slab * rps + i * T[s + S_ROW_STEP]
            if row >= (slab + 1) * rps or n >= rows.shape[0]:
                break
            r = row_at(T, row)
            word = T[r + R_WORD]
            if word & STATE_MASK != SEALED:
                continue
            tick = T[r + R_TICK]
            pinned = False
            used_by_others = False
            for w in range(PIN_WORDS):
                bits = T[r + R_PIN + w]
                pinned = pinned or bits != 0
                used_by_others = used_by_others or (bits & ~mine if w == my_word else bits) != 0
            gen = ((word >> GEN_SHIFT) & GEN_MASK) << SEEN_GEN_SHIFT
            before = seen[row]
            uses = before & MOST_USES
            offered = before & OFFERED
            if before == 0 or before & (GEN_MASK << SEEN_GEN_SHIFT) != gen:
                uses = first_uses
                offered = 0
            elif before >> SEEN_TICK_SHIFT != tick & TICK_MASK:
                uses = min(uses + 1, MOST_USES)
                offered = 0
            if used_by_others:
                uses = MOST_USES
            seen[row] = (tick & TICK_MASK) << SEEN_TICK_SHIFT | gen | offered | uses
            if not pinned:
                rows[n] = row
                words[n] = word
                ticks[n] = tick
                sizes[n] = T[r + R_SIZE]
                n += 1
    return n


class Forecast:
    """One process's watch over a pool. Not thread-safe; no lock of the pool's is taken, and none is waited for."""

    def __init__(self, T: I64, L: I64, geometry: Geometry, policy: Policy) -> None:
        self._T, self._L, self._geometry, self._policy = T, L, geometry, policy
        self._seen = np.zeros(geometry.n_rows, np.int64)
        self._first_uses = WORTH_USES
        self._looked_at = (-1, -1)
        self._rest = np.empty((3, 0), np.int64)
        self._last = AtRisk.nothing()
        self._found_something = True
        self._slabs = max(1, WINDOW_SLOTS // geometry.rows_per_slab)
        self._buffers = np.empty((4, min(geometry.n_rows, self._slabs * geometry.rows_per_slab)), np.int64)
        self._slab_table, self._rows = slab_table(T, geometry), row_table(T, geometry)

    def free_bytes(self) -> int:
        """What can be stored before something has to go."""
        t = self._slab_table
        state = t[:, lay.S_STATE]
        owned = t[state == lay.SLAB_OWNED]
        slots = int((owned[:, lay.S_FREE_COUNT] * owned[:, lay.S_STRIDE]).sum())
        whole = int(((state == lay.SLAB_FREE) | (state == lay.SLAB_UNRESERVED)).sum())
        return slots + whole * self._geometry.slab_bytes

    def look(self, most_bytes: int, most_blocks: int) -> AtRisk:
        """What goes soon and is worth keeping, but for what was offered; at most so much, but one block at least."""
        now = int(self._T[lay.H_EVENT_SEQ]), int(self._T[lay.H_TICK])
        self._rest = self._rest[:, :0]
        if now != self._looked_at or self._found_something:  # else nothing has changed, and there was nothing
            self._looked_at = now
            self._rest = self._soon()
            self._found_something = bool(self._rest.size)
        return self.more(most_bytes, most_blocks)

    def more(self, most_bytes: int, most_blocks: int) -> AtRisk:
        """The next of what the last look has found, without looking anew; blocks that have gone since are left out."""
        self._last = AtRisk.nothing()
        while self._rest.size and not len(self._last.keys):
            some, rest = self._rest[:, :most_blocks], self._rest[:, most_blocks:]
            self._last, left = self._together(some, most_bytes, most_blocks)
            self._rest = np.concatenate((some[:, left], rest), axis=1)
        return self._last

    def _soon(self) -> I64:
        """(slots, words, whole size words) of what goes soon and is worth keeping, int64[3, N]."""
        short = int(self._geometry.data_bytes * AHEAD_SHARE) - self.free_bytes()
        found = self._windows(choosing=short > 0)
        self._first_uses = 0
        if short <= 0 or not len(found.slots):
            return self._rest[:, :0]
        order = self._policy.choose(found, len(found.slots))
        soon = order[: int(np.searchsorted(np.cumsum(found.nbytes[order] & lay.SIZE_MASK), short)) + 1][::-1]
        seen = self._seen[found.slots[soon]]
        soon = soon[(seen & MOST_USES >= WORTH_USES) & (seen & OFFERED == 0)]
        return np.stack((found.slots[soon], found.words[soon], found.nbytes[soon]))

    def offered(self, which: npt.NDArray[np.bool_]) -> None:
        """These of what was named last were offered: none is named again until it is used, or stored anew."""
        blocks = self._last
        which = which & (blocks.slots >= 0)
        slots = blocks.slots[which]
        same = (self._seen[slots] >> SEEN_GEN_SHIFT) & GEN_MASK == blocks.gens[which] & GEN_MASK
        self._seen[slots[same]] |= OFFERED

    def _windows(self, *, choosing: bool) -> Candidates:
        """Bring all rows up to date; of each window, what would go first. ``nbytes`` are whole size words here."""
        kept = [np.empty((4, 0), np.int64)]
        for begin in range(0, self._geometry.n_slabs, self._slabs):
            end = min(begin + self._slabs, self._geometry.n_slabs)
            n = int(survey(self._T, self._L, self._seen, begin, end, self._first_uses, *self._buffers))
            if choosing and n:
                some = Candidates(*self._buffers[:, :n])
                kept.append(self._buffers[:, self._policy.choose(some, max(1, n // SHARE_OF_WINDOW))])
        return Candidates(*np.ascontiguousarray(np.concatenate(kept, axis=1)))

    def _together(self, some: I64, most_bytes: int, most_blocks: int) -> tuple[AtRisk, npt.NDArray[np.bool_]]:
        """Whole families, in the order of their first member, and which slots found no room among them.

        A family that is not all there is worth nothing, and not looked at again until it is used.
        """
        slots, words, sizes = some
        keys = self._rows[slots, lay.R_KEY : lay.R_KEY + 4]
        same = self._rows[slots, lay.R_WORD] == words  # else the key may be another block's
        left = np.zeros(len(slots), np.bool_)
        slots, words, sizes, keys = slots[same], words[same], sizes[same], keys[same]
        if not len(slots):
            return AtRisk.nothing(), left
        which = sizes >> lay.SIBLING_SHIFT
        number, count = which & lay.SIBLING_MASK, (which >> lay.SIBLING_BITS) + 1
        keys[:, 3] ^= number << lay.SIBLING_KEY_SHIFT
        _, first, family = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        rank = np.argsort(first, kind="stable")
        place = np.empty(len(rank), np.int64)
        place[rank] = np.arange(len(rank))
        first, family = first[rank], place[family.ravel()]
        starts = np.cumsum(count[first]) - count[first]
        of = np.repeat(first, count[first])
        other = np.arange(len(of), dtype=np.int64) - np.repeat(starts, count[first])
        all_keys = keys[of]
        all_keys[:, 3] ^= other << lay.SIBLING_KEY_SHIFT
        there = np.zeros(len(of), np.bool_)
        exists(self._T, self._L, all_keys, there)
        nbytes = sizes[of] & lay.SIZE_MASK
        all_slots = np.full(len(of), -1, np.int64)
        all_gens = np.full(len(of), -1, np.int64)
        known = starts[family] + number
        all_slots[known], all_gens[known] = slots, words >> GEN_SHIFT
        whole = np.logical_and.reduceat(there, starts)
        self._seen[slots[~whole[family]]] |= OFFERED
        blocks_so_far = np.cumsum(np.where(whole, count[first], 0))
        bytes_so_far = np.cumsum(np.where(whole, np.add.reduceat(nbytes, starts), 0))
        fits = (blocks_so_far <= most_blocks) & ((bytes_so_far <= most_bytes) | (np.cumsum(whole) == 1))
        take = np.repeat(whole & fits, count[first])
        left[same] = (whole & ~fits)[family]
        named = np.ascontiguousarray(all_keys[take]).view(np.uint8).reshape(-1, 32)
        return AtRisk(named, nbytes[take], all_slots[take], all_gens[take]), left
