"""Who is there: the handshake of two hosts that share a key, and TLS where both certificates are checked.

Both ends prove that they have the key, neither shows it. The *transcript* is BLAKE3 over the bytes of Hello and
Challenge, and so over both nonces, the role of the connection, the address that the reader dialled, the agent's
identity and the protocol's version. From it and the key follow the session's key, and from that one key for each
direction; the reader's first frame (Proof) and the agent's (Welcome) carry the first MACs under them, which nobody
can make who has not the key, or took part in another handshake. The reader proves itself first, so that a stranger
who connects learns nothing that a guess at the key could be checked against.

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
from kvplug.rdma.control import faults, tlsfaults
from kvplug.rdma.control.protocol import (
    NONCE_BYTES,
    Challenge,
    Failed,
    Hello,
    Proof,
    StrangerError,
    Welcome,
    WrongVersionError,
    expect,
)
from kvplug.rdma.control.wire import ClosedError, Connection, address_text, is_loopback, resolve, split_address

if TYPE_CHECKING:
    from kvplug.config import Config

T = TypeVar("T")
HANDSHAKE_S: Final = 2.0
TLS_ALERT: Final = b"\x15\x03\x03\x00\x02\x02\x46"  # a record of TLS 1.2: fatal, protocol version
LINGER_S: Final = 0.5
"""How long an agent waits for a reader that it refuses to have read why."""
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
"""What the codes of :class:`~kvplug.rdma.control.protocol.Failed` mean."""


def shared_key(config: Config) -> bytes | None:
    """The key that all hosts derive from KVPLUG_AUTH_KEY, 32 bytes; None: none is set."""
    if config.auth_key is None:
        return None
    return blake3(
        config.auth_key.get_secret_value().encode("utf-8", "surrogatepass"), derive_key_context=_KEY_CONTEXT
    ).digest()


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


def open_handshake(
    connection: Connection, secret: bytes | None, deadline: float, *, ticket: bytes = b""
) -> tuple[Session, Welcome, Challenge]:
    """The reader's side of the handshake. Raises PeerAuthError, PeerTimeoutError, PeerError."""
    hello = Hello("data" if ticket else "control", secret is not None, os.urandom(NONCE_BYTES), connection.peer, ticket)
    is_known = False
    try:
        said = connection.send(hello, 0, deadline)
        answer, _, answered = connection.receive(deadline)
        if isinstance(answer, Failed):
            raise PeerAuthError(f"the agent at {connection.peer} refused: {REFUSALS[answer.code]}")
        challenge = expect(answer, Challenge)
        is_known = True
        if challenge.keyed != hello.keyed:
            raise PeerAuthError(f"the agent at {connection.peer}: {REFUSALS['keyed']}")
        session = Session(secret or NO_KEY, said, answered)
        connection.secure(session.to_agent, session.to_reader)
        connection.send(Proof(), 0, deadline)
        welcome = expect(connection.receive(deadline)[0], Welcome)
    except ClosedError:
        if is_known:
            raise PeerAuthError(
                f"the agent at {connection.peer} closed the connection during the handshake: does it have the same "
                f"KVPLUG_AUTH_KEY?"
            ) from None
        raise _refusal(connection, deadline) from None
    except WrongVersionError as e:
        raise PeerAuthError(f"the agent at {connection.peer}: {e}; use one version of kvplug on all hosts") from None
    except StrangerError as e:
        raise PeerAuthError(f"{connection.peer} is no agent that this host can talk to: {e}") from None
    except PeerAuthError:
        raise
    except PeerTimeoutError as e:
        if is_known:
            raise
        raise PeerTimeoutError(f"{e}: it took the connection and did not say who it is. Is it an agent?") from None
    except PeerError as e:
        if isinstance(e, ProtocolError) or is_known:
            raise
        raise _refusal(connection, deadline) from None
    return session, welcome, challenge


_HUNG_UP: Final = {
    False: "hung up before it had said who it is: it may be no agent, want TLS (tls_cert, tls_key, tls_ca), or have as "
    "many connections as it takes",
    True: "hung up after TLS was agreed on and before it had said who it is: it may refuse this host's certificate, or "
    "have as many connections as it takes; its own log says which",
}
"""By whether it is with TLS."""


