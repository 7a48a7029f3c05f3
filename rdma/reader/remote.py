"""A reader's side: blocks of a peer's pool become blocks of this one, or nothing at all.

    look up and lease → reserve slots here → the data path reads into them → check → seal

A block counts only if its lease still held when its last byte had arrived *and* every part has the checksum that its
owner stored with it. That check can't be turned off. Then it is sealed and an ordinary block of this pool; anything
else is a slot given up, which stays out of use until the path has let go of it.

Whatever goes wrong at the other end is a code, never an exception: the engine computes those blocks itself. A peer
that has timed out is left alone for a moment that doubles, so that it costs one request its time-out and not all.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from kvplug.errors import Code, PeerError, PeerTimeoutError
from kvplug.rdma.blocks import U8, Blocks
from kvplug.rdma.control import faults
from kvplug.rdma.control.leases import HeldLease
from kvplug.rdma.control.link import Link
from kvplug.rdma.control.protocol import (
    I8,
    I64,
    KEY_BYTES,
    MAX_KEYS,
    PART_ALIGN_BYTES,
    Extend,
    Extended,
    Leased,
    LeasedBlocks,
    Lookup,
    Release,
    Released,
    Stats,
    StatsReply,
    check_leased,
)
from kvplug.rdma.data.datapath import DataPath, Wanted
from kvplug.rdma.reader.choice import ChosenPath
from kvplug.rdma.reader.speed import Speed

if TYPE_CHECKING:
    from kvplug.config import Config

log = logging.getLogger("kvplug")

FETCH_S: Final = 10.0
WINDOW_BYTES: Final = 256 << 20
"""Reserved and read at a time: slots that are waiting for their bytes are slots that nobody else has."""
BACK_OFF_FIRST_S: Final = 0.5
BACK_OFF_MOST_S: Final = 10.0
RELEASE_S: Final = 0.25
MOST_SAID: Final = 8


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Blocks of one layout. index: int64[K], positions in the lease; part_nbytes: int64[P]; sums: int64[K, P]."""

    index: I64
    part_nbytes: I64
    sums: I64
    siblings: tuple[int, int]


