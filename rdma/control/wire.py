"""One connection: frames in and out, each under a deadline, with a MAC once there are keys.

A connection belongs to one thread at a time. After any error it is closed: nobody knows where the next frame would
begin.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import socket
import ssl
import struct
import time
from typing import Final

from blake3 import blake3

from kvplug.errors import PeerAuthError, PeerError, PeerTimeoutError, ProtocolError
from kvplug.rdma.control import faults, tlsfaults
from kvplug.rdma.control.protocol import (
    HEADER,
    KINDS,
    MAC_BYTES,
    MAGIC,
    Message,
    check_magic,
    decode,
    encode,
    parse_header,
)

FRAME_S: Final = 2.0
"""Longest time between the first and the last byte of a frame."""
_TIMEVAL: Final = struct.Struct("ll")
KEEPALIVE_S: Final = (10, 5, 3)  # idle, between probes, number of probes


class FrameMac:
    """MACs of one direction: over the frame's number too, so that none is replayed, reordered or left out."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0

    def next(self, header: bytes, body: bytes | bytearray) -> bytes:
        """MAC of the next frame."""
        number = self._number.to_bytes(8, "little")
        self._number += 1
        return blake3(number + header, key=self._key).update(body).digest(MAC_BYTES)


class Connection:
    """A connected socket that speaks frames. Every call raises PeerError or one of its kinds, and nothing else."""

    def __init__(self, sock: socket.socket, peer: tuple[object, ...] | None = None) -> None:
        """``peer``: the other end's socket address, where it may have hung up already. Raises OSError."""
        self.sock = sock
        self._out: FrameMac | None = None
        self._in: FrameMac | None = None
        try:
            peer = sock.getpeername()
        except OSError:
            if peer is None:
                raise
        self.peer = address_text(peer)
        self.local = address_text(sock.getsockname())
        self.is_tls = isinstance(sock, ssl.SSLSocket)
        self.is_same_host = peer[0] == sock.getsockname()[0]
        """Whether the other end has our own address: nothing leaves this host's kernel."""
        if not self.is_tls:
            sock.settimeout(None)  # the kernel keeps the time: Python's own way lets go of the interpreter twice more
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in zip(
            (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT), KEEPALIVE_S, strict=True
        ):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def secure(self, out_key: bytes, in_key: bytes) -> None:
        """From the next frame on, each has a MAC."""
        self._out, self._in = FrameMac(out_key), FrameMac(in_key)

    def send(self, message: Message, request: int, deadline: float) -> bytes:
        """Send one frame; its header and body. ``deadline`` is of time.monotonic()."""
        header, body = encode(message, request)
        mac = self._out.next(header, body) if self._out else b""
        frame = header + body + mac
        if faults.armed:
            frame = self._meddled(type(message), "sent", frame)
        left = memoryview(frame)
        try:
            while left:
                self._limit(_left(deadline), socket.SO_SNDTIMEO)
                left = left[self.sock.send(left) :]
        except (TimeoutError, BlockingIOError):
            raise PeerTimeoutError(f"{self.peer} took no {type(message).__name__} within the deadline") from None
        except (OSError, ValueError) as e:
            raise self.broken(e) from None
        return header + body

    def receive(self, deadline: float, *, idle_deadline: float | None = None) -> tuple[Message, int, bytes]:
        """(message, request id, header and body). ``idle_deadline``: until when its first byte may come."""
        header = bytearray(HEADER.size)
        got = 0
        if idle_deadline is not None:
            got = self._fill(memoryview(header)[:1], idle_deadline)
            deadline = time.monotonic() + FRAME_S
        try:
            self._fill(memoryview(header)[got:], deadline)
        except (ClosedError, PeerTimeoutError):
            if all(header[: len(MAGIC)]):  # what is shorter than a frame may tell who it was
                check_magic(bytes(header))
            raise
        kind, length, request = parse_header(bytes(header))
        body = bytearray(length + (MAC_BYTES if self._in else 0))
        self._fill(memoryview(body), deadline)
        if faults.armed:
            body = bytearray(self._meddled(KINDS[kind][0], "received", body))
            if not body:  # as if it had never come
                return self.receive(deadline, idle_deadline=idle_deadline)
        if self._in:
            mac = bytes(body[length:])
            del body[length:]
            if not hmac.compare_digest(mac, self._in.next(bytes(header), body)):
                raise ProtocolError(f"a frame from {self.peer} has the wrong MAC")
        return decode(kind, body), request, bytes(header + body)

    def _meddled(self, kind: type[Message], way: str, data: bytes | bytearray) -> bytes:
        """A frame, or its body, after the fault that is due; nothing: it is to go nowhere."""
        made = bytearray(data)
        swallowed = faults.meddle(f"{kind.__name__.lower()} {way}", made, self.interrupt)
        return b"" if swallowed else bytes(made)

    def _fill(self, view: memoryview, deadline: float) -> int:
        at = 0
        try:
            while at < len(view):
                self._limit(_left(deadline), socket.SO_RCVTIMEO)
                n = self.sock.recv_into(view[at:])
                if n == 0:
                    raise ClosedError(f"{self.peer} closed the connection")
                at += n
        except (TimeoutError, BlockingIOError):
            raise PeerTimeoutError(f"{self.peer} sent nothing within the deadline") from None
        except (OSError, ValueError) as e:
            raise self.broken(e) from None
        return at

    def broken(self, error: OSError | ValueError) -> PeerError:
        """What an error of the socket means. The other end's word that it refuses this host comes so with TLS."""
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):  # TLS's way to say that nobody reads any more
            return ClosedError(f"{self.peer} closed the connection")
        why = tlsfaults.meaning(error)
        if why:
            return PeerAuthError(f"no TLS with {self.peer}: {why}")
        return PeerError(f"the connection with {self.peer} broke: {error}")

    def _limit(self, seconds: float, *which: int) -> None:
        """How long a call may block in the kernel without any progress."""
        if self.is_tls:
            self.sock.settimeout(seconds)
            return
        whole = int(seconds)
        wait = _TIMEVAL.pack(whole, max(1, int((seconds - whole) * 1e6)))  # nothing at all would be for ever
        for option in which:
            self.sock.setsockopt(socket.SOL_SOCKET, option, wait)

    def block_with_timeout(self, seconds: float) -> None:
        """For bytes without frames: calls block in the kernel, each for at most so long without any progress."""
        try:
            self._limit(seconds, socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)
        except OSError as e:
            raise self.broken(e) from None

    def wake_at(self, nbytes: int) -> None:
        """For bytes without frames: let calls sleep until so many have come, or the time of one call is over."""
        if self.is_tls:
            return
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)
        except OSError as e:
            raise self.broken(e) from None

    def interrupt(self) -> None:
        """From another thread: whoever waits on this connection stops waiting."""
        with contextlib.suppress(OSError):
            # Past TLS, which would want to say goodbye.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it. Idempotent."""
        self.interrupt()
        with contextlib.suppress(OSError):
            self.sock.close()


class ClosedError(PeerError):
    """The other end closed the connection between two frames or within one."""


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port"; an IPv6 address stands in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def address_text(address: tuple[object, ...]) -> str:
    """ip:port of a socket's address."""
    host, port = str(address[0]), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(address: str) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    """(family, (ip, port)) of every address that a host:port stands for. Raises PeerError."""
    try:
        host, port = split_address(address)
    except ValueError:
        raise PeerError(f"{address[:80]!r} is not host:port") from None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError, OverflowError) as e:  # names that no name can be, ports that no port can be
        raise PeerError(f"nobody knows the address of {host!r}: {e}") from None
    return [(family, (str(sockaddr[0]), int(sockaddr[1]))) for family, _, _, _, sockaddr in found]


def is_loopback(ip: str) -> bool:
    """Whether this address is only reached from this host."""
    return ipaddress.ip_address(ip.partition("%")[0]).is_loopback
