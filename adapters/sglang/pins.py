"""What a request was promised at lookup, and the pins that keep it there until it is loaded.

A promise belongs to a request id. It holds, for each source of pages, which pages from the request's first uncached
one on are pinned. The same question again is answered from it, and only what was not there is looked up again; a
question about a longer, shorter or later stretch of the same tokens moves the promise along. SGLang's page hashes are
chained, so two stretches are the same tokens if their hashes at one place are equal.

A promise ends when it is taken by a load, when the request is gone, when SGLang holds no hit for the request any more
(the ranks did not agree on one, or the request was aborted) or has matched it again without asking (its own cache has
everything by then), when the engine's namespace changes, or when the request was not asked about for LIFE_STEPS
scheduler steps. All of these happen at the same calls on all ranks, so that a load finds its promise on every rank or
on none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvplug.adapters.devices.base import Int64s
from kvplug.adapters.sglang.devicepools import KV
from kvplug.errors import Code
from kvplug.store import KvStore

Keys = npt.NDArray[np.uint8]
LIFE_STEPS = 256
"""SGLang asks again in the step in which it loads; a request that waits longer than this between two questions has
its pins released, and is looked up again. Counted in scheduler steps, since these are the same on all ranks."""


class NamesPages(Protocol):
    """What is needed of :class:`~kvplug.adapters.sglang.engine.RankEngine`."""

    epoch: int

    def keys(self, pool: str, hashes: Sequence[str], replicated: bool = False) -> Keys | None:
        """Keys of pages, (N, 32) uint8; None while nothing may be looked up."""
        ...


@dataclass
class Held:
    """Pages of one source: int64[N] each, as long as the promise's stretch."""

    slots: Int64s
    """-1 where nothing is pinned."""
    offsets: Int64s
    """Of the slot from the start of the pool's mapping, in bytes."""


@dataclass
class Promise:
    """See the module's first lines."""

    hashes: list[str]
    keys: dict[str, Keys]
    epoch: int
    held: dict[str, Held] = field(default_factory=dict)
    leading: int = 0
    """Pages of full attention that are pinned without a gap, from the first one on."""
    step: int = 0


@dataclass(frozen=True)
class Taken:
    """Pinned pages of one source on their way to a load: int64[N] each. Whoever has them releases them."""

    slots: Int64s
    offsets: Int64s


