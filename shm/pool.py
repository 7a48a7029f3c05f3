"""One attached pool: batches in, codes out. What :class:`kvplug.store.KvStore` and the adapters stand on.

All arrays are numpy; keys are int64 (N, 4) views of N 32-byte keys. Nothing here raises for a full pool, a missing
key or a lock that can't be had: those are codes (:class:`kvplug.errors.Code`). Calls that must happen sooner or later
(releasing a pin, sealing, aborting) and find the lock busy past the deadline are queued and done by a later call or
by the maintenance thread.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvplug.errors import Code, ConfigError, PoolError, StoreClosedError
from kvplug.shm import layout as lay
from kvplug.shm import pins, read, reap, segment, write
from kvplug.shm.attach import PoolOptions, attach, reap_dead
from kvplug.shm.batch import I8, I64, SlotBatch, part_offsets
from kvplug.shm.events import EventReader
from kvplug.shm.integrity import findings, prepare, raise_findings
from kvplug.shm.layout import Geometry
from kvplug.shm.liveness import close_private, count_locks
from kvplug.shm.local import HOLD_RING, HOLD_RING_LEN, L_CLIENT, L_HOLDS, L_SESSION
from kvplug.shm.maintenance import Maintenance, reserve_next_slab
from kvplug.shm.policies import by_number
from kvplug.shm.scan import expired_rows
from kvplug.shm.slabs import NOT_BEGUN, drain_step, raise_watermark
from kvplug.shm.victims import VictimFinder
from kvplug.threads import troubles

__all__ = ["Pool", "SlotBatch", "part_offsets"]

log = logging.getLogger("kvplug")

RESERVE_KEYS_A_SECTION: Final = 256
RESERVE_ROUNDS: Final = 64  # scans and slab moves that one batch may ask for
EXPIRED_AT_A_TIME: Final = 4096
_attached: weakref.WeakSet[Pool] = weakref.WeakSet()
_loans = itertools.count()


def _let_go(description: list[int]) -> None:
    """Close the file description, once: with it go this client's liveness and whatever it held."""
    with contextlib.suppress(IndexError):
        close_private(description.pop())


