"""A reader's control connection with one agent: dialled when needed, asked one thing at a time."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING, Final, TypeVar

from kvplug.errors import PeerError, PeerTimeoutError, ProtocolError
from kvplug.rdma.control import faults
from kvplug.rdma.control.auth import REFUSALS, Session, dial, open_handshake, shared_key, tls_context
from kvplug.rdma.control.protocol import Challenge, Failed, GetTicket, Message, Ticket, Welcome, expect
from kvplug.rdma.control.wire import Connection, resolve, split_address
from kvplug.threads import guarded

if TYPE_CHECKING:
    from kvplug.config import Config

RESOLVED_FOR_S: Final = 60.0
M = TypeVar("M", bound=Message)
Places = list[tuple[socket.AddressFamily, tuple[str, int]]]


class RefusedError(PeerError):
    """The agent said no; the connection is whole."""


class Link:
    """The control connection with the agent at ``address`` (host:port). Thread-safe: one request at a time."""

    def __init__(self, address: str, config: Config) -> None:
        faults.arm_from_environment()
        self.address = address
        self.generation = 0
        """Counts the connections so far: what was agreed on an earlier one has ended with it."""
        self._timeout_s = config.peer_timeout_s
        self._secret = shared_key(config)
        self._tls = tls_context(config, server=False)
        self._mutex = threading.Lock()
        self._connection: Connection | None = None
        self._session: Session | None = None
        self._requests = 0
        self._ends = ("", "")
        self._closed = False
        self._places: Places = []
        self._resolved = 0.0
        self.welcome: Welcome | None = None
        self.host = b""
        """Identity of the pool at the other end."""

    @property
    def ends(self) -> tuple[str, str]:
        """IP addresses of this end and the other, as of the last connection; empty before it."""
        return self._ends

    def connect(self, deadline: float) -> None:
        """Be connected. Raises PeerError or one of its kinds."""
        with _held(self._mutex, deadline):
            self._connect(min(deadline, time.monotonic() + self._timeout_s))

    def _connect(self, deadline: float) -> bool:
        """Whether the connection is a new one."""
        if self._connection is not None:
            return False
        if self._closed:
            raise PeerError(f"the link to {self.address} was closed")
        connection = dial(self.address, self._lookup_places(deadline), self._tls, deadline)
        try:
            session, welcome, challenge = open_handshake(connection, self._secret, deadline)
        except BaseException:
            connection.close()
            raise
        self._connection, self._session = connection, session
        self._ends = split_address(connection.local)[0], split_address(connection.peer)[0]
        self.welcome, self.host = welcome, _host_of(challenge)
        self.generation += 1
        return True

    def _lookup_places(self, deadline: float) -> Places:
        """The name's addresses. Name servers may take long, so a thread asks them and the deadline holds here."""
        if self._places and time.monotonic() < self._resolved + RESOLVED_FOR_S:
            return self._places
        found: list[Places | PeerError] = []

        def ask() -> None:
            try:
                found.append(resolve(self.address))
            except PeerError as e:
                found.append(e)

        outcome = "that host is not dialled this time"
        thread = threading.Thread(target=guarded("kvplug-resolve", ask, outcome), name="kvplug-resolve", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            raise PeerError(f"{self.address} can't be looked up: this process can have no more threads") from None
        thread.join(max(0.0, deadline - time.monotonic()))
        if not found:
            raise PeerTimeoutError(f"no name server said who {self.address} is")
        if isinstance(found[0], PeerError):
            raise found[0]
        self._places, self._resolved = found[0], time.monotonic()
        return self._places

    def ask(self, message: Message, wanted: type[M], deadline: float, *, again: bool = False) -> M:
        """Send a request and return its answer, which comes within the peer's time-out or not at all.

        ``again``: a connection that had broken while it was idle is dialled anew, and the request sent once more.
        Raises RefusedError, PeerTimeoutError, PeerError.
        """
        return self.ask_here(message, wanted, deadline, again=again)[1]

    def ask_here(self, message: Message, wanted: type[M], deadline: float, *, again: bool = False) -> tuple[int, M]:
        """The same, and of which generation the connection was that it was asked on."""
        with _held(self._mutex, deadline):
            soon = min(deadline, time.monotonic() + self._timeout_s)
            fresh = self._connect(soon)
            try:
                return self.generation, self._ask(message, wanted, soon)
            except (PeerTimeoutError, ProtocolError, RefusedError):
                raise
            except PeerError:
                if fresh or not again:
                    raise
            self._connect(soon)
            return self.generation, self._ask(message, wanted, soon)

    def _ask(self, message: Message, wanted: type[M], deadline: float) -> M:
        assert self._connection is not None
        self._requests += 1
        try:
            self._connection.send(message, self._requests, deadline)
            answer, request, _ = self._connection.receive(deadline)
            if request != self._requests:
                raise PeerError(f"{self.address} answered request {request}, not {self._requests}")
            if isinstance(answer, Failed):
                raise RefusedError(f"{self.address} refused: {REFUSALS[answer.code]}")
            return expect(answer, wanted)
        except RefusedError:
            raise
        except PeerError:
            self._drop()
            raise

    def dial_data(self, deadline: float) -> tuple[int, Connection]:
        """(generation, a new data connection that belongs to this control connection). Raises PeerError."""
        ticket = self.ask(GetTicket(), Ticket, deadline).ticket
        with _held(self._mutex, deadline):
            session, generation = self._session, self.generation
            places = self._places
        if session is None:
            raise PeerError(f"the connection with {self.address} broke")
        connection = dial(self.address, places, self._tls, deadline)
        try:
            open_handshake(connection, session.ticket_key(ticket), deadline, ticket=ticket)
        except BaseException:
            connection.close()
            raise
        return generation, connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._session = None

    def close(self) -> None:
        """Hang up: with it go the leases at the other end. Idempotent."""
        self._closed = True
        connection = self._connection
        if connection is not None:
            connection.interrupt()
        with self._mutex:
            self._drop()


class _held:  # noqa: N801 - used like a function
    """A mutex with a deadline."""

    def __init__(self, mutex: threading.Lock, deadline: float) -> None:
        self._mutex, self._deadline = mutex, deadline

    def __enter__(self) -> None:
        if not self._mutex.acquire(timeout=max(0.0, self._deadline - time.monotonic())):
            raise PeerTimeoutError("another request was still under way at the deadline")

    def __exit__(self, *_: object) -> None:
        self._mutex.release()


def _host_of(challenge: Challenge) -> bytes:
    return challenge.host
