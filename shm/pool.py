"""One attached pool: batches in, codes out. What :class:`kvplug.store.KvStore` and the adapters stand on.

All arrays are numpy; keys are int64 (N, 4) views of N 32-byte keys. Nothing here raises for a full pool, a missing
key or a lock that can't be had: those are codes (:class:`kvplug.errors.Code`). Calls that must happen sooner or later
(releasing a pin, sealing, aborting) and find the lock busy past the deadline are queued and done by a later call or
by the maintenance thread.

*Exceptions from anywhere.* A signal handler may raise between any two instructions of the main thread, as for
KeyboardInterrupt or an alarm. So Python code never holds the lock (:mod:`kvplug.shm.lock`); what must happen is queued
before it is tried, and running it twice does nothing; and what a section has taken is known to
:class:`kvplug.shm.batch.Holdings` before anybody else knows.
"""

from __future__ import annotations

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

from kvplug.errors import Code, PoolError, StoreClosedError
from kvplug.shm import layout as lay
from kvplug.shm import pins, read, reap, segment, write
from kvplug.shm.arrival import check_parts, complete_whole
from kvplug.shm.attach import PoolOptions, attach, reap_dead
from kvplug.shm.batch import I8, I64, Holding, Holdings, SlotBatch, part_offsets, part_sizes
from kvplug.shm.codes import IS_SHUT
from kvplug.shm.events import EventReader
from kvplug.shm.forecast import Forecast
from kvplug.shm.integrity import findings, prepare, raise_findings
from kvplug.shm.layout import Geometry
from kvplug.shm.liveness import close_private, count_locks
from kvplug.shm.local import (
    HOLD_RING,
    HOLD_RING_LEN,
    L_CLIENT,
    L_HOLDS,
    L_RESERVE_BUDGET,
    L_SELF,
    L_SESSION,
    L_SHUT,
    L_THREAD,
)
from kvplug.shm.lock import shut
from kvplug.shm.maintenance import Growth, Maintenance
from kvplug.shm.policies import by_number
from kvplug.shm.rows import BlockParts, block_parts
from kvplug.shm.scan import expired_rows
from kvplug.shm.slabs import NOT_BEGUN, drain_step, raise_watermark
from kvplug.shm.victims import VictimFinder
from kvplug.threads import LivingThread, troubles

__all__ = ["Pool", "SlotBatch", "part_offsets"]

log = logging.getLogger("kvplug")

RESERVE_KEYS_A_SECTION: Final = 256
RESERVE_ROUNDS: Final = 64  # scans and slab moves that one batch may ask for
EXPIRED_AT_A_TIME: Final = 4096
SHUT_TIMEOUT_S: Final = 10.0  # a section that is under way ends within milliseconds; a deep check may take seconds
LINGER_POLL_S: Final = 0.02
_attached: weakref.WeakSet[Pool] = weakref.WeakSet()
_lending: dict[int, Pool] = {}
"""By holding: pools that live on while somebody has a view of a block, whether or not anybody has their store."""


