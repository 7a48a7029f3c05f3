"""Who is there: the handshake of two hosts that share a key, and TLS where both certificates are checked.

Both ends prove that they have the key, neither shows it. The *transcript* is BLAKE3 over the bytes of Hello and
Challenge, and so over both nonces, the role of the connection, the address that the reader dialled, the agent's
identity and the protocol's version. From it and the key follow the session's key, and from that one key for each
direction; the reader's first frame (Proof) and the agent's (Welcome) carry the first MACs under them, which nobody
can make who has not the key, or took part in another handshake. The reader proves itself first, so that a stranger
who knocks learns nothing that a guess at the key could be checked against.

A data connection shows a *ticket* that it was given on its reader's control connection. Its handshake is the same,
with a key derived from that session in place of the shared one: it is good once, and only for who holds the session.

Frames are authenticated, not encrypted: whoever can listen sees keys and blocks. TLS hides both.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

from blake3 import blake3

from kvplug.errors import AgentError, ConfigError, PeerAuthError, PeerError, PeerTimeoutError, ProtocolError
from kvplug.rdma import faults
from kvplug.rdma.protocol import (
    NONCE_BYTES,
    Challenge,
    Failed,
    Hello,
    Proof,
    Welcome,
    WrongVersionError,
    expect,
)
from kvplug.rdma.wire import ClosedError, Connection, is_loopback, resolve, split_address

if TYPE_CHECKING:
    from kvplug.config import Config

T = TypeVar("T")
HANDSHAKE_S: Final = 2.0
_KEY_CONTEXT: Final = "kvplug agent protocol 1: key shared by all hosts"

REFUSALS: Final = {
    "version": "it speaks another version of the protocol: use one version of kvplug on all hosts",
    "keyed": "only one of the two has a key: set the same KVPLUG_AUTH_KEY on both",
    "target": "it does not go by the address that was dialled: set KVPLUG_AGENT_ADVERTISE there",
    "busy": "it has as many connections as it may have",
    "ticket": "the ticket of this data connection is not good any more",
    "request": "it can't do what was asked",
    "lease": "the lease has ended",
    "pool": "its pool is gone or has no lock to be had",
    "stranger": "it does not know this host: name this host's address in its `peers`, or give both one directory",
}
"""What the codes of :class:`~kvplug.rdma.protocol.Failed` mean."""


def shared_key(config: Config) -> bytes | None:
    """The key that all hosts derive from KVPLUG_AUTH_KEY, 32 bytes; None: none is set."""
    if config.auth_key is None:
        return None
    return blake3(config.auth_key.get_secret_value().encode(), derive_key_context=_KEY_CONTEXT).digest()


class Session:
    """The keys of one connection, after its handshake."""

    def __init__(self, secret: bytes, hello: bytes, challenge: bytes) -> None:
        transcript = blake3(len(hello).to_bytes(4, "little") + hello + challenge).digest()
        self._key = blake3(transcript, key=secret).digest()
        self.to_agent = blake3(b"reader to agent", key=self._key).digest()
        self.to_reader = blake3(b"agent to reader", key=self._key).digest()

    def ticket_key(self, ticket: bytes) -> bytes:
        """What takes the shared key's place in the handshake of the data connection with this ticket."""
        return blake3(b"ticket" + ticket, key=self._key).digest()


NO_KEY: Final = bytes(32)
"""The key of hosts that have none: the frames keep their form, and their MACs find accidents only."""


def knock(
    connection: Connection, secret: bytes | None, deadline: float, *, ticket: bytes = b""
) -> tuple[Session, Welcome, Challenge]:
    """The reader's side of the handshake. Raises PeerAuthError, PeerTimeoutError, PeerError."""
    hello = Hello("data" if ticket else "control", secret is not None, os.urandom(NONCE_BYTES), connection.peer, ticket)
    try:
        said = connection.send(hello, 0, deadline)
        answer, _, answered = connection.receive(deadline)
        if isinstance(answer, Failed):
            raise PeerAuthError(f"the agent at {connection.peer} refused: {REFUSALS[answer.code]}")
        challenge = expect(answer, Challenge)
        if challenge.keyed != hello.keyed:
            raise PeerAuthError(f"the agent at {connection.peer}: {REFUSALS['keyed']}")
        session = Session(secret or NO_KEY, said, answered)
        connection.secure(session.to_agent, session.to_reader)
        connection.send(Proof(), 0, deadline)
        welcome = expect(connection.receive(deadline)[0], Welcome)
    except ClosedError:
        raise PeerAuthError(
            f"the agent at {connection.peer} closed the connection during the handshake: does it have the same "
            f"KVPLUG_AUTH_KEY?"
        ) from None
    except WrongVersionError as e:
        raise PeerAuthError(f"the agent at {connection.peer}: {e}") from None
    return session, welcome, challenge


