"""The writing side of the directory: one host's heartbeat, and its pool's blocks as they come and go.

One thread reads the pool's event ring and writes batches of names, each in one round trip. What the server holds is
made right by *reconciling*, a bucket at a time: read the bucket's names back, compare them with a scan of the pool, and
send the difference. That is how a host begins, and it is the one answer to everything that can go wrong: the ring
lapped us, the pool was rebuilt, the connection broke in mid-batch, the server came back empty or evicted a set, it had
no memory. A heartbeat compares the sizes of the sets with what they should be, and now and then a bucket is reconciled
for no reason at all.

Entries lie under this start's epoch, so what an earlier start left behind counts for nothing before it is removed. Time
to live is counted by the server; no host's clock is compared with another's.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from kvplug.errors import DirectoryError
from kvplug.rdma.directory.names import BUCKETS, Names
from kvplug.rdma.directory.peers import PeerInfo, checked_id, from_record, to_record
from kvplug.rdma.directory.resp import (
    U64,
    Connection,
    Endpoint,
    ServerError,
    checked,
    command,
    members,
    number,
    variadic,
)
from kvplug.threads import LivingThread

__all__ = ["Changes", "Feed", "Publisher", "PublisherStats"]

log = logging.getLogger("kvplug")

U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

BEATS_PER_TTL: Final = 3
IDLE_S: Final = 0.05
CONNECT_S: Final = 2.0
EXCHANGE_S: Final = 3.0
READ_BACK_S: Final = 10.0  # a whole bucket
LEAVE_S: Final = 1.0
BACKOFF_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
NO_MEMORY_RETRY_S: Final = 5.0
AUDIT_S: Final = 60.0
"""A bucket is reconciled this often without a reason."""
SEND_NAMES: Final = 8192
ENTRIES_TTL_S: Final = 900
"""How long a host's sets outlive its last heartbeat. They count only while its record lives, which is seconds."""
MEMBERS_TTL_S: Final = 86400


class Changes(Protocol):
    """Blocks that came and went, in order (:class:`kvplug.shm.feed.BlockChanges`)."""

    @property
    def keys(self) -> U8:
        """(M, 32) uint8."""

    @property
    def sealed(self) -> Bools:
        """bool[M]: it came; False: it went."""

    @property
    def lapped(self) -> bool:
        """Some changes were lost."""


class Feed(Protocol):
    """What the publisher needs of a pool (:class:`kvplug.shm.feed.BlockFeed`)."""

    def read(self) -> Changes:
        """Changes since the last call."""

    def scan(self, wanted: Callable[[U8], Bools] | None = None) -> U8:
        """Keys that are there, (N, 32)."""

    @property
    def retired(self) -> bool:
        """Nothing will change any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class PublisherStats:
    """Counts since the start, unless said otherwise."""

    is_connected: bool
    """Now."""
    entries: int
    """Names that the server has of this host now, as far as is known."""
    unsettled_buckets: int
    """Buckets of the directory that are still to be reconciled, of 16."""
    announced: int
    """Names sent as new."""
    withdrawn: int
    """Names sent as gone."""
    laps: int
    """Times that events were lost, by lagging or by a rebuild of the pool."""
    reconciled: int
    """Buckets compared with the pool."""
    losses: int
    """Heartbeats that found the server's sets of another size than they should be."""
    refused: int
    """Names that the server had no memory for."""
    heartbeats: int
    failures: int
    """Connections that could not be made, or broke."""