class _Due:
    """A section that must happen; ``answer`` is Code.TIMEOUT until it has."""

    __slots__ = ("answer", "section")

    def __init__(self, section: Callable[[I64], int]) -> None:
        self.section, self.answer = section, int(Code.TIMEOUT)


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
        self.is_forked = False
        self._has_left = False
        self._warned: set[str] = set()
        self._keys = itertools.count()
        self._attaching, self._leaving = threading.RLock(), threading.RLock()
        self._description: list[int] = []
        _attached.add(self)
        weakref.finalize(self, _let_go, self._description).atexit = False  # a store that was dropped, not closed
        self._attach(create, session, pool_uuid)

    def _attach(self, create: bool, session: int, pool_uuid: bytes | None) -> None:
        _let_go(self._description)  # of an attempt that was interrupted
        self.segment, self.L = attach(
            self.name, self.options, self._description, create=create, session=session, pool_uuid=pool_uuid
        )
        self.T = self.segment.table
        self.geometry: Geometry = self.segment.geometry
        self.policy = by_number(int(self.T[lay.H_POLICY]))
        self.base_address = self.segment.base
        self.lock_fd = self.segment.lock_fd
        self.client, self.session = int(self.L[L_CLIENT]), int(self.L[L_SESSION])
        self.life = object()
        self._pin_counts = np.zeros(self.geometry.n_rows, np.int32)
        self._due: dict[int, _Due] = {}
        self._holdings = Holdings()
        self._finders: dict[int, VictimFinder] = {}
        self._growth = Growth(self.segment)
        self.is_forked = False
        if self.policy.name != self.options.policy:
            log.info(
                "kvplug: pool %r evicts by %s, as it was created, not by %s",
                self.name,
                self.policy.name,
                self.options.policy,
            )
        if int(self.T[lay.H_WATERMARK]) == 0:
            self.grow()
        self.reap()
        self._maintenance = Maintenance(self, prefault=self.options.prefault)
        self._tell_troubles()  # the thread does that from now on, unless it could not be started

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def is_retired(self) -> bool:
        """Whether somebody has noticed that the pool's name no longer leads here: nothing is stored any more."""
        return bool(self.T[lay.H_RETIRED])

    @property
    def is_current(self) -> bool:
        """Whether the pool's name still leads here, looked up now."""
        return not self.is_retired and self.segment.still_named()

    @property
    def writing_budget_bytes(self) -> int:
        """Bytes of slots that this client may have in writing at a time."""
        return int(self.L[L_RESERVE_BUDGET]) * self.geometry.min_block

    def stride(self, nbytes: int) -> int:
        """Bytes of the slot that a block of ``nbytes`` in one part takes. Raises BlockTooLargeError."""
        return self.geometry.stride(nbytes, 1)

    def measure(self, part_nbytes: npt.ArrayLike) -> tuple[I64, int, int]:
        """(bytes of each part, of the whole payload, of its slot). Raises BlockTooLargeError, ConfigError."""
        sizes = part_sizes(part_nbytes)
        _, size = part_offsets(sizes)
        return sizes, size, self.geometry.stride(size, len(sizes))

    # ---- calls under the lock ----------------------------------------------------------------------------------------

    def _ready(self) -> None:
        if self.is_closed:
            raise StoreClosedError(f"the store on pool {self.name!r} was closed")
        if self.is_forked:
            with self._attaching:
                if self.is_forked:
                    self._attach(True, 0, None)

    def _begin(self) -> None:
        """Of every call that enters a section: what is queued goes first."""
        self._ready()
        if self._due or self._holdings.ended:
            self._catch_up(self.L)

    def _unless_closed(self, answer: int) -> int:
        """A section's answer; StoreClosedError if another thread closed the store before it began."""
        if answer == IS_SHUT:
            raise StoreClosedError(f"the store on pool {self.name!r} was closed")
        return answer

    def _catch_up(self, L: I64, *, all_holdings: bool = False) -> bool:
        """Run what is queued, in order, then give back what nobody holds any more. False if the lock was not to be had.

        Several threads may be doing it, and one may be interrupted anywhere: each section marks what it has done.
        """
        for key in tuple(self._due):
            due = self._due.get(key)
            if due is None:
                continue
            answer = int(due.section(L))
            if answer == Code.TIMEOUT:
                return False
            due.answer = answer
            self._due.pop(key, None)
        ended = self._holdings.ended
        todo = list(self._holdings.all.values()) if all_holdings else []
        while ended:
            with contextlib.suppress(IndexError):
                holding = ended.popleft().holding
                if holding is not None:
                    todo.append(holding)
        for holding in todo:
            if holding.key in self._holdings.all and holding.is_due and self._settle(holding, L) == Code.TIMEOUT:
                return False  # upkeep looks at all of them
        return True

    def _settle(self, holding: Holding, L: I64) -> int:
        """Give back the slots of a holding that is due, but for those of which a view lives. 0 or a lock code."""
        answer = 0
        used = holding.in_use()
        if not (holding.slots >= 0).any():
            pass
        elif holding.pins:
            answer = int(pins.unpin(self.T, L, self._pin_counts, holding.slots, ~used))
        else:
            codes = np.empty(len(used), np.int8)
            for which, writers_done in ((used, False), (~used, True)):
                slots, gens = holding.slots[which], holding.gens[which]
                answer = answer or int(write.abort(self.T, L, slots.copy(), gens, writers_done, codes))
                if writers_done:  # those that had a view when they were given up
                    answer = answer or int(write.acknowledge(self.T, L, slots, gens, codes))
        if answer != Code.TIMEOUT and not used.any():
            self.finish(holding)
        return answer

    def _must(self, section: Callable[[I64], int]) -> int:
        """Run a section that must happen, after those queued before it. Its answer; Code.TIMEOUT: it stays queued."""
        self._ready()
        due = _Due(section)
        self._due[next(self._keys)] = due  # from here on it happens, whatever interrupts this thread
        self._catch_up(self.L)
        return self._unless_closed(due.answer)

    def on_reservations(self, section: Callable[..., int], slots: I64, gens: I64, *arguments: Any) -> I8:
        """One that must happen, over reservations, of which it gets copies; a code for each of them."""
        slots, gens = slots.copy(), gens.copy()
        codes = np.full(len(slots), Code.STALE, np.int8)
        answer = self._must(lambda L: section(self.T, L, slots, gens, *arguments, codes))
        return codes if answer >= 0 else np.full(len(slots), answer, np.int8)

    # ---- what objects of this process hold ---------------------------------------------------------------------------

    def lend(self, batch: SlotBatch, i: int, owner: npt.NDArray[np.uint8]) -> None:
        """Let the slot of entry ``i`` stay while ``owner`` lives, which nothing but users of the block refer to.

        The pool lives on as well: were it gone, others would reap its pins and reservations.
        """
        _lending[batch.holding.key] = self
        batch.holding.owners[i] = self._holdings.watch(owner, batch.holding)

    def give_back(self, batch: SlotBatch) -> None:
        """Whoever has this batch needs its slots no more: they go, those that somebody has a view of with the view."""
        batch.holding.released = True
        if batch.holding.mark is not None:
            self._holdings.ended.append(batch.holding.mark)
        if not self.is_closed:
            self._catch_up(self.L)

    def finish(self, holding: Holding) -> None:
        """All is given back, or sealed."""
        _lending.pop(holding.key, None)
        holding.forget()

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
        sizes, size, stride = self.measure(part_nbytes)
        which = lay.sibling_bits(*siblings)
        self._begin()
        n = len(keys)
        out = SlotBatch(n, self._holdings, pins=False)
        out.nbytes[:] = size
        at = self._reserve(keys, sizes, stride, size, which, out, dated or (self.take_ticks(n), n, 0))
        if at < n:
            self._report_full(keys, out, at)
        return out

    def _reserve(
        self, keys: I64, sizes: I64, stride: int, size: int, which: int, out: SlotBatch, dated: tuple[int, int, int]
    ) -> int:
        """Section by section; between them, room is made. How many keys have their code."""
        n = len(keys)
        filled = (out.codes, *out.arrays())
        finder = self._finders.pop(threading.get_ident(), None)  # each thread works with one of its own
        if finder is None:
            finder = VictimFinder(self.T, self.L, self.geometry, self.policy)
        at = 0
        rounds = 0
        just_looked = False
        while at < n:
            v = finder.of(stride)
            end = min(at + RESERVE_KEYS_A_SECTION, n)
            watermark = int(self.T[lay.H_WATERMARK])
            proposed = (v.slots, v.words, v.ticks, v.used)
            got = self._unless_closed(
                int(
                    write.reserve(self.T, self.L, keys, at, end, stride, size, which, sizes, *proposed, *filled, *dated)
                )
            )
            if got < 0:
                out.codes[at:] = got
                at = n
                break
            just_looked = just_looked and got == at
            at = got
            if at == end:
                continue
            if self._is_larger(watermark) or self.grow() or self._is_larger(watermark):
                continue
            rounds += 1
            too_good = just_looked and int(v.used[0]) < len(v.slots)  # what is there is worth more than the rest
            if too_good or rounds > RESERVE_ROUNDS or not finder.refill(stride, n - at):
                break
            just_looked = True
        self._finders[threading.get_ident()] = finder
        return at

    def _is_larger(self, watermark: int) -> bool:
        """Whether somebody, who may be another process, has made the pool larger than it was then."""
        return int(self.T[lay.H_WATERMARK]) > watermark

    def _report_full(self, keys: I64, out: SlotBatch, at: int) -> None:
        there = self.exists(keys[at:])
        out.codes[at:] = np.where(there, np.int8(Code.EXISTS), np.int8(Code.FULL))
        write.count_full(self.T, self.L, int((~there).sum()))

    def complete(self, slots: I64, gens: I64, checksums: I64, *, part: int) -> I8:
        """Part ``part`` of each slot is written: record its XXH3, bits as int64; the last part seals.

        Codes: OK, PENDING, STALE, TIMEOUT (queued).
        """
        return self.on_reservations(write.complete, slots, gens, part, checksums.copy())

    def complete_checked(self, slots: I64, gens: I64, offsets: I64, nbytes: I64, checksums: I64) -> I8:
        """All P parts of N slots are written: seal those whose bytes have these checksums.

        offsets (from the mapping's start), nbytes, checksums (XXH3's bits): int64[N * P], contiguous.
        Codes: OK, CORRUPT, STALE, TIMEOUT (queued).
        """
        codes = np.empty(len(slots), np.int8)
        check_parts(self.L, offsets, nbytes, checksums, codes)  # not in the section: nobody waits for so much reading
        right = codes == Code.OK
        if right.any():
            sums = checksums.reshape(len(slots), -1)[right].ravel()
            codes[right] = self.on_reservations(complete_whole, slots[right], gens[right], sums)
        return codes

    def abort(self, slots: I64, gens: I64, *, writers_done: bool) -> I8:
        """Give up reservations: FREE at once if nobody can write now, else QUARANTINED until :meth:`acknowledge`."""
        return self.on_reservations(write.abort, slots, gens, writers_done)

    def count_written(self, nbytes: int) -> None:
        """Count bytes that were stored, at this client."""
        self.T[self.geometry.o_client + self.client * lay.CLIENT_WORDS + lay.C_WRITTEN_BYTES] += nbytes

    def acknowledge(self, slots: I64, gens: I64) -> I8:
        """Every possible writer of these quarantined reservations is done: free them."""
        return self.on_reservations(write.acknowledge, slots, gens)

    def still_writing(self, slots: I64, gens: I64) -> npt.NDArray[np.bool_]:
        """Whether each reservation still stands; to be asked before a write. No lock."""
        self._ready()
        out = np.zeros(len(slots), np.bool_)
        write.still_writing(self.T, self.L, slots, gens, out)
        return out

    def remove(self, keys: I64) -> I8:
        """Free the blocks with these keys, and their siblings: OK, MISSING, PINNED, IN_PROGRESS, TIMEOUT, RETIRED."""
        codes = np.full(len(keys), Code.TIMEOUT, np.int8)
        self._begin()
        for at in range(0, len(keys), RESERVE_KEYS_A_SECTION):
            part = slice(at, at + RESERVE_KEYS_A_SECTION)
            done = int(write.remove(self.T, self.L, keys[part], codes[part]))
            if done < len(keys[part]):
                self._ready()  # unless that is why
                codes[at + done :] = Code.RETIRED if self.is_retired else Code.TIMEOUT
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
        if changing & 1 or self.is_retired:
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
        self._begin()
        write.drop_corrupt(self.T, self.L, slots, words)

    def drop_corrupt(self, slots: I64, gens: I64) -> None:
        """Free blocks that :meth:`verify_part` found to be wrong, unless somebody (this client included) has a pin."""
        self._drop(slots, (gens << lay.GEN_SHIFT) | lay.SEALED)

    def pin(self, keys: I64, *, prefix: bool = False, touch: bool = True) -> SlotBatch:
        """Pin blocks; ``prefix``: the leading ones; ``touch``: date them. OK, MISSING, BUDGET, TIMEOUT, RETIRED."""
        self._begin()
        out = SlotBatch(len(keys), self._holdings, pins=True)
        filled = (out.codes, *out.arrays(), out.nbytes)
        answer = int(pins.pin(self.T, self.L, self._pin_counts, keys, prefix, touch, *filled))
        if answer < 0:
            out.codes[:] = self._unless_closed(answer)
            self.give_back(out)
        return out

    def unpin(self, slots: I64) -> None:
        """Release one pin of each slot; entries below zero are passed over. Never blocks for long: may be queued."""
        todo, each = slots.copy(), np.ones(len(slots), np.bool_)
        self._must(lambda L: int(pins.unpin(self.T, L, self._pin_counts, todo, each)))

    def parts_of(self, slots: I64) -> BlockParts:
        """The parts of the blocks in these slots, which this process has pinned or is writing. No lock."""
        self._ready()
        return block_parts(self.T, self.geometry, slots)

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
        """Reserve one more slab of memory. False when all is reserved, or none is to be had for now.

        No lock is held meanwhile: it may take longer than any call may wait.
        """
        slab = self._growth.next_slab(int(self.T[lay.H_WATERMARK]))
        return slab >= 0 and int(raise_watermark(self.T, self.L, slab)) != IS_SHUT

    def reap(self) -> int:
        """Reclaim what dead sessions left. Number of clients, or a lock code."""
        self._begin()
        return reap_dead(self.segment, self.L, me=self.client)

    def maintain(self) -> None:
        """One round of upkeep: queued sections, the dead, quarantine that ran out. Called by the maintenance thread."""
        if self.is_closed or self.is_forked:
            return
        with contextlib.suppress(StoreClosedError):
            self._catch_up(self.L, all_holdings=True)
            if not self.is_closed:
                self._tell_troubles()
            self.reap()
            self.release_expired()
            if int(self.T[lay.H_DRAINING]):  # its drainer may have died between two sections
                drain_step(self.T, self.L, NOT_BEGUN, -1)
            if not self.is_retired and not self.segment.still_named():
                self.T[lay.H_RETIRED] = 1
            if self.is_retired:
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
            n = int(write.release_expired(self.T, self.L, out[:n].copy()))
        return max(n, 0)

    def warn_once(self, topic: str, message: str) -> None:
        """One log line per topic and store."""
        if topic not in self._warned:
            self._warned.add(topic)
            log.warning("kvplug: %s", message)

    def hold_times_ns(self) -> I64:
        """How long the last sections of this store held the lock."""
        n = min(int(self.L[L_HOLDS]), HOLD_RING_LEN)
        return self.L[HOLD_RING : HOLD_RING + n].copy()

    def events(self, max_events: int = 4096) -> EventReader:
        """A reader of the event ring, from now on."""
        self._ready()
        return EventReader(self.T, self.L, max_events=max_events)

    def forecast(self) -> Forecast:
        """Who will be evicted next, for one thread."""
        self._ready()
        return Forecast(self.T, self.L, self.geometry, self.policy)

    def check_integrity(self, *, deep: bool = True) -> None:
        """Raise IntegrityError if any invariant of the tables is broken; ``deep`` also checks every block's bytes."""
        self._begin()
        prepare()
        n, sentences = findings(self.T, self.L, deep=deep)
        raise_findings(self.name, self._unless_closed(n), sentences, self.options.lock_timeout_s)

    def close(self) -> None:
        """Release pins, leave, and reclaim what this session had in writing if it was its last process. Idempotent.

        Blocks that somebody still has a view of keep their pins, and the client its row, until the last view is gone.
        Interrupted, it is finished by the next call, or when nobody has the store any more.
        """
        self.is_closed = True
        if self.is_forked or self._has_left:
            return
        with self._leaving:
            self._maintenance.stop()
            if shut(self.L, int(SHUT_TIMEOUT_S * 1e9)) < 0:  # a thread is stuck in a section: it keeps the description
                return
            L = self.__dict__.setdefault("_last_words", self._words_for_leaving())
            self._catch_up(L, all_holdings=True)
            lent = self._lent()
            held = np.setdiff1d(np.flatnonzero(self._pin_counts), lent).astype(np.int64)
            self._pin_counts[held] = 1
            pins.unpin(self.T, L, self._pin_counts, held, np.ones(len(held), np.bool_))
            if len(lent):  # the last of them to go closes the description, and others reap the row
                LivingThread("kvplug-views", self._linger).start()
                self._has_left = True
                return
            if int(reap.withdraw(self.T, L)) == 0:
                reap_dead(self.segment, L)
            if int(self.T[lay.H_PERSIST]) == 1:  # any other value was never written by kvplug
                self._remove_if_last()
            for key in tuple(self._holdings.all):
                _lending.pop(key, None)
            L[L_SHUT] = 1
            _let_go(self._description)
            self._has_left = True
            _attached.discard(self)

    def _words_for_leaving(self) -> I64:
        """A copy of this client's words, by which :meth:`close` alone enters sections when nobody else can."""
        words = self.L.copy()
        words[L_SELF], words[L_SHUT], words[L_THREAD] = words.ctypes.data, 0, 0
        return words

    def _lent(self) -> list[int]:
        """Pinned slots that somebody has a view of."""
        return [
            int(holding.slots[i])
            for holding in tuple(self._holdings.all.values())
            if holding.pins
            for i, owner in tuple(holding.owners.items())
            if owner() is not None
        ]

    def _linger(self) -> None:
        """After the end, until the last view is gone."""
        while self._lent():
            time.sleep(LINGER_POLL_S)
        for key in tuple(self._holdings.all):
            _lending.pop(key, None)
        _let_go(self._description)
        _attached.discard(self)

    def _remove_if_last(self) -> None:
        with contextlib.suppress(PoolError), segment.name_lock(self.name):
            if not count_locks(self.lock_fd) and self.segment.still_named():
                segment.remove_segment_file(self.segment.path)

    def _after_fork(self) -> None:
        """In the child, whose copies of descriptions :mod:`kvplug.shm.liveness` closed: the next call attaches anew."""
        self.is_forked = True
        self.life = object()  # handles that were copied with it do nothing any more
        self._description.clear()
        self._attaching, self._leaving = threading.RLock(), threading.RLock()


def _after_fork_in_child() -> None:
    _lending.clear()
    for pool in list(_attached):
        pool._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