def _refusal(connection: Connection, deadline: float) -> PeerError:
    """Why an agent hung up while something was being sent to it: what it had said before, if it had."""
    try:
        connection.receive(deadline)
    except (PeerAuthError, StrangerError) as e:
        return e
    except PeerError:
        pass
    return PeerAuthError(f"{connection.peer} {_HUNG_UP[connection.is_tls]}")


def answer_handshake(
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
        # A key with a passphrase would be asked for on the terminal, and be waited for.
        context.load_cert_chain(config.tls_cert, config.tls_key, password=lambda: b"")
        context.load_verify_locations(config.tls_ca)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"TLS with tls_cert={config.tls_cert!r}, tls_key={config.tls_key!r}, tls_ca={config.tls_ca!r}: {e}. All "
            "three are PEM files that this user can read, the key without a passphrase and the one of that certificate"
        ) from None
    return context


def accept_tls(sock: socket.socket, context: ssl.SSLContext | None) -> socket.socket:
    """The agent's end of a new connection. Raises PeerAuthError, PeerError."""
    if context is None:
        return sock
    who = "a reader"
    tls: ssl.SSLSocket | None = None
    try:
        who = address_text(sock.getpeername())
        sock.settimeout(HANDSHAKE_S)
        tls = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        tls.do_handshake()
    except ssl.SSLError as e:
        if tls is not None:
            if e.reason == "WRONG_VERSION_NUMBER":
                _say_tls(tls)
            _let_it_be_read(tls)
        raise PeerAuthError(f"no TLS with {who}: {tlsfaults.meaning(e)}") from None
    except TimeoutError:
        _drop(tls)
        raise PeerTimeoutError(f"{who} began no TLS within {HANDSHAKE_S:g} s") from None
    except (OSError, ValueError) as e:
        _drop(tls)
        raise PeerError(f"the connection with {who} broke in the TLS handshake: {e}") from None
    return tls


def _say_tls(sock: ssl.SSLSocket) -> None:
    """To whoever began without TLS, of which OpenSSL says nothing: the alert that there has to be some."""
    with contextlib.suppress(OSError):
        socket.socket.send(sock, TLS_ALERT)


def _drop(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()


def _let_it_be_read(sock: ssl.SSLSocket) -> None:
    """Close, but not at once: what is still coming from the other end would make the kernel take the alert back."""
    end = time.monotonic() + LINGER_S
    with sock, contextlib.suppress(OSError, ValueError):
        socket.socket.shutdown(sock, socket.SHUT_WR)
        while (left := end - time.monotonic()) > 0:
            sock.settimeout(left)
            if not socket.socket.recv(sock, 1 << 12):
                return


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
        except TimeoutError:
            sock.close()
            last = PeerTimeoutError(f"{address} did not take a connection within the deadline")
            continue
        except (OSError, ValueError) as e:
            sock.close()
            last = PeerError(f"{address} can't be reached: {e}")
            continue
        return _spoken_to(sock, address, place, context)
    raise last


def _spoken_to(sock: socket.socket, address: str, place: tuple[str, int], context: ssl.SSLContext | None) -> Connection:
    """The connection over a socket that was just connected, with TLS if that is wanted. Raises as :func:`dial`."""
    try:
        if context is not None:
            sock = context.wrap_socket(sock, server_hostname=split_address(address)[0])
        # Named by what was dialled: an agent that refuses our certificate may have hung up by now.
        return Connection(sock, place)
    except ssl.SSLError as e:
        sock.close()
        raise PeerAuthError(f"no TLS with {address}: {tlsfaults.meaning(e)}") from None
    except TimeoutError:
        sock.close()
        raise PeerTimeoutError(
            f"{address} took the connection and agreed on no TLS within the deadline: is it an agent with tls_cert?"
        ) from None
    except (OSError, ValueError) as e:
        sock.close()
        if context is None:
            raise PeerError(f"{address} took the connection and hung up at once: {e}") from None
        raise PeerAuthError(f"no TLS with {address}: {tlsfaults.REASONS['UNEXPECTED_EOF_WHILE_READING']}") from None


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
