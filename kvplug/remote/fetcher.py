"""Blocks that are missing here and that another host has, fetched in the background for an engine that will use them.

An engine that finds less than a whole prefix in its pool says what is missing, gets a :class:`Fetch` at once and looks
at it later. Threads of the :class:`Fetcher` ask who has most of it, fetch that (:mod:`kvplug.rdma.reader.remote`) and
pin what there is until the engine has looked it up. What arrived is an ordinary block of this pool; whatever went
wrong, the engine computes what is not there.

    start → who has it? → worth it? → read a slice, seal it, look at the clock → … → pin → done

**Not late.** The deadline of a fetch is ``fetch_timeout_s`` after its start, and moves on by half of the time that
computing would have taken for the tokens that have arrived and can be used. So a fetch that brings nothing costs the
time-out at most, and one that goes well is not cut off.

**Worth it.** With the bandwidth that the peer had lately and the tokens per second that the engine computes, a fetch is
begun, and goes on from slice to slice, only while it is faster than computing, with a margin. What is unknown is tried.

**Once.** Where a prefix is being fetched, the next request for it waits for that and then looks what is still missing.
That is by a table in this process; other processes are told by the pool that its slots are in writing, and wait too.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter, OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import numpy as np
import numpy.typing as npt

from kvplug.config import Config
from kvplug.errors import Code, StoreClosedError
from kvplug.rdma.reader.speed import Measured
from kvplug.remote.process import FetchProcess
from kvplug.remote.request import Fetch, Outcome, Plan, Planner, Wanted, leading
from kvplug.remote.sources import Sources, Standing
from kvplug.store import KvStore
from kvplug.threads import LivingThread, note

__all__ = ["Fetch", "Fetcher", "Outcome", "Plan", "Planner", "Wanted", "leading"]

I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]

THREADS: Final = 4
MARGIN: Final = 1.25
"""A fetch must be expected to be faster than computing by this factor."""
LEAST_GAIN_S: Final = 0.01
"""What is computed in less is not asked for: the question alone may take as long."""
SLICE_S: Final = 0.25
"""About how long a fetch goes on before its clock and its worth are looked at again."""
FIRST_SLICE_BYTES: Final = 8 << 20
MOST_SLICE_BYTES: Final = 1 << 30
MOST_POOL_SHARE: Final = 0.5
"""Of the pool, for one prefix: more would push out its own head."""
HOLD_S: Final = 2.0
"""How long what was fetched stays pinned for an engine that does not come for it."""
MISS_FOR_S: Final = 1.0
MAX_MISSES: Final = 4096
PAUSE_FIRST_S: Final = 0.002
PAUSE_MOST_S: Final = 0.05
BUDGET_TURNS: Final = 12
"""How often in a row a fetch that has no room, here or among the owner's leases, is tried again: half a second."""
CLOSE_S: Final = 3.0

_COUNTED: Final = {
    Outcome.MISSING: "fetch_misses",
    Outcome.TIMEOUT: "fetch_timeouts",
    Outcome.NOT_WORTH_IT: "fetch_not_worth_it",
    Outcome.NO_ROOM: "fetch_no_room",
}


