"""The reading side of the directory: which hosts there are, and which of them has which blocks.

A hint only. What it says may be old or wrong, and costs a miss then, since the owner's slot decides. It never makes
anybody wait beyond the deadline that was given, and not even so long once the server is known to be unreachable: a
thread keeps up the connections and the list of members, and a look-up uses a connection that answered before or
answers "not known". With the server gone, the members known last stay known, so that they can still be asked directly.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from kvplug.errors import ConfigError, DirectoryError
from kvplug.identity.keys import as_key_array
from kvplug.rdma.control.auth import shared_key
from kvplug.rdma.directory.names import BUCKETS, Names
from kvplug.rdma.directory.peers import MAX_PEERS, PeerInfo, from_record
from kvplug.rdma.directory.resp import (
    Connection,
    Endpoint,
    Reply,
    ServerError,
    command,
    listed,
    members,
    number,
    text,
    variadic,
)
from kvplug.threads import LivingThread

if TYPE_CHECKING:
    from kvplug.config import Config

__all__ = ["Directory", "DirectoryStats", "Hits", "describe_server", "door"]

log = logging.getLogger("kvplug")

U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

POLLS_PER_TTL: Final = 3
CONNECT_S: Final = 2.0
EXCHANGE_S: Final = 2.0
BACKOFF_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
MAX_KEYS: Final = 1 << 14
"""Keys of one look-up that are asked for, from the first on: no prefix is longer."""
PEERS_IN_FULL: Final = 4
"""Hosts that are asked for every key. If there are more, all are first asked for a few keys, the best then in full."""
PROBES: Final = 16
FORGET_S: Final = 3600.0
"""A member without a record for so long is removed from the set of members."""
_open_here: weakref.WeakSet[Directory] = weakref.WeakSet()


@dataclasses.dataclass(frozen=True, slots=True)
class Hits:
    """Who is said to have what."""

    peers: tuple[PeerInfo, ...]
    have: Bools
    """bool[peers, keys]."""
    known: bool
    """False: the directory could not be asked; no row says nothing about who has what."""

    def leading(self) -> npt.NDArray[np.int64]:
        """Number of leading keys that each peer has, int64[peers]."""
        if not self.have.size:
            return np.zeros(len(self.peers), np.int64)
        run = np.where(self.have.all(axis=1), self.have.shape[1], self.have.argmin(axis=1))
        leading: npt.NDArray[np.int64] = run.astype(np.int64)
        return leading


@dataclasses.dataclass(frozen=True, slots=True)
class DirectoryStats:
    """Counts since the start, unless said otherwise."""

    is_connected: bool
    """Now."""
    peers: int
    """Members known now."""
    lookups: int
    unknown: int
    """Look-ups that the directory could not answer, whatever the reason; those below are among them."""
    timeouts: int
    """… because its answer did not come in time."""
    stale_epochs: int
    """Hosts whose answer was dropped, since they had ended or begun anew."""
    bad_records: int
    """Records of members that nobody with our secret has written."""
    failures: int
    """Connections that could not be made, or broke."""


class Directory:
    """A reader of the directory, and a source of peers (:class:`kvplug.rdma.directory.peers.PeerSource`). Thread-safe.

    In a process that was forked it begins anew, without the parent's connections.
    """

    def __init__(
        self, endpoint: Endpoint, names: Names, *, ttl_s: float, timeout_s: float, own_id: str | None = None
    ) -> None:
        """``ttl_s``: as the publishers have it. ``timeout_s``: longest look-up. ``own_id``: a host to leave out."""
        self._endpoint, self._names, self._own_id = endpoint, names, own_id
        self._poll_s = ttl_s / POLLS_PER_TTL
        self.timeout_s = timeout_s
        self._n: collections.Counter[str] = collections.Counter()
        self._peers: tuple[PeerInfo, ...] = ()
        self._closed = False
        self._lock = threading.Lock()
        self._begin()
        _open_here.add(self)

    def _begin(self) -> None:
        self._is_forked = False
        self._asking: Connection | None = None
        self._watching: Connection | None = None
        self._not_before = 0.0
        self._timeouts_in_a_row = 0
        self._absent_since: dict[str, float] = {}
        self._first_poll = threading.Event()
        self._wake = threading.Event()
        self._thread = LivingThread("kvplug-directory", self._watch)
        self._thread.start()

    def _ready(self) -> None:
        if self._is_forked and not self._closed:
            with self._lock:
                if self._is_forked:
                    self._begin()

    def _after_fork(self) -> None:
        """In the child: the parent's connections and thread are not ours; the next call begins anew."""
        self._lock = threading.Lock()
        self._is_forked = True
        self._lose_watching()  # closes this process's copy of the descriptor, and says nothing to the server
        self._drop(self._asking)

    # ---- what engines and agents call --------------------------------------------------------------------------------

    def peers(self) -> tuple[PeerInfo, ...]:
        """The members known last, this host left out. Never waits."""
        self._ready()
        return self._peers

    @property
    def is_connected(self) -> bool:
        """Whether a look-up can be asked now."""
        return self._asking is not None

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the members were read once; whether they were."""
        self._ready()
        return self._first_poll.wait(timeout_s)

    def lookup(self, keys: Any, timeout_s: float | None = None) -> Hits:
        """Ask who has which of these keys: one round trip for all of them, while there are few hosts.

        Args:
            keys: (N, 32) uint8 or N ``bytes`` of 32, head of the prefix first; beyond MAX_KEYS none is asked for.
            timeout_s: longest wait; default: the setting's.

        Raises KeyFormatError. Whatever ails the server: ``known`` is False, and nobody has anything.
        """
        self._ready()
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        wanted = as_key_array(keys)
        self._n["lookups"] += 1
        hits = self._ask(wanted, deadline)
        if hits is None:
            self._n["unknown"] += 1
            return Hits((), np.zeros((0, len(wanted)), np.bool_), known=False)
        return hits

    def stats(self) -> DirectoryStats:
        """A snapshot."""
        counts = {f.name: self._n[f.name] for f in dataclasses.fields(DirectoryStats)}
        now = {"peers": len(self._peers), "is_connected": self.is_connected}
        return DirectoryStats(**counts | now)  # type: ignore[arg-type]

    def close(self) -> None:
        """End the thread and the connections. Idempotent."""
        self._closed = True
        self._wake.set()
        if not self._is_forked:
            self._thread.end(EXCHANGE_S + 1)
        self._drop(self._asking)

    # ---- looking up --------------------------------------------------------------------------------------------------

    def _ask(self, wanted: U8, deadline: float) -> Hits | None:
        if not self.is_connected:
            return None
        asked = wanted[:MAX_KEYS]
        names, buckets = self._names.of(asked), self._names.buckets(asked)
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._n["timeouts"] += 1
            return None
        try:
            c = self._asking
            if c is None:
                return None
            try:
                peers, have = self._rounds(c, names, buckets, deadline)
            except (OSError, DirectoryError) as error:
                self._give_up(c, error)
                return None
            self._timeouts_in_a_row = 0
        finally:
            self._lock.release()
        if len(asked) < len(wanted):
            have = np.pad(have, ((0, 0), (0, len(wanted) - len(asked))))
        return Hits(peers, have, known=True)

    def _rounds(
        self, c: Connection, names: npt.NDArray[np.uint64], buckets: U8, deadline: float
    ) -> tuple[tuple[PeerInfo, ...], Bools]:
        peers = self._peers
        if len(peers) > PEERS_IN_FULL:
            few = np.unique(np.linspace(0, len(names) - 1, min(PROBES, len(names))).astype(np.int64))
            peers, have = self._round(c, peers, names[few], buckets[few], deadline)
            best = np.argsort(-have.sum(axis=1) - len(few) * have[:, 0], kind="stable")[:PEERS_IN_FULL]
            peers = tuple(peers[i] for i in best.tolist())
        found, have = self._round(c, peers, names, buckets, deadline)
        now_known = {peer.id: peer for peer in self._peers}
        begun_anew = tuple(now_known[p.id] for p in peers if p not in found and now_known.get(p.id, p) != p)
        if begun_anew:
            more, theirs = self._round(c, begun_anew, names, buckets, deadline)
            found, have = (*found, *more), np.concatenate((have, theirs))
        return found, have

    def _round(
        self, c: Connection, peers: tuple[PeerInfo, ...], names: npt.NDArray[np.uint64], buckets: U8, deadline: float
    ) -> tuple[tuple[PeerInfo, ...], Bools]:
        """One round trip: the records of these peers, and what they have. A peer whose epoch has passed is left out."""
        have = np.zeros((len(peers), len(names)), np.bool_)
        if not peers or not len(names):
            return peers, have
        order = np.argsort(buckets, kind="stable")
        block = members(names[order])
        edges = np.searchsorted(buckets[order], np.arange(BUCKETS + 1)).tolist()
        pieces = [(b, lo, hi) for b, (lo, hi) in enumerate(itertools.pairwise(edges)) if lo < hi]
        packed = {b: block[lo:hi].tobytes() for b, lo, hi in pieces}
        frames: list[bytes] = [command("MGET", *(self._names.host(peer.id) for peer in peers))]
        for peer in peers:
            for b, lo, hi in pieces:
                frames += (variadic(hi - lo, "SMISMEMBER", self._names.has(peer.id, peer.epoch, b)), packed[b])
        c.send(frames, deadline)
        records = listed(c.read(deadline), len(peers))
        for row in have:
            for _, lo, hi in pieces:
                flags = c.read_flags(hi - lo, deadline)
                if not isinstance(flags, ServerError):
                    row[order[lo:hi]] = flags
                elif flags.kind != "WRONGTYPE":  # that concerns one key of one host, and will be removed by it
                    raise flags
        current = [from_record(r, p.id, self._names) for r, p in zip(records, peers, strict=True)]
        holds = [i for i, (now, then) in enumerate(zip(current, peers, strict=True)) if now == then]
        if len(holds) < len(peers):
            self._n["stale_epochs"] += len(peers) - len(holds)
            newer = {p.id: now for now, p in zip(current, peers, strict=True)}
            known = (newer.get(p.id, p) for p in self._peers)
            self._peers = tuple(p for p in known if p is not None)
        return tuple(peers[i] for i in holds), have[holds]

    def _give_up(self, c: Connection, error: Exception) -> None:
        """Out of step, or too slow: this connection is not used again, and for a while no other is opened."""
        if isinstance(error, TimeoutError):
            self._n["timeouts"] += 1
        self._n["failures"] += 1
        self._not_before = time.monotonic() + BACKOFF_S[min(self._timeouts_in_a_row, len(BACKOFF_S) - 1)]
        self._timeouts_in_a_row += 1
        self._drop(c)
        self._wake.set()

    def _drop(self, c: Connection | None) -> None:
        if c is not None:
            if self._asking is c:
                self._asking = None
            c.close()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            self._keep_up()
        finally:
            self._lose_watching()

    def _lose_watching(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.close()

    def _keep_up(self) -> None:
        failed = 0
        complained = False
        while not self._closed:
            try:
                if self._watching is None:
                    self._watching = self._open()
                self._poll(self._watching)
                if self._asking is None and time.monotonic() >= self._not_before:
                    self._asking = self._open()
                if complained:
                    log.info("the directory at %s can be read again", self._endpoint)
                failed, complained = 0, False
                self._first_poll.set()
                wait_s = self._poll_s
                if self._asking is None:
                    wait_s = min(wait_s, max(0.01, self._not_before - time.monotonic()))
            except (OSError, DirectoryError) as error:
                self._n["failures"] += 1
                if not complained:
                    complained = True
                    log.warning(
                        "kvplug: the directory at %s can't be read (%s): hosts that are known are asked themselves "
                        "until it can",
                        self._endpoint,
                        error,
                    )
                self._lose_watching()
                if self._lock.acquire(timeout=EXCHANGE_S):
                    try:
                        self._drop(self._asking)
                    finally:
                        self._lock.release()
                wait_s = BACKOFF_S[min(failed, len(BACKOFF_S) - 1)]
                failed += 1
            self._wake.wait(wait_s)
            self._wake.clear()

    def _open(self) -> Connection:
        return Connection.open(self._endpoint, time.monotonic() + CONNECT_S)

    def _poll(self, c: Connection) -> None:
        """Read the members and their records."""
        deadline = time.monotonic() + EXCHANGE_S
        (answer,) = c.call(deadline, command("SMEMBERS", self._names.members))
        ids = sorted({m.decode("ascii", "replace") for m in listed(answer) if isinstance(m, bytes) and len(m) <= 64})
        others = [i for i in ids if i != self._own_id][:MAX_PEERS]
        records: list[Reply] = []
        if others:
            (answer,) = c.call(deadline, command("MGET", *map(self._names.host, others)))
            records = listed(answer, len(others))
        found = [from_record(record, i, self._names) for i, record in zip(others, records, strict=True)]
        self._n["bad_records"] += sum(
            peer is None and record is not None for peer, record in zip(found, records, strict=True)
        )
        self._peers = tuple(peer for peer in found if peer is not None)
        absent = {i for i, record in zip(others, records, strict=True) if record is None}
        now = time.monotonic()
        self._absent_since = {i: self._absent_since.get(i, now) for i in absent}
        if long_gone := [i for i, since in self._absent_since.items() if now - since > FORGET_S]:
            c.call(deadline, command("SREM", self._names.members, *long_gone))


def door(config: Config) -> tuple[Endpoint, Names]:
    """Where the configured directory is, and the names in it. ConfigError: there is none, or it needs a key."""
    if config.directory_url is None:
        raise ConfigError("directory_url is not set: there is no directory")
    endpoint = Endpoint.parse(config.directory_url.get_secret_value())
    secret = shared_key(config)
    if secret is None and not endpoint.is_local:
        raise ConfigError(
            f"a directory on another host ({endpoint}) needs auth_key: without it anybody there could read which "
            f"prefixes were asked for, and add hosts. Set the same KVPLUG_AUTH_KEY on all hosts"
        )
    return endpoint, Names(secret)


def describe_server(config: Config) -> str:
    """What answers at the configured directory: its address, version and number of hosts. OSError, KvplugError."""
    endpoint, names = door(config)
    connection = Connection.open(endpoint, time.monotonic() + CONNECT_S)
    try:
        deadline = time.monotonic() + EXCHANGE_S
        info, n_hosts, flags = connection.call(
            deadline,
            command("INFO", "server"),
            command("SCARD", names.members),
            command("SMISMEMBER", names.members, ""),
        )
        about = dict(line.split(":", 1) for line in text(info).splitlines() if ":" in line)
        listed(flags, 1)
        version = next((about[name] for name in ("valkey_version", "redis_version") if name in about), "of no version")
        return f"{endpoint} answers ({about.get('server_name', 'redis')} {version}), {number(n_hosts)} hosts"
    finally:
        connection.close()


def _after_fork_in_child() -> None:
    for directory in list(_open_here):
        directory._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