def answer_knock(
    connection: Connection,
    secret_of: Callable[[Hello], bytes | None],
    *,
    admit: Callable[[Session, Hello], T],
    host: bytes,
    names: frozenset[str],
    welcome: Welcome,
) -> T:
    """The agent's side. ``secret_of``: the key for this Hello; None: its ticket is not good. What ``admit`` answers.

    ``admit`` is called when both ends are proved, before the reader is told so; it may raise PeerAuthError.

    Raises PeerAuthError, ProtocolError, PeerError; nothing was told to who did not prove himself but the Challenge.
    """
    deadline = time.monotonic() + HANDSHAKE_S
    try:
        message, _, said = connection.receive(deadline)
    except WrongVersionError:
        _refuse(connection, Failed("version"), deadline)
        raise
    hello = expect(message, Hello)
    if hello.target not in names:
        _refuse(connection, Failed("target"), deadline)
        raise PeerAuthError(f"{connection.peer} wanted to reach {hello.target!r}")
    secret = secret_of(hello)
    if secret is None:
        _refuse(connection, Failed("ticket"), deadline)
        raise PeerAuthError(f"{connection.peer} showed a ticket that is not good")
    keyed = secret is not NO_KEY
    if hello.keyed != keyed:
        _refuse(connection, Failed("keyed"), deadline)
        raise PeerAuthError(f"{connection.peer} has {'a' if hello.keyed else 'no'} key")
    answered = connection.send(Challenge(keyed, os.urandom(NONCE_BYTES), host), 0, deadline)
    session = Session(secret, said, answered)
    connection.secure(session.to_reader, session.to_agent)
    try:
        expect(connection.receive(deadline)[0], Proof)
    except ProtocolError:
        raise PeerAuthError(f"{connection.peer} did not prove that it has the key") from None
    admitted = admit(session, hello)
    connection.send(welcome, 0, deadline)
    return admitted


def _refuse(connection: Connection, why: Failed, deadline: float) -> None:
    with contextlib.suppress(PeerError):
        connection.send(why, 0, deadline)


# ---- TLS and addresses -----------------------------------------------------------------------------------------------


def tls_context(config: Config, *, server: bool) -> ssl.SSLContext | None:
    """The context of one side, with the other's certificate required; None: no TLS. Raises ConfigError."""
    if config.tls_cert is None or config.tls_key is None or config.tls_ca is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
        context.load_verify_locations(config.tls_ca)
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(
            f"TLS with tls_cert={config.tls_cert!r}, tls_key={config.tls_key!r}, tls_ca={config.tls_ca!r}: {e}"
        ) from None
    return context


def accept_tls(sock: socket.socket, context: ssl.SSLContext | None) -> socket.socket:
    """The agent's end of a new connection. Raises PeerAuthError, PeerError."""
    if context is None:
        return sock
    try:
        sock.settimeout(HANDSHAKE_S)
        return context.wrap_socket(sock, server_side=True)
    except ssl.SSLError as e:
        raise PeerAuthError(f"no TLS with who dialled: {e.reason}") from None
    except (OSError, ValueError) as e:
        raise PeerError(f"a connection broke in the TLS handshake: {e}") from None


def dial(address: str, places: list[tuple[socket.AddressFamily, tuple[str, int]]], context: ssl.SSLContext | None,
         deadline: float) -> Connection:  # fmt: skip
    """A connection with an agent, not yet proved. Raises PeerAuthError, PeerTimeoutError, PeerError."""
    last: PeerError = PeerError(f"{address} stands for no address")
    for family, place in places:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            sock.settimeout(left)
            if faults.armed and faults.meddle("dial", b"", sock.close):
                time.sleep(left)
                raise TimeoutError
            sock.connect(place)
            if context is not None:
                sock = context.wrap_socket(sock, server_hostname=split_address(address)[0])
            return Connection(sock)
        except ssl.SSLError as e:
            sock.close()
            raise PeerAuthError(f"no TLS with {address}: {getattr(e, 'verify_message', '') or e.reason}") from None
        except TimeoutError:
            sock.close()
            last = PeerTimeoutError(f"{address} did not take a connection within the deadline")
        except (OSError, ValueError) as e:
            sock.close()
            last = PeerError(f"{address} can't be reached: {e}")
    raise last


def check_exposure(listen: str, *, guarded: bool) -> None:
    """Refuse to listen wider than loopback without a key or TLS. Raises AgentError."""
    if guarded:
        return
    try:
        wide = [ip for _, (ip, _) in resolve(listen) if not is_loopback(ip)]
    except PeerError as e:
        raise AgentError(f"agent_listen = {listen!r}: {e}") from None
    if wide:
        raise AgentError(
            f"agent_listen = {listen!r} is {wide[0]}, which others can reach: set KVPLUG_AUTH_KEY (the same on all "
            f"hosts), or tls_cert, tls_key and tls_ca, or listen on 127.0.0.1"
        )