class Publisher:
    """Tells the directory what this host has, from :meth:`start` to :meth:`stop`."""

    def __init__(
        self, feed: Feed, endpoint: Endpoint, names: Names, *, host_id: str, address: str, ttl_s: float,
        cache_node: bool = False,
    ) -> None:  # fmt: skip
        """``host_id``: names the pool, the same over restarts. ``ttl_s``: how long a silent host still counts."""
        self.me = PeerInfo(checked_id(host_id), address, epoch=secrets.token_hex(8), cache_node=cache_node)
        self._feed, self._endpoint, self._names = feed, endpoint, names
        self._ttl_ms = round(ttl_s * 1000)
        self._beat_s = ttl_s / BEATS_PER_TTL
        self._record = to_record(self.me, names)
        self._sets = self._sets_of(self.me.epoch)
        self._sizes = [0] * BUCKETS
        self._unsettled: collections.deque[int] = collections.deque()
        self._not_before = self._next_beat = self._next_audit = 0.0
        self._audited = 0
        self._n: collections.Counter[str] = collections.Counter()
        self._connection: Connection | None = None
        self._complained = self._in_the_way = False
        self._stop = threading.Event()
        self._thread = LivingThread("kvplug-directory-publisher", self._run)

    def start(self) -> None:
        """Begin, in a thread. Whether the server can be reached then or later does not matter."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Leave the directory, if that can be done in time. Idempotent."""
        self._stop.set()
        self._thread.end(timeout_s)

    @property
    def is_alive(self) -> bool:
        """Whether it is at work: from :meth:`start` until :meth:`stop`, or until the pool was removed."""
        return self._thread.is_alive()

    def stats(self) -> PublisherStats:
        """A snapshot."""
        counts = {f.name: self._n[f.name] for f in dataclasses.fields(PublisherStats)}
        counts |= {"entries": sum(self._sizes), "unsettled_buckets": len(self._unsettled)}
        return PublisherStats(**counts | {"is_connected": self._connection is not None})  # type: ignore[arg-type]

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failed = 0
        while not self._stop.is_set() and not self._feed.retired:
            try:
                connection = Connection.open(self._endpoint, time.monotonic() + CONNECT_S)
            except (OSError, DirectoryError) as error:
                failed = self._failed(error, failed)
                continue
            self._connection = connection
            try:
                self._begin(connection)
                self._in_the_way = False
                failed = 0
                self._recovered()
                while not self._stop.is_set() and not self._feed.retired:
                    self._step(connection)
                self._leave(connection)
            except (OSError, DirectoryError) as error:
                failed = self._failed(error, failed)
            finally:
                self._connection = None
                connection.close()

    def _failed(self, error: Exception, before: int) -> int:
        self._n["failures"] += 1
        self._in_the_way = isinstance(error, ServerError) and error.kind == "WRONGTYPE"
        if not self._complained:
            self._complained = True
            log.warning(
                "the directory at %s can't be used (%s): what this host has is not announced until it can",
                self._endpoint,
                error,
            )
        self._stop.wait(BACKOFF_S[min(before, len(BACKOFF_S) - 1)])
        return before + 1

    def _recovered(self) -> None:
        if self._complained:
            self._complained = False
            log.info("the directory at %s can be used again", self._endpoint)

    def _begin(self, c: Connection) -> None:
        """Say that we are here, remove what an earlier start left, and take nothing for granted of what is there."""
        (left,) = c.call(time.monotonic() + EXCHANGE_S, command("GET", self._names.host(self.me.id)))
        former = from_record(checked(left), self.me.id, self._names)
        if former is not None and former.epoch != self.me.epoch:
            (answer,) = c.call(time.monotonic() + EXCHANGE_S, command("UNLINK", *self._sets_of(former.epoch)))
            checked(answer)
        if self._in_the_way:  # our keys' names are ours: whatever else is under them is removed
            checked(
                c.call(time.monotonic() + EXCHANGE_S, command("UNLINK", *self._sets, self._names.host(self.me.id)))[0]
            )
        self._settle(range(BUCKETS))
        self._next_audit = time.monotonic() + AUDIT_S
        self._heartbeat(c)

    def _sets_of(self, epoch: str) -> list[str]:
        return [self._names.has(self.me.id, epoch, bucket) for bucket in range(BUCKETS)]

    def _settle(self, buckets: Any) -> None:
        self._unsettled.extend(bucket for bucket in buckets if bucket not in self._unsettled)

    def _step(self, c: Connection) -> None:
        now = time.monotonic()
        if now >= self._next_beat:
            self._heartbeat(c)
        if now >= self._next_audit:
            self._next_audit = now + AUDIT_S
            self._settle([self._audited % BUCKETS])
            self._audited += 1
        changes = self._feed.read()
        if changes.lapped:
            self._n["laps"] += 1
            self._settle(range(BUCKETS))
        if len(changes.keys):
            self._apply(c, changes)
        elif self._unsettled and now >= self._not_before:
            self._reconcile(c, self._unsettled[0])
        else:
            self._stop.wait(IDLE_S)

    def _heartbeat(self, c: Connection) -> None:
        """Renew what is there, which a server without memory allows too; write the record only if it is not there."""
        names, deadline = self._names, time.monotonic() + EXCHANGE_S
        host = names.host(self.me.id)
        asked = [command("GET", host), command("PEXPIRE", host, self._ttl_ms)]
        asked += [command("SISMEMBER", names.members, self.me.id), command("EXPIRE", names.members, MEMBERS_TTL_S)]
        asked += [command("EXPIRE", key, ENTRIES_TTL_S) for key in self._sets]
        asked += [command("SCARD", key) for key in self._sets]
        record, renewed, listed, _, *answers = [checked(answer) for answer in c.call(deadline, *asked)]
        if record != self._record or renewed != 1 or listed != 1:
            for answer in c.call(
                deadline,
                command("SET", host, self._record, "PX", self._ttl_ms),
                command("SADD", names.members, self.me.id),
                command("EXPIRE", names.members, MEMBERS_TTL_S),
            ):
                self._count_refusal(answer, 1)
        self._n["heartbeats"] += 1
        self._next_beat = time.monotonic() + self._beat_s
        lost = [
            bucket
            for bucket, size in enumerate(map(number, answers[BUCKETS:]))
            if size != self._sizes[bucket] and bucket not in self._unsettled
        ]
        if lost:
            self._n["losses"] += 1
            self._settle(lost)

    def _apply(self, c: Connection, changes: Changes) -> None:
        """One batch: of each block only its last change counts, so the order of what is sent does not matter."""
        keys = changes.keys
        names = self._names.of(keys)
        _, last = np.unique(names[::-1], return_index=True)
        last = len(names) - 1 - last
        names, sealed, buckets = names[last], changes.sealed[last], self._names.buckets(keys[last])
        self._n["announced"] += int(sealed.sum())
        self._n["withdrawn"] += int((~sealed).sum())
        for come in (False, True):  # first what frees memory
            todo = [
                (bucket, names[(buckets == bucket) & (sealed == come)])
                for bucket in np.unique(buckets[sealed == come]).tolist()
            ]
            self._send(c, "SADD" if come else "SREM", todo)

    def _send(self, c: Connection, what: str, todo: list[tuple[int, U64]]) -> bool:
        """Add or remove names, by bucket, in one round trip. False if the server had no memory for all of them."""
        if not todo:
            return True
        deadline = time.monotonic() + EXCHANGE_S
        frames: list[Any] = []
        for bucket, names in todo:
            frames += (variadic(len(names), what, self._sets[bucket]), members(names).tobytes())
            # With the set that it may make goes its time to live: we may be gone before the next heartbeat.
            frames.append(command("EXPIRE", self._sets[bucket], ENTRIES_TTL_S))
        c.send(frames, deadline)
        refused = False
        for bucket, names in todo:
            answer, _ = c.read(deadline), checked(c.read(deadline))
            if self._count_refusal(answer, len(names)):
                refused = True
                self._settle([bucket])
                self._not_before = time.monotonic() + NO_MEMORY_RETRY_S
            else:
                self._sizes[bucket] += number(answer) if what == "SADD" else -number(answer)
        return not refused

    def _count_refusal(self, answer: Any, n: int) -> bool:
        """Whether the server had no memory for it. Any other error is raised: it concerns more than this batch."""
        if not isinstance(answer, ServerError):
            return False
        if answer.kind != "OOM":
            raise answer
        if not self._n["refused"]:
            log.warning(
                "the directory at %s has no memory left (maxmemory): some of what this host has is not announced",
                self._endpoint,
            )
        self._n["refused"] += n
        return True

    def _reconcile(self, c: Connection, bucket: int) -> None:
        """Make the server's set of this bucket what the pool has. Events from before the scan only repeat it."""
        key = self._sets[bucket]
        ours = np.unique(self._names.of(self._feed.scan(lambda keys: self._names.buckets(keys) == bucket)))
        deadline = time.monotonic() + READ_BACK_S
        c.send([command("SMEMBERS", key)], deadline)
        theirs: U64 = checked(c.read_names(deadline))  # type: ignore[arg-type]
        self._sizes[bucket] = len(theirs)
        self._unsettled.popleft()
        gone = np.setdiff1d(theirs, ours, assume_unique=True)
        new = np.setdiff1d(ours, theirs, assume_unique=True)
        for what, names in (("SREM", gone), ("SADD", new)):
            for at in range(0, len(names), SEND_NAMES):
                some = names[at : at + SEND_NAMES]
                if not self._send(c, what, [(bucket, some)]):
                    return
                self._n["announced" if what == "SADD" else "withdrawn"] += len(some)
        self._n["reconciled"] += 1

    def _leave(self, c: Connection) -> None:
        names = self._names
        c.call(
            time.monotonic() + LEAVE_S,
            command("DEL", names.host(self.me.id)),
            command("SREM", names.members, self.me.id),
            command("UNLINK", *self._sets),
        )