class Fetcher:
    """What fetches for one engine process's store. Thread-safe. A copy that a fork made fetches nothing."""

    def __init__(self, store: KvStore, config: Config, sources: Sources | None = None) -> None:
        """``sources``: the other hosts; default: as the settings say, by a process that this starts.

        Raises ConfigError: settings of peers that can't be used. Close it before the store.
        """
        self._store, self._timeout_s = store, config.fetch_timeout_s
        self._most_bytes = int(store.data_bytes * MOST_POOL_SHARE)
        self._sources: Sources = FetchProcess(store, config, THREADS) if sources is None else sources
        self._pid = os.getpid()
        self._mutex = threading.RLock()
        self._under_way: dict[bytes, tuple[Fetch, list[Fetch]]] = {}  # by first missing key: it, and who waits for it
        self._unfinished: set[Fetch] = set()
        self._running: dict[Future[None], bytes] = {}
        self._misses: OrderedDict[bytes, float] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._closing = threading.Event()
        self._pins = _Pins(store)
        self._threads = ThreadPoolExecutor(THREADS, "kvplug-fetch")

    def start(self, wanted: Wanted, *, tokens_per_s: float | None = None, timeout_s: float | None = None) -> Fetch:
        """Begin to fetch. The calling thread asks nobody and waits for nobody.

        ``tokens_per_s``: how fast the engine computes, None if that is not known. ``timeout_s``: longest that it may
        take, whatever arrives; default: the setting, moved on by progress. Where there is no use, the answer is done.
        """
        budget_s = self._timeout_s if timeout_s is None else timeout_s
        fetch = Fetch(wanted, budget_s, moves=timeout_s is None, tokens_per_s=tokens_per_s)
        if os.getpid() != self._pid or self._closing.is_set():
            return fetch.end(Outcome.GIVEN_UP)
        name = wanted.keys[wanted.first].tobytes()
        with self._mutex:
            if tokens_per_s and wanted.tokens / tokens_per_s < LEAST_GAIN_S:
                self._counts["fetch_not_worth_it"] += 1
                return fetch.end(Outcome.NOT_WORTH_IT)
            if self._misses.get(name, 0.0) > fetch.began:
                self._counts["fetch_misses"] += 1
                return fetch.end(Outcome.MISSING)
            self._unfinished.add(fetch)
            if name in self._under_way:
                self._under_way[name][1].append(fetch)
            else:
                self._submit(name, fetch, [])
        return fetch

    def _submit(self, name: bytes, fetch: Fetch, followers: list[Fetch]) -> None:
        """With the mutex held."""
        try:
            running = self._threads.submit(self._run, name, fetch)
        except RuntimeError:  # closed just now, or no thread is left
            for one in (fetch, *followers):
                self._unfinished.discard(one)
                one.end(Outcome.GIVEN_UP)
            return
        self._under_way[name] = fetch, followers
        self._running[running] = name
        running.add_done_callback(self._look_for_errors)

    def _look_for_errors(self, running: Future[None]) -> None:
        with self._mutex:
            name = self._running.pop(running)
            if running.cancelled():  # it never ran: nobody else takes it from the list, and close() ends it
                self._under_way.pop(name, None)
        error = None if running.cancelled() else running.exception()
        if error is not None:
            self._count("fetch_errors")
            note("kvplug-fetch", error, "what was being fetched from another host is computed instead")

    # ---- on the fetcher's threads ------------------------------------------------------------------------------------

    def _run(self, name: bytes, fetch: Fetch) -> None:
        outcome = Outcome.GIVEN_UP
        try:
            with contextlib.suppress(StoreClosedError):
                outcome = self._fetch(fetch)
                if fetch.tokens or outcome is Outcome.PRESENT:
                    self._pins.keep(fetch)
        finally:
            self._finish(name, fetch, outcome)

    def _finish(self, name: bytes, fetch: Fetch, outcome: Outcome) -> None:
        """Whatever came of it, who waits is told, and whoever wants the same comes next."""
        with self._mutex:
            if outcome in _COUNTED:
                self._counts[_COUNTED[outcome]] += 1
            self._counts["fetched_tokens"] += fetch.tokens
            if outcome is Outcome.MISSING and not fetch.tokens:
                self._misses[name] = time.monotonic() + MISS_FOR_S
                self._misses.move_to_end(name)
                if len(self._misses) > MAX_MISSES:
                    self._misses.popitem(last=False)
            self._unfinished.discard(fetch)
            followers = self._under_way.pop(name)[1]
            fetch.end(outcome)
            if followers:
                self._submit(name, followers[0], followers[1:])

    def _fetch(self, fetch: Fetch) -> Outcome:
        """Bring what is worth it; how it ended."""
        wanted = fetch.wanted
        keys, plan = wanted.keys, wanted.plan
        here = self._store.exists(keys)
        before = now = plan(here).tokens
        most = plan(np.ones(len(keys), np.bool_)).tokens
        if before >= most:
            return Outcome.PRESENT
        if self._is_over(fetch):
            return Outcome.TIMEOUT
        holders, silent = self._sources.who_has(keys, fetch.deadline)
        outcome = Outcome.TIMEOUT if silent and not holders else Outcome.MISSING
        while now < most and not self._is_over(fetch):
            plans = [(plan(here | have), peer) for peer, have in holders if not peer.is_down]
            best, peer = max(plans, key=lambda p: (p[0].tokens, p[1].speed.bytes_per_s or 0.0), default=(None, None))
            if best is None or peer is None or best.tokens <= now:
                break
            holders = [(other, have) for other, have in holders if other is not peer]
            ended = self._read(fetch, peer, best, here, before)
            here = self._store.exists(keys)
            now = plan(here).tokens
            fetch.progress(now - before)
            outcome = ended if outcome is Outcome.MISSING or ended is Outcome.FETCHED else outcome
            if ended is Outcome.NO_ROOM:
                break
        if now < most and self._is_over(fetch):
            return Outcome.GIVEN_UP if fetch.unwanted else Outcome.TIMEOUT
        return outcome

    def _is_over(self, fetch: Fetch) -> bool:
        return fetch.unwanted or self._closing.is_set() or time.monotonic() >= fetch.deadline

    def _read(self, fetch: Fetch, peer: Standing, best: Plan, here: npt.NDArray[np.bool_], before: int) -> Outcome:
        """Read what is missing for this plan from this peer, in slices."""
        keys, plan = fetch.wanted.keys, fetch.wanted.plan
        todo = best.index[~here[best.index]]
        nbytes = np.broadcast_to(np.asarray(fetch.wanted.nbytes, np.int64), len(keys))[todo]
        fits = int(np.searchsorted(np.cumsum(nbytes), self._most_bytes, "right"))
        todo, nbytes = todo[:fits], nbytes[:fits]
        self._count("fetches")
        pause_s, turns_without, outcome = PAUSE_FIRST_S, 0, Outcome.FETCHED
        now = plan(here).tokens
        while len(todo) and not self._is_over(fetch):
            if not _worth(fetch, peer.speed, int(nbytes.sum()), best.tokens - now):
                return Outcome.NOT_WORTH_IT
            n = _slice(peer.speed, nbytes)
            began = time.monotonic()
            codes, standing = self._sources.fetch(peer.address, keys[todo[:n]], fetch.deadline)
            peer = standing or peer
            arrived = codes == Code.OK
            with self._mutex:
                self._counts["fetched_blocks"] += int(arrived.sum())
                self._counts["fetched_bytes"] += int(nbytes[:n][arrived].sum())
                self._counts["fetch_ns"] += int((time.monotonic() - began) * 1e9)
            later = (codes == Code.IN_PROGRESS) | (codes == Code.BUDGET)  # somebody else is at it, or has the room
            lost = np.flatnonzero((codes < 0) & ~later)
            end = n
            if len(lost):
                outcome, end = _why(int(codes[lost[0]])), int(lost[0])
            rest = np.concatenate((np.flatnonzero(later[:end]), np.arange(n, n if len(lost) else len(todo))))
            todo, nbytes = todo[rest], nbytes[rest]
            now = plan(self._store.exists(keys)).tokens
            self._progress(fetch, now - before)
            turns_without = 0 if arrived.any() or (codes == Code.IN_PROGRESS).any() else turns_without + 1
            if turns_without > BUDGET_TURNS:
                return Outcome.NO_ROOM
            if later[:end].any():
                pause_s = PAUSE_FIRST_S if arrived.any() else min(1.5 * pause_s, PAUSE_MOST_S)
                self._closing.wait(pause_s)
        return Outcome.TIMEOUT if len(todo) else outcome

    def _progress(self, fetch: Fetch, tokens: int) -> None:
        grown = tokens - fetch.tokens
        fetch.progress(tokens)
        if grown > 0:
            with self._mutex:
                waiting = list(self._under_way[fetch.wanted.keys[fetch.wanted.first].tobytes()][1])
            for one in waiting:
                one.progress(one.tokens + grown)

    # ---- figures, end ------------------------------------------------------------------------------------------------

    def _count(self, what: str, n: int = 1) -> None:
        with self._mutex:
            self._counts[what] += n

    def take_counts(self) -> Counter[str]:
        """What was counted since the last call, by name.

        fetches, fetched_blocks, fetched_bytes, fetched_tokens; fetch_ns: time in which they came; fetch_misses,
        fetch_timeouts, fetch_not_worth_it, fetch_no_room, fetch_errors: fetches that ended so.
        """
        with self._mutex:
            counts, self._counts = self._counts, Counter()
        return +counts

    def close(self) -> None:
        """End every fetch, hang up, release every pin. Waits for what is just being written. Idempotent."""
        if os.getpid() != self._pid or self._closing.is_set():
            return
        self._closing.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sources.close()
        deadline = time.monotonic() + CLOSE_S
        with self._mutex:
            running = [future for future in self._running if not future.cancelled()]
        wait(running, max(0.0, deadline - time.monotonic()))
        with self._mutex:
            for fetch in self._unfinished:
                fetch.end(Outcome.GIVEN_UP)
        self._pins.close()


