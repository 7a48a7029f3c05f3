"""A reader taken apart: what a stranger, or somebody who has listened, could send to an agent."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from kvplug.rdma.control.auth import NO_KEY, Session, open_handshake, shared_key
from kvplug.rdma.control.protocol import NONCE_BYTES, Challenge, Hello, Message, Proof, encode, expect
from kvplug.rdma.control.wire import Connection
from tests.rdma.hosts import Host

SOON_S = 60.0
opened: list[Connection | socket.socket] = []
"""Closed by a fixture when the test ends."""


def dial(address: str) -> Connection:
    """A connection on which nothing was said."""
    host, port = address.rsplit(":", 1)
    connection = Connection(socket.create_connection((host, int(port)), SOON_S))
    opened.append(connection)
    return connection


def admitted(host: Host, address: str) -> tuple[Connection, Session]:
    """A control connection after its handshake."""
    connection = dial(address)
    session, _, _ = open_handshake(connection, shared_key(host.config), time.monotonic() + SOON_S)
    return connection, session


def ask(connection: Connection, message: Message, request: int = 1) -> Message:
    """One request, one answer."""
    connection.send(message, request, time.monotonic() + SOON_S)
    return connection.receive(time.monotonic() + SOON_S)[0]


def half_way(connection: Connection, secret: bytes | None, **changes: Any) -> tuple[Session, bytes]:
    """Hello and Challenge: the session that a right Proof would open, and the Hello's bytes."""
    fields: dict[str, Any] = {"role": "control", "keyed": secret is not None, "nonce": os.urandom(NONCE_BYTES)}
    hello = Hello(**(fields | {"target": connection.peer} | changes))
    said = connection.send(hello, 0, time.monotonic() + SOON_S)
    answer, _, answered = connection.receive(time.monotonic() + SOON_S)
    expect(answer, Challenge)
    return Session(secret or NO_KEY, said, answered), said


def frame(message: Message, mac: bytes = b"", request: int = 0) -> bytes:
    """The bytes of a frame."""
    return b"".join(encode(message, request)) + mac


def is_hung_up_on(connection: Connection) -> bool:
    """Whether the agent ends the connection, and says nothing more."""
    connection.sock.settimeout(SOON_S)
    try:
        return connection.sock.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


__all__ = ["Proof", "admitted", "ask", "dial", "frame", "half_way", "is_hung_up_on"]