class Peer:
    """One other host's pool, to be fetched from. Thread-safe. A copy that a fork made fetches nothing: make another."""

    def __init__(self, address: str, blocks: Blocks, config: Config, *, path: DataPath | None = None) -> None:
        """``address``: host:port of its agent. ``path``: that one, not as the settings say. Nothing is dialled yet."""
        self.address = address
        self.speed = Speed()
        self._blocks, self._config = blocks, config
        self._link = Link(address, config)
        self._mutex = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._path = path or ChosenPath(self._link, blocks.memory, config, self._count)
        self._pid = os.getpid()
        self._back_off_s = 0.0
        self._down_until = 0.0
        self._said: set[str] = set()

    @property
    def is_down(self) -> bool:
        """Whether it is left alone just now, because it did not answer."""
        return time.monotonic() < self._down_until

    @property
    def link(self) -> Link:
        """Its control connection."""
        return self._link

    def counters(self) -> dict[str, int]:
        """What was fetched and what went wrong, since the start."""
        with self._mutex:
            return dict(self._counters)

    def _count(self, what: str, n: int = 1) -> None:
        with self._mutex:
            self._counters[what] += n

    # ---- fetching ----------------------------------------------------------------------------------------------------

    def fetch(self, keys: U8, timeout_s: float = FETCH_S, *, prefix: bool = False, touch: bool = True) -> I8:
        """Bring these blocks ((N, 32) uint8) into the local pool; ``prefix``: only up to the first that is missing.

        Without ``touch`` it is no use of them at the peer, where they may be evicted as soon as if nobody had asked.

        Codes, int8[N]: OK: it is here now; EXISTS: it was here already; MISSING: the peer has not got it; CORRUPT: its
        bytes did not fit; TIMEOUT: peer, lease or lock did not last; FULL, BUDGET, IN_PROGRESS: no slot for it here.
        Raises StoreClosedError, and nothing for whatever the peer does.
        """
        keys = np.ascontiguousarray(keys, np.uint8).reshape(-1, KEY_BYTES)
        codes = np.full(len(keys), Code.MISSING, np.int8)
        deadline = time.monotonic() + timeout_s
        todo = np.arange(len(keys))
        if os.getpid() != self._pid:
            codes[:] = Code.TIMEOUT  # a forked child's copy: connections and threads are the parent's
            return codes
        here = self._blocks.exists(keys)
        codes[here] = Code.EXISTS
        todo = todo[~here]
        if len(todo) and self.is_down:
            self._count("while_down")
            codes[todo] = Code.TIMEOUT
            return codes
        try:
            while len(todo):
                now, todo = todo[:MAX_KEYS], todo[MAX_KEYS:]
                codes[now] = Code.TIMEOUT
                again = self._fetch(keys, now, codes, deadline, prefix, touch)
                if prefix and int((codes[now] < 0).sum()) > len(again):  # a hole: what is behind it is worth nothing
                    codes[todo] = Code.MISSING
                    todo = todo[:0]
                todo = np.concatenate((again, todo))
            self._is_well()
        except PeerError as e:
            codes[todo] = Code.TIMEOUT
            patient = timeout_s >= self._config.peer_timeout_s
            if time.monotonic() < deadline or (patient and not (codes == Code.OK).any()):
                self._failed(e)
            else:  # the peer does what it can: it was the caller who had no more time
                self._count("out_of_time")
        waited = codes == Code.IN_PROGRESS
        if waited.any():  # a duplicate in the batch waited for its twin
            codes[waited] = np.where(self._blocks.exists(keys[waited]), np.int8(Code.OK), np.int8(Code.IN_PROGRESS))
        with self._mutex:
            self._counters["fetches"] += 1
            self._counters["keys_fetched"] += int((codes == Code.OK).sum())
        return codes

    def holds(self, keys: U8, timeout_s: float) -> npt.NDArray[np.bool_] | None:
        """Which of these blocks ((N, 32) uint8) the peer has now, bool[N].

        None: it did not answer. Raises nothing for whatever the peer does.
        """
        keys = np.ascontiguousarray(keys, np.uint8).reshape(-1, KEY_BYTES)
        asked, deadline = time.monotonic(), time.monotonic() + timeout_s
        if os.getpid() != self._pid or self.is_down:
            return None
        have = np.zeros(len(keys), np.bool_)
        try:
            for at in range(0, len(keys), MAX_KEYS):
                some = keys[at : at + MAX_KEYS]
                answer = self._link.ask(Lookup(some.tobytes(), 0.0), Leased, deadline, again=True)
                have[at : at + MAX_KEYS] = check_leased(answer, len(some)).codes == Code.BUDGET  # there, and not leased
            self.speed.note_round_trip(time.monotonic() - asked)
            self._is_well()
        except PeerError as e:
            self._failed(e)
            return None
        return have

    def _fetch(self, keys: U8, now: I64, codes: I8, deadline: float, prefix: bool, touch: bool) -> I64:
        """One lookup and its reads; fills ``codes[now]``. Positions that are worth another lookup."""
        asked = time.monotonic()
        answer = self._link.ask(
            Lookup(keys[now].tobytes(), min(self._config.lease_s, deadline - asked + 1.0), prefix, touch),
            Leased,
            deadline,
            again=True,
        )
        began = time.monotonic()
        self.speed.note_round_trip(began - asked)
        leased = check_leased(answer, len(now))
        codes[now] = leased.codes
        if not answer.lease:
            return now[:0]
        lease = HeldLease.counted(answer.lease, asked, answer.seconds)
        where = now[leased.codes == Code.OK]
        codes[where] = Code.TIMEOUT
        try:
            for group in _groups(leased):
                lease = self._read_group(keys, where, leased, group, lease, codes, deadline)
        finally:
            arrived = codes[where] == Code.OK
            self.speed.note_read(int(leased.nbytes[arrived].sum()), time.monotonic() - began)
            self._release(lease)
        got = bool((codes[where] >= 0).any())
        return now[leased.codes == Code.BUDGET] if got else now[:0]

    def _read_group(
        self, keys: U8, where: I64, leased: LeasedBlocks, group: _Group, lease: HeldLease, codes: I8, deadline: float
    ) -> HeldLease:
        ends = np.cumsum(leased.nbytes[group.index])
        most = max(1, min(WINDOW_BYTES, self._blocks.data_bytes // 8))
        window = -(-int(ends[-1]) // -(-int(ends[-1]) // most))  # all of one size: a small last one would go slowly
        cuts = np.flatnonzero(np.diff((ends - 1) // window)) + 1
        for part in np.split(np.arange(len(group.index)), cuts):
            lease = self._extended(lease, deadline)
            _Window(self, keys, where, leased, group, part).run(lease, codes, deadline)
        return lease

    def _extended(self, lease: HeldLease, deadline: float) -> HeldLease:
        """The lease, made longer if little of it is left."""
        asked = time.monotonic()
        if lease.ends - asked > min(self._config.lease_s / 2, deadline - asked):
            return lease
        wanted = min(self._config.lease_s, deadline - asked + 1.0)
        seconds = self._link.ask(Extend(lease.id, wanted), Extended, deadline).seconds
        return HeldLease.counted(lease.id, asked, seconds)

    def _release(self, lease: HeldLease) -> None:
        try:
            self._link.ask(Release((lease.id,)), Released, time.monotonic() + RELEASE_S)
        except PeerError:
            self._count("not_released")  # it ends by itself

    # ---- how the peer is ---------------------------------------------------------------------------------------------

    def _is_well(self) -> None:
        self._back_off_s = 0.0
        self._said.clear()

    def _failed(self, error: PeerError) -> None:
        self._count(type(error).__name__)
        if isinstance(error, PeerTimeoutError) or self._back_off_s:
            self._back_off_s = min(max(2 * self._back_off_s, BACK_OFF_FIRST_S), BACK_OFF_MOST_S)
            self._down_until = time.monotonic() + self._back_off_s
        else:
            self._back_off_s = BACK_OFF_FIRST_S / 4  # a connection that broke is dialled anew at once, but only once
        text = str(error).removeprefix(f"{self.address} ")
        if text not in self._said and len(self._said) < MOST_SAID:  # another fault of a peer that is gone is news
            self._said.add(text)
            log.warning("kvplug: peer %s: %s; its blocks are misses until it is back", self.address, text)

    def stats(self, timeout_s: float = 1.0) -> StatsReply:
        """The agent's own figures. Raises PeerError."""
        return self._link.ask(Stats(), StatsReply, time.monotonic() + timeout_s, again=True)

    def close(self) -> None:
        """Hang up. Reads under way end. Idempotent."""
        if os.getpid() != self._pid:
            return
        self._path.close()
        self._link.close()


class _Window:
    """Blocks of one layout that are reserved and read at once."""

    def __init__(self, peer: Peer, keys: U8, where: I64, leased: LeasedBlocks, group: _Group, part: I64) -> None:
        self._peer, self._blocks, self._path = peer, peer._blocks, peer._path
        self._group = group
        self._index, self._sums = group.index[part], group.sums[part]
        self._where = where[self._index]
        self._sources, self._nbytes = leased.offsets[self._index], leased.nbytes[self._index]
        padded = -(-group.part_nbytes // PART_ALIGN_BYTES) * PART_ALIGN_BYTES
        self._part_at = np.cumsum(padded) - padded
        self._keys = keys[self._where]
        self._over = False

    def run(self, lease: HeldLease, codes: I8, deadline: float) -> None:
        """Reserve, read, check, seal; ``codes`` at these blocks' places. Raises PeerError."""
        if not lease.holds() or time.monotonic() >= deadline:
            raise PeerTimeoutError(f"the lease of {self._peer.address} or the time for this fetch ran out")
        reserved = self._blocks.reserve(self._keys, self._group.part_nbytes, self._group.siblings)
        ok = np.flatnonzero(reserved.codes == Code.OK)
        codes[self._where] = reserved.codes
        codes[self._where[ok]] = Code.TIMEOUT
        if not len(ok):
            return
        self._lease = lease
        self._slots, self._gens, self._targets = reserved.slots[ok], reserved.gens[ok], reserved.offsets[ok]
        self._sums = self._sums[ok]
        self._parts_at = self._targets[:, None] + self._part_at[None, :]
        self._parts_nbytes = np.broadcast_to(self._group.part_nbytes, self._parts_at.shape)
        self._result = np.full(len(ok), Code.TIMEOUT, np.int8)
        if faults.armed:
            faults.happen("reserved")
        wanted = Wanted(lease, self._index[ok], self._sources[ok], self._nbytes[ok], self._targets)
        landing = None
        try:
            landing = self._path.read(wanted, deadline, self._arrived)
        finally:
            self._over = True
            self._give_up(landing is not None and landing.is_settled)
            if landing is not None and not landing.is_settled:
                slots, gens = self._slots, self._gens
                landing.then(lambda: self._blocks.acknowledge(slots, gens))
            codes[self._where[ok]] = self._result
        if landing.error is not None:
            raise landing.error

    def _arrived(self, which: I64) -> None:
        """These blocks' last bytes are here: check and seal. On the path's threads."""
        if self._over:
            return
        if not self._lease.holds():
            self._peer._count("leases_run_out", len(which))
            return
        if faults.armed:
            faults.meddle("check", self._blocks.memory[self._targets[which[0]] :][:1], lambda: None)
        codes = self._blocks.complete(
            self._slots[which], self._gens[which], self._parts_at[which], self._parts_nbytes[which], self._sums[which]
        )
        wrong = int((codes == Code.CORRUPT).sum())
        if wrong:
            self._peer._count("wrong_checksums", wrong)
        self._result[which] = np.minimum(codes, 0)

    def _give_up(self, settled: bool) -> None:
        """What was not sealed goes back. A seal that waits for the lock is under way and stays."""
        lost = (self._result == Code.TIMEOUT) | (self._result == Code.CORRUPT)
        if lost.any():
            self._blocks.abort(self._slots[lost], self._gens[lost], writers_done=settled)


def _groups(leased: LeasedBlocks) -> list[_Group]:
    """The blocks by layout (parts and siblings): slots are reserved layout by layout."""
    found = []
    for count in np.unique(leased.part_counts).tolist():
        index = np.flatnonzero(leased.part_counts == count)
        picked = leased.part_starts[index, None] + np.arange(count)[None, :]
        nbytes, sums = leased.part_nbytes[picked], leased.part_sums[picked]
        layout = np.concatenate((nbytes, leased.siblings[index, None]), axis=1)
        if (layout == layout[0]).all():
            kinds, kind_of = layout[:1], np.zeros(len(index), np.int64)
        else:
            kinds, kind_of = np.unique(layout, axis=0, return_inverse=True)
        for kind, row in enumerate(kinds):
            mine = np.flatnonzero(kind_of.ravel() == kind)
            siblings = (int(row[-1]) >> 7) + 1, int(row[-1]) & 127
            found.append(_Group(index[mine], np.ascontiguousarray(row[:-1]), sums[mine], siblings))
    return found