class Pool:
    """A client of one pool. Thread-safe. After a fork the child's copy attaches anew, in a session of its own."""

    def __init__(
        self, name: str, options: PoolOptions, *, create: bool = True, session: int = 0, pool_uuid: bytes | None = None
    ) -> None:
        self.name = name
        self.options = options
        self.is_closed = False
        self._patience_s = options.lock_timeout_s
        self._warned: set[str] = set()
        self._attach(create, session, pool_uuid)

    def _attach(self, create: bool, session: int, pool_uuid: bytes | None) -> None:
        self.segment, self.L = attach(self.name, self.options, create=create, session=session, pool_uuid=pool_uuid)
        self.T = self.segment.table
        self.geometry: Geometry = self.segment.geometry
        self.policy = by_number(int(self.T[lay.H_POLICY]))
        self.base_address = self.segment.base
        self.lock_fd = self.segment.lock_fd
        self.client, self.session = int(self.L[L_CLIENT]), int(self.L[L_SESSION])
        self.life = object()
        self._description = [self.lock_fd]
        weakref.finalize(self, _let_go, self._description).atexit = False  # a store that was dropped, not closed
        self._lent: dict[int, int] = {}
        self._mutex = threading.RLock()
        self._growing = threading.Lock()
        self._pin_counts = np.zeros(self.geometry.n_rows, np.int32)
        self._pending: collections.deque[Callable[[], int]] = collections.deque()
        self._victims = VictimFinder(self.T, self.L, self.geometry, self.policy)
        self.is_forked = False
        if self.policy.name != self.options.policy:
            log.info(
                "pool %r evicts by %s, as it was created, not by %s", self.name, self.policy.name, self.options.policy
            )
        if int(self.T[lay.H_WATERMARK]) == 0:
            self.grow()
        _attached.add(self)
        self.reap()
        self._maintenance = Maintenance(self, prefault=self.options.prefault)

    # ---- calls under the lock ----------------------------------------------------------------------------------------

    def _ready(self) -> None:
        if self.is_closed:
            raise StoreClosedError(f"the store on pool {self.name!r} was closed")
        if self.is_forked:
            with self._mutex:
                if self.is_forked:
                    self._attach(True, 0, None)

    @contextlib.contextmanager
    def _only_thread(self) -> Any:
        self._ready()
        if not self._mutex.acquire(timeout=self._patience_s):
            yield False
            return
        try:
            self._ready()  # it may have been closed meanwhile, and its file description be another file's
            if self._pending:
                self._drain()
            yield True
        finally:
            self._mutex.release()

    def _drain(self) -> None:
        while self._pending:
            if self._pending[0]() == Code.TIMEOUT:
                return
            self._pending.popleft()

    def _now_or_later(self, section: Callable[[], int]) -> int:
        """Run a section that must happen; queue it if the lock is not to be had. Its answer, or Code.TIMEOUT."""
        with self._only_thread() as mine:
            # What is queued goes first: an acknowledgement must not overtake its abort.
            answer = int(section()) if mine and not self._pending else int(Code.TIMEOUT)
        if answer == Code.TIMEOUT:
            self._pending.append(section)
        return answer

    def on_reservations(self, section: Callable[..., int], slots: I64, gens: I64, *arguments: Any) -> I8:
        """One that must happen, over reservations, of which it gets copies; a code for each of them."""
        slots, gens = slots.copy(), gens.copy()
        codes = np.full(len(slots), Code.STALE, np.int8)
        answer = self._now_or_later(lambda: section(self.T, self.L, slots, gens, *arguments, codes))
        return codes if answer >= 0 else np.full(len(slots), answer, np.int8)

    # ---- writing -----------------------------------------------------------------------------------------------------

    def take_ticks(self, n: int) -> int:
        """First of ``n`` ticks of the recency clock, for a batch. No lock: a lost step only makes ties."""
        first = int(self.T[lay.H_TICK]) + 1
        self.T[lay.H_TICK] += n
        return first

    def reserve(
        self,
        keys: I64,
        part_nbytes: npt.ArrayLike,
        *,
        siblings: tuple[int, int] = (1, 0),
        dated: tuple[int, int, int] | None = None,
    ) -> SlotBatch:
        """A slot for each key that is not there yet, with one part per entry of ``part_nbytes``.

        ``siblings``: (count, index) of blocks that leave the pool together, each under the same key but for its index,
        XORed into the key's last two bytes (u16, little-endian).
        ``dated``: what batch these keys are a piece of: its first tick, its length, the number of keys before these.
        Codes: OK, EXISTS, IN_PROGRESS, FULL, BUDGET, TIMEOUT, RETIRED. Raises BlockTooLargeError, ConfigError,
        StoreClosedError.
        """
        sizes = np.ascontiguousarray(part_nbytes, np.int64)
        if not 1 <= len(sizes) <= lay.MAX_PARTS or int(sizes.min()) < 1:
            raise ConfigError(f"a block has 1 to {lay.MAX_PARTS} parts of at least one byte, not {sizes.tolist()}")
        _, size = part_offsets(sizes)
        which = lay.sibling_bits(*siblings)
        stride = self.geometry.stride(size, len(sizes))
        n = len(keys)
        dated = dated or (self.take_ticks(n), n, 0)
        out = SlotBatch.empty(n)
        out.nbytes[:] = size
        filled = (out.codes, out.slots, out.gens, out.offsets)
        with self._only_thread() as mine:
            if not mine:
                out.codes[:] = Code.TIMEOUT
                return out
            at = 0
            rounds = 0
            just_looked = False
            while at < n:
                v = self._victims.of(stride)
                proposed = (v.slots, v.words, v.ticks)
                end = min(at + RESERVE_KEYS_A_SECTION, n)
                got = int(
                    write.reserve(
                        self.T, self.L, keys, at, end, stride, size, which, sizes, *proposed, v.used, *filled, *dated
                    )
                )
                if got < 0:
                    out.codes[at:] = got
                    break
                just_looked = just_looked and got == at
                at = got
                if at == end:
                    continue
                rounds += 1
                too_good = just_looked and int(v.used[0]) < len(v.slots)  # what is there is worth more than the rest
                if too_good or rounds > RESERVE_ROUNDS or not (self.grow() or self._victims.refill(stride, n - at)):
                    self._report_full(keys, out, at)
                    break
                just_looked = True
        return out

    def _report_full(self, keys: I64, out: SlotBatch, at: int) -> None:
        there = self.exists(keys[at:])
        out.codes[at:] = np.where(there, np.int8(Code.EXISTS), np.int8(Code.FULL))
        write.count_full(self.T, self.L, int((~there).sum()))

    def complete(self, slots: I64, gens: I64, part: int, checksums: npt.NDArray[Any]) -> I8:
        """Part ``part`` of each slot is written: record its XXH3; the last part seals.

        Codes: OK, PENDING, STALE, TIMEOUT (queued).
        """
        sums = np.ascontiguousarray(checksums).view(np.int64).copy()
        return self.on_reservations(write.complete, slots, gens, part, sums)

    def abort(self, slots: I64, gens: I64, *, writers_done: bool) -> I8:
        """Give up reservations: FREE at once if nobody can write now, else QUARANTINED until :meth:`acknowledge`."""
        return self.on_reservations(write.abort, slots, gens, writers_done)

    def abort_later(self, slots: I64, gens: I64, *, writers_done: bool = False) -> None:
        """Queue the giving-up of reservations that were forgotten. For finalisers."""
        codes = np.empty(len(slots), np.int8)
        self._pending.append(lambda: write.abort(self.T, self.L, slots, gens, writers_done, codes))

    def count_written(self, nbytes: int) -> None:
        """Count bytes that were stored, at this client."""
        self.T[self.geometry.o_client + self.client * lay.CLIENT_WORDS + lay.C_WRITTEN_BYTES] += nbytes

    def acknowledge(self, slots: I64, gens: I64) -> I8:
        """Every possible writer of these quarantined reservations is done: free them."""
        return self.on_reservations(write.acknowledge, slots, gens)

    def acknowledge_later(self, slots: I64, gens: I64) -> None:
        """Queue an acknowledgement. For finalisers."""
        codes = np.empty(len(slots), np.int8)
        self._pending.append(lambda: write.acknowledge(self.T, self.L, slots, gens, codes))

    def still_writing(self, slots: I64, gens: I64) -> npt.NDArray[np.bool_]:
        """Whether each reservation still stands; to be asked before a write. No lock."""
        self._ready()
        out = np.zeros(len(slots), np.bool_)
        write.still_writing(self.T, self.L, slots, gens, out)
        return out

    def remove(self, keys: I64) -> I8:
        """Free the blocks with these keys, and their siblings: OK, MISSING, PINNED, IN_PROGRESS, TIMEOUT, RETIRED."""
        codes = np.full(len(keys), Code.TIMEOUT, np.int8)
        with self._only_thread() as mine:
            for at in range(0, len(keys) if mine else 0, RESERVE_KEYS_A_SECTION):
                part = slice(at, at + RESERVE_KEYS_A_SECTION)
                done = int(write.remove(self.T, self.L, keys[part], codes[part]))
                if done < len(keys[part]):
                    codes[at + done :] = Code.RETIRED if self.T[lay.H_RETIRED] else Code.TIMEOUT
                    break
        return codes

    # ---- reading -----------------------------------------------------------------------------------------------------

    def exists(self, keys: I64) -> npt.NDArray[np.bool_]:
        """Whether each key has a sealed block. No lock."""
        self._ready()
        out = np.zeros(len(keys), np.bool_)
        read.exists(self.T, self.L, keys, out)
        return out

    def match_prefix(self, keys: I64) -> int:
        """Number of leading keys with a sealed block. No lock."""
        self._ready()
        return int(read.match_prefix(self.T, self.L, keys))

    def touch(self, keys: I64) -> None:
        """Date these blocks, head of a prefix first, as used just now. No lock."""
        self._ready()
        read.touch(self.T, self.L, keys)

    def look_up(self, keys: I64) -> I8:
        """1: there; 0: not there; -1: not found, in an index that is being changed or in a pool that was removed.

        The index stays so until the next section where its changer died. No lock.
        """
        self._ready()
        changing = int(self.T[lay.H_INDEX_SEQ])
        there: I8 = self.exists(keys).view(np.int8)
        changing |= int(self.T[lay.H_INDEX_SEQ])
        if changing & 1 or int(self.T[lay.H_RETIRED]):
            there[there == 0] = -1
        return there

    def get_into(
        self, keys: I64, offsets: I64, dst_addrs: I64, dst_nbytes: I64, *, exact: bool = True
    ) -> tuple[I8, I64]:
        """Copy block *i* to destinations ``offsets[i] … offsets[i+1]-1``: its code and, where that is OK, its bytes.

        OK, MISSING, SIZE or CORRUPT. ``exact``: the destinations have as many bytes as the block, else at least as
        many. No lock.
        """
        self._ready()
        n = len(keys)
        codes = np.empty(n, np.int8)
        slots, words, copied = np.empty((3, n), np.int64)
        hits = read.get_into(
            self.T, self.L, keys, offsets, dst_addrs, dst_nbytes, int(exact), codes, slots, words, copied
        )
        if hits < n and self.options.verify:
            bad = codes == Code.CORRUPT
            self._drop(slots[bad], words[bad])
        return codes, copied

    def _drop(self, slots: I64, words: I64) -> None:
        if not len(slots):
            return
        self.warn_once("corrupt", f"pool {self.name!r}: block(s) did not match their checksum and were dropped")
        with self._only_thread() as mine:
            if mine:
                write.drop_corrupt(self.T, self.L, slots, words)

    def drop_corrupt(self, slots: I64, gens: I64) -> None:
        """Free blocks that :meth:`verify_part` found to be wrong, unless somebody (this client included) has a pin."""
        self._drop(slots, (gens << lay.GEN_SHIFT) | lay.SEALED)

    def pin(self, keys: I64, *, prefix: bool = False, touch: bool = True) -> SlotBatch:
        """Pin blocks; ``prefix``: the leading ones; ``touch``: date them. OK, MISSING, BUDGET, TIMEOUT, RETIRED."""
        out = SlotBatch.empty(len(keys))
        with self._only_thread() as mine:
            answer = int(Code.TIMEOUT)
            if mine:
                filled = (out.codes, out.slots, out.gens, out.offsets, out.nbytes)
                answer = int(pins.pin(self.T, self.L, self._pin_counts, keys, prefix, touch, *filled))
        if answer < 0:
            pinned = out.slots[out.slots >= 0].copy()
            out.codes[:] = answer
            out.slots[:] = -1
            if len(pinned):
                self.unpin(pinned)
        return out

    def unpin(self, slots: I64) -> None:
        """Release one pin of each slot; entries below zero are passed over. Never blocks for long: may be queued."""
        if len(slots) or self._pending:
            self._now_or_later(self._unpin_section(slots))

    def unpin_later(self, slots: I64) -> None:
        """Queue a release of pins. For finalisers, which may run anywhere and must not take locks."""
        self._pending.append(self._unpin_section(slots))

    def _unpin_section(self, slots: I64) -> Callable[[], int]:
        todo = slots.copy()

        def section() -> int:
            nonlocal todo  # what a section that timed out half-way has done is not done again
            todo = todo[int(pins.unpin(self.T, self.L, self._pin_counts, todo)) :]
            if not len(todo):
                return 0
            return int(Code.RETIRED if self.T[lay.H_RETIRED] else Code.TIMEOUT)

        return section

    def lend(self, owner: npt.NDArray[np.uint8], slot: int) -> None:
        """Let one pin of ``slot`` go with ``owner``, an array that nothing but users of the block refers to."""
        loan = next(_loans)
        self._lent[loan] = slot
        weakref.finalize(owner, self._returned, self.life, loan).atexit = False

    def _returned(self, life: object, loan: int) -> None:
        if self.life is not life:
            return
        slot = self._lent.pop(loan)
        if not self.is_closed:
            self.unpin_later(np.array([slot], np.int64))
        elif not self._lent:
            _let_go(self._description)

    def still_sealed(self, slots: I64, gens: I64) -> npt.NDArray[np.bool_]:
        """Whether each slot still holds the sealed block that it did. No lock."""
        self._ready()
        out = np.zeros(len(slots), np.bool_)
        pins.still_sealed(self.T, self.L, slots, gens, out)
        return out

    def verify_part(self, slots: I64, gens: I64, part: int) -> I8:
        """Compare one part of each pinned block with its checksum, in place: OK, CORRUPT or STALE."""
        self._ready()
        codes = np.empty(len(slots), np.int8)
        read.verify_part(self.T, self.L, slots, gens, part, codes)
        bad = int((codes == Code.CORRUPT).sum())
        self.T[self.geometry.o_client + self.client * lay.CLIENT_WORDS + lay.C_CORRUPT] += bad
        return codes

    # ---- upkeep ------------------------------------------------------------------------------------------------------

    def grow(self) -> bool:
        """Reserve one more slab of memory. False when all is reserved or there is no more."""
        if not self._warned.isdisjoint(("memory", "space")) or not self._growing.acquire(timeout=self._patience_s):
            return False
        try:  # without the thread lock: it may take longer than any call may wait
            slab = -1 if self.is_closed else reserve_next_slab(self)
        finally:
            self._growing.release()
        if slab < 0 or not self._mutex.acquire(timeout=self._patience_s):
            return False
        try:
            return not self.is_closed and int(raise_watermark(self.T, self.L, slab)) >= 0
        finally:
            self._mutex.release()

    def reap(self) -> int:
        """Reclaim what dead sessions left. Number of clients, or a lock code."""
        with self._only_thread() as mine:
            return reap_dead(self.segment, self.L, me=self.client) if mine else int(Code.TIMEOUT)

    def maintain(self) -> None:
        """One round of upkeep: queued sections, the dead, quarantine that ran out. Called by the maintenance thread."""
        if self.is_closed or self.is_forked:
            return
        with contextlib.suppress(StoreClosedError):
            with self._only_thread() as mine:  # drains the queue
                if mine:
                    self._tell_troubles()
            self.reap()
            self.release_expired()
            if int(self.T[lay.H_DRAINING]):  # its drainer may have died between two sections
                with self._only_thread() as mine:
                    if mine:
                        drain_step(self.T, self.L, NOT_BEGUN, -1)
            if not int(self.T[lay.H_RETIRED]) and not self.segment.still_named():
                self.T[lay.H_RETIRED] = 1
            if int(self.T[lay.H_RETIRED]):
                self.warn_once("name", f"pool {self.name!r} was removed: nothing is stored any more until a restart")

    def _tell_troubles(self) -> None:
        """What went wrong in this process's threads, into its row: for whoever looks at the pool."""
        trouble = troubles()
        at = self.geometry.o_client + self.client * lay.CLIENT_WORDS
        self.T[at + lay.C_THREAD_ERRORS] = sum(trouble.errors.values())
        self.T[at + lay.C_DEAD_THREADS] = sum(trouble.dead.values())

    def release_expired(self) -> int:
        """Free slots whose quarantine has run out. Their number."""
        out = np.empty(EXPIRED_AT_A_TIME, np.int64)
        n = int(expired_rows(self.T, time.monotonic_ns(), 0, self.geometry.n_slabs, out))
        if n:
            with self._only_thread() as mine:
                if mine:
                    n = int(write.release_expired(self.T, self.L, out[:n].copy()))
        return max(n, 0)

    def warn_once(self, topic: str, message: str) -> None:
        """One log line per topic and store."""
        if topic not in self._warned:
            self._warned.add(topic)
            log.warning("%s", message)

    def hold_times_ns(self) -> I64:
        """How long the last sections of this store held the lock."""
        n = min(int(self.L[L_HOLDS]), HOLD_RING_LEN)
        return self.L[HOLD_RING : HOLD_RING + n].copy()

    def events(self, max_events: int = 4096) -> EventReader:
        """A reader of the event ring, from now on."""
        self._ready()
        return EventReader(self.T, self.L, max_events=max_events)

    def check_integrity(self, *, deep: bool = True) -> None:
        """Raise IntegrityError if any invariant of the tables is broken; ``deep`` also checks every block's bytes."""
        prepare()
        with self._only_thread() as mine:
            n, sentences = findings(self.T, self.L, deep=deep) if mine else (int(Code.TIMEOUT), [])
        raise_findings(self.name, n, sentences, self.options.lock_timeout_s)

    def close(self) -> None:
        """Release pins, leave, and reclaim what this session had in writing if it was its last process. Idempotent.

        Blocks that somebody still has a view of keep their pins, and the client its row, until the last view is gone.
        """
        if self.is_forked:
            self.is_closed = True
            return
        self._maintenance.stop()
        with self._mutex, self._growing:
            if self.is_closed:
                return
            held = np.setdiff1d(np.flatnonzero(self._pin_counts), list(self._lent.values()))
            self._pin_counts[held] = 1
            self.unpin(held.astype(np.int64))
            self._drain()
            self.is_closed = True
            if self._lent:  # the last of them to go closes the description, and others reap the row
                return
            if int(reap.withdraw(self.T, self.L)) == 0:
                reap_dead(self.segment, self.L)
            _attached.discard(self)
            if int(self.T[lay.H_PERSIST]) == 1:  # any other value was never written by kvplug
                self._remove_if_last()
            _let_go(self._description)

    def _remove_if_last(self) -> None:
        with contextlib.suppress(PoolError), segment.name_lock(self.name):
            if not count_locks(self.lock_fd) and self.segment.still_named():
                segment.remove_segment_file(self.segment.path)

    def _after_fork(self) -> None:
        """In the child, whose copies of descriptions :mod:`kvplug.shm.liveness` closed: the next call attaches anew."""
        self.is_forked = True
        self.life = object()  # handles that were copied with it do nothing any more
        self._description.clear()
        self._lent = {}
        self._mutex, self._growing = threading.RLock(), threading.Lock()


def _after_fork_in_child() -> None:
    for pool in list(_attached):
        pool._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