def _worth(fetch: Fetch, speed: Measured, nbytes: int, tokens: int) -> bool:
    """Whether so many bytes of this peer are expected well before so many tokens were computed."""
    expected = speed.seconds_for(nbytes)
    return expected is None or not fetch.tokens_per_s or expected * MARGIN <= tokens / fetch.tokens_per_s


def _slice(speed: Measured, nbytes: I64) -> int:
    """How many of these blocks to read before looking at the clock again."""
    rate = speed.bytes_per_s
    room = FIRST_SLICE_BYTES if rate is None else min(max(int(rate * SLICE_S), FIRST_SLICE_BYTES), MOST_SLICE_BYTES)
    return max(1, int(np.searchsorted(np.cumsum(nbytes), room, "right")))


def _why(code: int) -> Outcome:
    if code == Code.FULL:
        return Outcome.NO_ROOM
    return Outcome.TIMEOUT if code == Code.TIMEOUT else Outcome.MISSING


class _Pins:
    """What was fetched, kept in place until its engine has come for it or HOLD_S are over."""

    def __init__(self, store: KvStore) -> None:
        self._store = store
        self._held: OrderedDict[Fetch, float] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._watch: LivingThread | None = None

    def keep(self, fetch: Fetch) -> None:
        """Pin what this fetch's engine can use now."""
        keys, plan = fetch.wanted.keys, fetch.wanted.plan
        batch = self._store.pin_batch(keys[plan(self._store.exists(keys)).index])
        ok = batch.codes == Code.OK
        if not ok.any():
            return
        slots, gens = batch.slots[ok], batch.gens[ok]
        with self._changed:
            if self._watch is None and not self._closed:
                watch = LivingThread("kvplug-fetch-pins", self._expire)
                if not watch.start():  # nobody would let go of them
                    self._store.unpin(slots, gens)
                    return
                self._watch = watch
            self._held[fetch] = time.monotonic() + HOLD_S
            self._changed.notify()
        fetch.hold(lambda: self._let_go(fetch, slots, gens))
        if self._closed:
            fetch.release()

    def _let_go(self, fetch: Fetch, slots: I64, gens: I64) -> None:
        with self._changed:
            self._held.pop(fetch, None)
        with contextlib.suppress(StoreClosedError):  # then they went with the store
            self._store.unpin(slots, gens)

    def _expire(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                over = [fetch for fetch, until in self._held.items() if until <= now]
                if not over:
                    self._changed.wait(min(self._held.values(), default=now + 3600.0) - now)
                    continue
            for fetch in over:
                fetch.release()

    def close(self) -> None:
        """Release all."""
        with self._changed:
            self._closed = True
            held = list(self._held)
            self._changed.notify()
        for fetch in held:
            fetch.release()
