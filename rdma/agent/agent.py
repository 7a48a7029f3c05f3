"""The agent: the one process of a host that lets other hosts read its pool.

It is a client of the pool like any other, in a session of its own, and holds nothing but pins: killed at any instant,
it leaves what the pool's own recovery takes back. Each connection has a thread of its own, so that one that is slow,
stopped or hostile holds up nobody else; every wait has a deadline, and whatever a peer may take (connections, leases,
bytes kept in place, the size of a frame) is bounded. Whoever breaks the protocol is counted and hung up on.

One agent serves one pool: it holds a byte lock on the segment itself, far past its end, which the kernel lets go of
when the agent dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np

from kvplug.errors import (
    AgentError,
    Code,
    PeerAuthError,
    PeerError,
    PeerTimeoutError,
    PoolError,
    ProtocolError,
    VerbsError,
)
from kvplug.rdma.agent.cachenode import CacheNode
from kvplug.rdma.agent.offers import Offerer
from kvplug.rdma.blocks import Blocks, PinnedParts
from kvplug.rdma.control import faults
from kvplug.rdma.control import protocol as p
from kvplug.rdma.control.auth import (
    HANDSHAKE_S,
    NO_KEY,
    Session,
    accept_tls,
    answer_handshake,
    check_exposure,
    shared_key,
    tls_context,
)
from kvplug.rdma.control.leases import LeaseTable
from kvplug.rdma.control.wire import ClosedError, Connection, address_text, is_loopback, resolve, split_address
from kvplug.rdma.data.tcp import IDLE_S, Sender
from kvplug.rdma.directory.peers import PeerSource, StaticPeers
from kvplug.rdma.verbs.queues import QueueServer
from kvplug.threads import LivingThread, guarded, troubles

if TYPE_CHECKING:
    from kvplug.config import Config

log = logging.getLogger("kvplug")

MAX_CONNECTIONS: Final = 512
MAX_DATA_CONNECTIONS: Final = 32  # of one reader
MAX_TICKETS: Final = 32  # of one reader, not yet used
TICKET_S: Final = 10.0
ROUND_S: Final = 0.1
COMPLAIN_S: Final = 60.0
ANSWER_S: Final = 1.0
"""A reader that does not take its answer for so long is hung up on."""
STOP_S: Final = 2.0
LOCK_BYTE: Final = 1 << 62
F_OFD_SETLK: Final = 37
_FLOCK: Final = "hhqqi"


class _Reader:
    """One control connection."""

    def __init__(self, number: int, session: Session) -> None:
        self.number, self.session = number, session
        self.tickets: dict[bytes, float] = {}
        self.data: set[Connection] = set()
        self.gone = False


def check_settings(config: Config) -> None:
    """Refuse what an agent would refuse anyway, without a pool. Raises AgentError, ConfigError."""
    guarded = shared_key(config) is not None or tls_context(config, server=True) is not None
    check_exposure(config.agent_listen, guarded=guarded)


class Agent:
    """Serves one pool. ``start`` listens, ``serve`` keeps house until it is told to stop, ``close`` ends it."""

    def __init__(self, blocks: Blocks, config: Config, peers: PeerSource | None = None) -> None:
        """Take the pool's agent lock and read keys and certificates. Raises AgentError, ConfigError, PoolError.

        ``peers``: the other hosts, which the caller closes. What is about to be evicted here is offered to the cache
        nodes among them; on a cache node, they may offer. Default: those of the settings.
        """
        faults.arm_from_environment()
        self._blocks, self._config = blocks, config
        self._secret = shared_key(config) or NO_KEY
        self._tls = tls_context(config, server=True)
        self.is_open = self._secret is NO_KEY and self._tls is None
        """Whether anybody on this host may read the pool through it."""
        check_exposure(config.agent_listen, guarded=not self.is_open)
        self._fd = blocks.open_segment()
        if not _lock_byte(self._fd):
            os.close(self._fd)
            raise AgentError(
                f"another agent serves pool {config.pool!r} already, and there is one per pool: stop that one, or name "
                "another pool (KVPLUG_POOL)"
            )
        self.leases = LeaseTable(blocks.unpin, most_bytes=max(1, int(blocks.data_bytes * config.agent_pin_share)))
        self._sender = Sender(self.leases, self._fd, blocks.memory, self.count)
        by_tcp = config.data_path == "tcp" or (config.data_path == "auto" and self._tls is not None)
        self._queues = None if by_tcp else QueueServer(config, blocks.memory, self.count)
        if self._queues is not None and config.data_path == "verbs":
            try:
                self._queues.open_devices()
            except VerbsError as e:
                os.close(self._fd)
                raise AgentError(f"data_path = verbs, but {e}") from None
        self._counters: Counter[str] = Counter()
        self._mutex = threading.Lock()
        self._readers: dict[int, _Reader] = {}
        self._tickets: dict[bytes, _Reader] = {}
        self._complained: dict[str, float] = {}
        self._connections: dict[Connection, threading.Thread] = {}
        self._open = 0
        self._next_reader = 1
        self._stopping = threading.Event()
        peers = StaticPeers(config.peers, own_address=config.agent_listen) if peers is None else peers
        self._node = CacheNode(blocks, config, peers, self.count) if config.cache_node else None
        self._offerer = None if config.cache_node else Offerer(blocks, config, peers, self.count)
        self._listeners: list[socket.socket] = []
        self._acceptor: LivingThread | None = None
        self._names: frozenset[str] = frozenset()
        self.address = ""
        """ip:port that it listens on."""

    def count(self, what: str, n: int = 1) -> None:
        """Add to one of the agent's counters."""
        with self._mutex:
            self._counters[what] += n

    def counters(self) -> dict[str, int]:
        """All counters since the start, and what went wrong in this process's threads that nobody foresaw."""
        with self._mutex:
            counters = dict(self._counters)
        trouble = troubles()
        for name, n in (("thread_errors", trouble.errors), ("threads_dead", trouble.dead)):
            if n:
                counters[name] = sum(n.values())
        return counters

    # ---- listening ---------------------------------------------------------------------------------------------------

    def start(self) -> str:
        """Listen, and answer from now on. The address, ip:port. Raises AgentError."""
        listen = self._config.agent_listen
        try:
            family, place = resolve(listen)[0]
            listener = socket.socket(family, socket.SOCK_STREAM)
            self._listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(128)
            listener.settimeout(ROUND_S)
            names = {address_text(listener.getsockname())}
            if self._config.agent_advertise:
                names |= {address_text(place) for _, place in resolve(self._config.agent_advertise)}
        except PeerError as e:
            raise AgentError(
                f"agent_listen = {listen!r}, agent_advertise = {self._config.agent_advertise!r}: {e}"
            ) from None
        except OSError as e:
            raise AgentError(
                f"cannot listen on {listen}: {e.strerror}; another place is named by --listen or KVPLUG_AGENT_LISTEN"
            ) from None
        self._names = frozenset(names)
        self.address = address_text(listener.getsockname())
        if self._config.data_path == "auto" and is_loopback(split_address(self.address)[0]):
            self._queues = None  # who comes over loopback takes TCP
        self._welcome()  # devices are opened now, not while a reader waits
        self._acceptor = LivingThread("kvplug-accept", lambda: self._accept(listener))
        self._acceptor.start()
        if self._node is not None:
            self._node.start()
        if self._offerer is not None:
            ours = dict.fromkeys(filter(None, (self._config.agent_advertise, listen, *sorted(names))))
            self._offerer.start(tuple(ours)[: p.MAX_ADDRESSES])
        return self.address

    def _welcome(self) -> p.Welcome:
        verbs = self._queues is not None and self._queues.offered()
        paths = ("tcp", "verbs") if verbs else ("tcp",)
        return p.Welcome(self._config.lease_s, p.MAX_KEYS, paths, self._config.cache_node)

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                if self._stopping.wait(ROUND_S):  # out of descriptors, say: others will end
                    return
                continue
            self.count("accepted")
            with self._mutex:
                full = self._open >= MAX_CONNECTIONS
                self._open += not full
            if full:
                self.count("refused")
                sock.close()
                continue
            serve = guarded("kvplug-reader", self._first, "that reader was hung up on, and may dial again")
            thread = threading.Thread(target=serve, args=(sock,), name="kvplug-reader", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads
                with self._mutex:
                    self._open -= 1
                self.count("refused")
                sock.close()

    def _first(self, sock: socket.socket) -> None:
        """A connection's thread: prove each other, serve, clean up."""
        connection: Connection | None = None
        try:
            if faults.armed and faults.meddle("accepted", b"", sock.close):
                self._stopping.wait(HANDSHAKE_S)
                raise PeerTimeoutError("nothing was said")
            connection = Connection(accept_tls(sock, self._tls))
            with self._mutex:
                self._connections[connection] = threading.current_thread()
            if not self._stopping.is_set():
                self._serve(connection)
        except ClosedError:
            self.count("closed")
        except PeerAuthError as e:
            self.count("auth_failures")
            self._complain("auth_failures", e)
        except ProtocolError as e:
            self.count("protocol_errors")
            self._complain("protocol_errors", e)
        except PeerTimeoutError:
            self.count("timed_out")
        except PeerError:
            self.count("broken")
        except PoolError:
            self.count("pool_errors")
        except (OSError, ssl.SSLError):
            self.count("broken")  # gone before anything was said
        finally:
            if connection is not None:
                connection.close()
            sock.close()
            with self._mutex:
                self._open -= 1
                if connection is not None:
                    self._connections.pop(connection, None)

    def _complain(self, what: str, error: PeerError) -> None:
        """Says why somebody was refused, of each kind once a minute at most: anybody can connect."""
        now = time.monotonic()
        with self._mutex:
            if now < self._complained.get(what, -COMPLAIN_S) + COMPLAIN_S:
                return
            self._complained[what] = now
            so_far = self._counters[what]
        log.warning("kvplug: agent: refused: %s (%s: %d so far)", error, what, so_far)

    def _serve(self, connection: Connection) -> None:
        names = self._names | {connection.local}  # a wildcard listens at many
        reader: _Reader | None = None
        role = "control"

        def admit(session: Session, hello: p.Hello) -> None:
            nonlocal reader, role
            role = hello.role
            reader = self._new_reader(session) if role == "control" else self._reader_of(hello.ticket, connection)

        try:
            answer_handshake(
                connection, self._secret_of, admit=admit, host=self._blocks.host, names=names, welcome=self._welcome()
            )
            assert reader is not None
            if role == "control":
                self._serve_control(connection, reader)
            else:
                self._sender.serve(connection, reader.number)
        finally:
            if reader is not None and role == "control":
                self._forget(reader)
            elif reader is not None:
                with self._mutex:
                    reader.data.discard(connection)

    def _secret_of(self, hello: p.Hello) -> bytes | None:
        if hello.role == "control":
            return self._secret
        with self._mutex:
            reader = self._tickets.get(hello.ticket)
            good = reader is not None and reader.tickets.get(hello.ticket, 0.0) > time.monotonic()
            return reader.session.ticket_key(hello.ticket) if reader is not None and good else None

    # ---- a reader's connections --------------------------------------------------------------------------------------

    def _reader_of(self, ticket: bytes, connection: Connection) -> _Reader:
        """Whose data connection this is. The ticket is used up, by one of those who showed it."""
        with self._mutex:
            reader = self._tickets.pop(ticket, None)
            if reader is None or reader.gone or len(reader.data) >= MAX_DATA_CONNECTIONS:
                raise PeerAuthError(f"{connection.peer} showed a ticket that was used")
            del reader.tickets[ticket]
            reader.data.add(connection)
            return reader

    def _new_reader(self, session: Session) -> _Reader:
        with self._mutex:
            reader = _Reader(self._next_reader, session)
            self._next_reader += 1
            self._readers[reader.number] = reader
            self._counters["readers"] += 1
            return reader

    def _forget(self, reader: _Reader) -> None:
        with self._mutex:
            reader.gone = True
            del self._readers[reader.number]
            for ticket in reader.tickets:
                self._tickets.pop(ticket, None)
            data = list(reader.data)
        for one in data:
            one.interrupt()
        self.leases.release_reader(reader.number)
        if self._node is not None:
            self._node.forget(reader.number)
        if self._queues is not None:
            self._queues.forget(reader.number)

    def _serve_control(self, connection: Connection, reader: _Reader) -> None:
        while not self._stopping.is_set():
            message, request, _ = connection.receive(0, idle_deadline=time.monotonic() + IDLE_S)
            connection.send(self._answer(reader, message, connection), request, time.monotonic() + ANSWER_S)

    def _answer(self, reader: _Reader, message: p.Message, connection: Connection) -> p.Message:
        if isinstance(message, p.Lookup):
            return self._lookup(reader, message)
        if isinstance(message, p.Release):
            return p.Released(self.leases.release(message.leases, reader.number))
        if isinstance(message, p.Extend):
            seconds = self._bounded(message.seconds)
            return p.Extended(seconds if self.leases.extend(message.lease, reader.number, seconds) else 0.0)
        if isinstance(message, p.GetTicket):
            return self._ticket(reader)
        if isinstance(message, p.OpenQueue | p.GetRegions):
            if self._queues is None:
                return p.Failed("request")
            lease = self.leases.of(message.lease, reader.number) if isinstance(message, p.GetRegions) else None
            return self._queues.answer(message, reader.number, split_address(connection.local)[0], lease)
        if isinstance(message, p.Stats):
            return p.StatsReply(self.counters(), *self.leases.held())
        if isinstance(message, p.Offer):
            return p.Failed("request") if self._node is None else self._node.answer(message, reader.number)
        raise ProtocolError(f"a {type(message).__name__} is no request")

    def _bounded(self, seconds: float) -> float:
        return min(seconds, self._config.lease_s)

    def _ticket(self, reader: _Reader) -> p.Message:
        ticket, now = os.urandom(p.TICKET_BYTES), time.monotonic()
        with self._mutex:
            for old in [old for old, ends in reader.tickets.items() if ends <= now]:
                del reader.tickets[old]
                self._tickets.pop(old, None)
            if len(reader.tickets) >= MAX_TICKETS or len(reader.data) >= MAX_DATA_CONNECTIONS:
                return p.Failed("busy")
            reader.tickets[ticket] = now + TICKET_S
            self._tickets[ticket] = reader
        return p.Ticket(ticket)

    def _lookup(self, reader: _Reader, message: p.Lookup) -> p.Message:
        keys = p.array(message.keys, np.uint8)
        if len(keys) % p.KEY_BYTES:
            raise ProtocolError(f"{len(keys)} bytes are no keys of {p.KEY_BYTES}")
        keys = keys.reshape(-1, p.KEY_BYTES)
        if not self._blocks.is_current():
            return p.Failed("pool")
        seconds = self._bounded(message.seconds)
        pinned = self._blocks.pin(keys, prefix=message.prefix, touch=message.touch)
        codes = np.minimum(pinned.codes, 0)
        found = len(pinned.slots)
        fits = np.cumsum(pinned.nbytes) <= self.leases.room(reader.number)
        fits &= np.cumsum(pinned.part_counts) <= p.MAX_PARTS_A_REPLY
        m = int(fits.sum()) if message.seconds else 0
        if m < found:
            self._blocks.unpin(pinned.slots[m:])
            codes[np.flatnonzero(codes == 0)[m:]] = Code.BUDGET
        lease = None
        if m:
            lease = self.leases.grant(reader.number, seconds, pinned.slots[:m], pinned.offsets[:m], pinned.nbytes[:m])
            if lease is None:  # another thread was first
                self._blocks.unpin(pinned.slots[:m])
                codes[codes == 0] = Code.BUDGET
                m = 0
            if faults.armed:
                faults.happen("lease granted")
        with self._mutex:
            self._counters["lookups"] += 1
            self._counters["keys_asked"] += len(keys)
            self._counters["keys_leased"] += m
        return _leased(lease.id if lease else 0, seconds, codes, pinned, m)

    # ---- the house ---------------------------------------------------------------------------------------------------

    def serve(self, stop: threading.Event) -> None:
        """End leases that have run out, until ``stop`` is set. Raises AgentError when the pool is gone."""
        while not stop.wait(ROUND_S):
            expired = self.leases.expire()
            if expired:
                self.count("leases_expired", expired)
            if not self._blocks.is_current():
                raise AgentError("the pool was removed: start the agent again once there is a new one")

    def close(self) -> None:
        """Hang up on everybody, release all pins and the lock. Idempotent."""
        self._stopping.set()
        for part in (self._offerer, self._node):
            if part is not None:
                part.close()
        if self._acceptor is not None:
            self._acceptor.end(STOP_S)  # else its address stays taken
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.close()
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline:
            with self._mutex:
                left = dict(self._connections)
            if not left:
                break
            for connection, thread in left.items():
                connection.interrupt()
                thread.join(0.05)
        self.leases.release_all()
        if self._queues is not None:
            self._queues.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _leased(lease: int, seconds: float, codes: p.I8, b: PinnedParts, m: int) -> p.Leased:
    parts = int(b.part_counts[:m].sum())
    return p.Leased(
        lease,
        seconds,
        p.raw(codes, np.int8),
        p.raw(b.offsets[:m], np.int64),
        p.raw(b.gens[:m], np.int64),
        p.raw(b.siblings[:m], np.uint16),
        p.raw(b.part_counts[:m], np.uint8),
        p.raw(b.part_nbytes[:parts], np.int64),
        p.raw(b.part_sums[:parts], np.int64),
    )


def _lock_byte(fd: int) -> bool:
    """Lock the agent's byte for this description. False: another one has it."""
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, LOCK_BYTE, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True