class Pins:
    """All promises of one rank. Used from SGLang's scheduler thread alone."""

    def __init__(
        self, engine: NamesPages, store: KvStore, sizes: Mapping[str, int], *, replicated: bool, verify: bool
    ) -> None:
        """``sizes``: per source, bytes of a block. ``verify``: checksums are compared before anything is promised."""
        self._engine = engine
        self._store = store
        self._sizes = dict(sizes)
        self._replicated = replicated
        self._verify = verify
        self._promises: OrderedDict[str, Promise] = OrderedDict()
        self._step = 0
        self._looked_up: str | None = None
        self.markers: Container[str] | None = None
        """Requests for which SGLang holds a hit."""
        self.corrupt = 0
        """Blocks found to be corrupt so far; they were removed."""
        self.swept = 0
        """Promises so far that ended because SGLang had forgotten them."""

    def __len__(self) -> int:
        return len(self._promises)

    # -- lookup ------------------------------------------------------------------------------------------------------

    def lookup(self, rid: str, hashes: list[str], windows: Mapping[str, int]) -> list[int]:
        """Pins what there is of a stretch of pages; every length, in pages, that can be restored in full.

        Args:
            rid: the request.
            hashes: SGLang's hashes of the pages, the first uncached one first.
            windows: per source other than full attention's, how many pages before a length's end it needs.
        """
        self._looked_up = rid
        old = self._promises.pop(rid, None)
        ending = [old] if old is not None else []
        try:
            promise = self._moved_along(old, hashes) if old is not None else None
            if promise is None:
                promise = self._begin(hashes)
                if promise is None:
                    return []
                ending.append(promise)
            self._search(promise, len(hashes), windows)
            lengths = self._restorable(promise, len(hashes), windows)
            if lengths:
                ending = [one for one in ending if one is not promise]
                promise.step = self._step
                self._promises[rid] = promise
            return lengths
        finally:  # after the search, so that nothing is evicted in between; also after an error
            for one in ending:
                self._release(one)

    def _begin(self, hashes: list[str]) -> Promise | None:
        epoch = self._engine.epoch
        keys = self._keys(hashes)
        if keys is None or self._engine.epoch != epoch:  # by now: what this rank alone can't load it must not promise
            return None
        n = len(hashes)
        held = {name: Held(np.full(n, -1, np.int64), np.zeros(n, np.int64)) for name in self._sizes}
        return Promise(list(hashes), keys, epoch, held)

    def _keys(self, hashes: Sequence[str]) -> dict[str, Keys] | None:
        out = {}
        for name in self._sizes:
            keys = self._engine.keys(name, hashes, self._replicated)
            if keys is None:
                return None
            out[name] = keys
        return out

    def _moved_along(self, old: Promise, hashes: list[str]) -> Promise | None:
        """The promise itself if the question is about the same tokens; None if it is of no use."""
        if old.epoch != self._engine.epoch:
            return None
        try:
            skip = 0 if hashes[0] == old.hashes[0] else old.hashes.index(hashes[0])
        except ValueError:
            return None
        common = min(len(old.hashes) - skip, len(hashes))
        if skip >= max(old.leading, 1) or hashes[common - 1] != old.hashes[skip + common - 1]:
            return None
        if skip:  # the device has these by now
            self._store.unpin(np.concatenate([held.slots[:skip] for held in old.held.values()]))
            old.hashes = old.hashes[skip:]
            old.keys = {name: keys[skip:] for name, keys in old.keys.items()}
            old.held = {name: Held(held.slots[skip:], held.offsets[skip:]) for name, held in old.held.items()}
            old.leading -= skip
        more = hashes[len(old.hashes) :]
        if more:
            keys = self._keys(more)
            if keys is None or self._engine.epoch != old.epoch:
                return None
            old.hashes += more
            old.keys = {name: np.concatenate([old.keys[name], keys[name]]) for name in keys}
            for held in old.held.values():
                held.slots = np.concatenate([held.slots, np.full(len(more), -1, np.int64)])
                held.offsets = np.concatenate([held.offsets, np.zeros(len(more), np.int64)])
        return old

    def _search(self, promise: Promise, n: int, windows: Mapping[str, int]) -> None:
        """Pins what is there now and was not before."""
        first = promise.leading
        if first < n:
            got = self._pin(promise, KV, np.arange(first, n), prefix=True)
            promise.leading = first + got
        for name in windows:
            missing = np.flatnonzero(promise.held[name].slots[: min(promise.leading, n)] < 0)
            if len(missing):
                there = missing[self._store.exists(promise.keys[name][missing])]
                if len(there):
                    self._pin(promise, name, there, prefix=False)

    def _pin(self, promise: Promise, name: str, at: Int64s, *, prefix: bool) -> int:
        """Pins pages of one source; how many of the leading ones are pinned then."""
        keys = promise.keys[name][at[0] :] if prefix and at[-1] + 1 == len(promise.hashes) else promise.keys[name][at]
        batch = self._store.pin_batch(keys, prefix=prefix)
        good = (batch.codes == Code.OK) & (batch.nbytes == self._sizes[name])
        pinned = np.flatnonzero(batch.slots >= 0)
        if self._verify and len(pinned):
            codes = self._store.verify_parts(batch.slots[pinned], batch.gens[pinned], 0)
            bad = pinned[codes == Code.CORRUPT]
            good[pinned[codes != Code.OK]] = False
            if len(bad):
                self._store.unpin(batch.slots[bad])
                batch.slots[bad] = -1
                self._store.remove(keys[bad])
                self.corrupt += len(bad)
        leading = len(good) if good.all() else int(np.argmin(good))
        if prefix:
            good[leading:] = False
        surplus = batch.slots[~good]
        if (surplus >= 0).any():
            self._store.unpin(surplus)
        held = promise.held[name]
        held.slots[at[good]] = batch.slots[good]
        held.offsets[at[good]] = batch.offsets[good]
        return leading

    def _restorable(self, promise: Promise, n: int, windows: Mapping[str, int]) -> list[int]:
        longest = min(promise.leading, n)
        if not longest:
            return []
        lengths = np.arange(longest + 1)
        fits = np.ones(longest + 1, bool)
        for name, window in windows.items():
            before = np.concatenate(([0], np.cumsum(promise.held[name].slots[:longest] >= 0)))
            start = np.maximum(lengths - window, 0)
            fits &= before - before[start] == lengths - start
        found: list[int] = (np.flatnonzero(fits[1:]) + 1).tolist()
        return found

    # -- the end of a promise ----------------------------------------------------------------------------------------

    def take(self, rid: str, wanted: Mapping[str, Sequence[str]]) -> dict[str, Taken] | None:
        """Hands over what a load needs and releases the rest; None, and nothing stays pinned, if it was not promised.

        ``wanted``: per source, the hashes of the pages, which follow each other.
        """
        promise = self._promises.pop(rid, None)
        if promise is None:
            return None
        out: dict[str, Taken] = {}
        for name, hashes in wanted.items():
            at = self._place(promise, hashes)
            held = promise.held.get(name)
            if at is None or held is None or promise.epoch != self._engine.epoch or (held.slots[at] < 0).any():
                for taken in out.values():
                    self._store.unpin(taken.slots)
                self._release(promise)
                return None
            out[name] = Taken(held.slots[at].copy(), held.offsets[at].copy())
            held.slots[at] = -1
        self._release(promise)
        return out

    @staticmethod
    def _place(promise: Promise, hashes: Sequence[str]) -> slice | None:
        try:
            first = promise.hashes.index(hashes[0])
        except (ValueError, IndexError):
            return None
        last = first + len(hashes) - 1
        if last >= len(promise.hashes) or promise.hashes[last] != hashes[-1]:
            return None
        return slice(first, last + 1)

    def release(self, rid: str) -> None:
        """The request is gone, or does not want what it was promised."""
        promise = self._promises.pop(rid, None)
        if promise is not None:
            self._release(promise)

    def matched(self, rid: str) -> None:
        """SGLang has matched a request's prefix, and may have looked it up meanwhile."""
        looked_up, self._looked_up = self._looked_up == rid, None
        if not looked_up and rid in self._promises:
            self.swept += 1
            self.release(rid)
        self._forget_unmarked(rid)

    def end_of_step(self) -> None:
        """Once per scheduler step, between questions: ends promises that nobody will take."""
        self._step += 1
        if not self._promises:
            return
        for rid in list(self._promises):
            self._forget_unmarked(rid)
        while self._promises:
            rid, promise = next(iter(self._promises.items()))
            if promise.step + LIFE_STEPS > self._step:
                break
            self.release(rid)

    def _forget_unmarked(self, rid: str) -> None:
        """Ends a promise that SGLang did not take up: it holds no hit for the request."""
        if self.markers is not None and rid in self._promises and rid not in self.markers:
            self.swept += 1
            self.release(rid)

    def clear(self) -> None:
        """Ends all promises."""
        for rid in list(self._promises):
            self.release(rid)

    def _release(self, promise: Promise) -> None:
        slots = np.concatenate([held.slots for held in promise.held.values()])
        slots = slots[slots >= 0]
        if len(slots):
            self._store.unpin(slots)
        for held in promise.held.values():
            held.slots[:] = -1
