"""A connection to Redis or Valkey: RESP2, pipelined, whole batches as numpy arrays, one deadline for a whole exchange.

A client library's time-out is per socket call, so a server that trickles its answer can hold a caller for ever; and it
makes an object of each of 2048 answers. Here every wait counts towards the caller's deadline, and the answers that
come in bulk (flags, fixed-size names) are taken as arrays. What this does not speak: RESP3, Cluster, Sentinel.

Any exception but a ServerError that was *returned* leaves the connection out of step: close it and open another.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Iterable
from typing import Any, Final, TypeAlias, Union

import numpy as np
import numpy.typing as npt

from kvplug.endpoint import Endpoint
from kvplug.errors import DecodeError, DirectoryError
from kvplug.outside import whole_number

__all__ = [
    "NAME_BYTES",
    "Connection",
    "Endpoint",
    "Reply",
    "ServerError",
    "command",
    "listed",
    "members",
    "number",
    "text",
    "variadic",
]

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

NAME_BYTES: Final = 8
KEEPALIVE_S: Final = 20
RECV_BYTES: Final = 256 * 1024
MAX_LINE_BYTES: Final = 4096
MAX_BULK_BYTES: Final = 1 << 20
MAX_ARRAY: Final = 1 << 22
MAX_DEPTH: Final = 4
MAX_ANSWER_BYTES: Final = 32 << 20
"""Of one answer with all that is in it. Names of blocks come in bulk, and are bounded by MAX_ARRAY."""
_MEMBER_HEAD: Final = np.frombuffer(b"$%d\r\n" % NAME_BYTES, np.uint8)
_MEMBER_BYTES: Final = len(_MEMBER_HEAD) + NAME_BYTES + 2
_CRLF: Final = np.frombuffer(b"\r\n", np.uint8)


class ServerError(DirectoryError):
    """What the server answered with ``-``, such as ``OOM …`` or ``LOADING …``. The connection is still in step."""

    @property
    def kind(self) -> str:
        """The first word."""
        return str(self.args[0]).split(" ", 1)[0]


Reply: TypeAlias = Union[int, bytes, ServerError, "list[Reply]", None]


# ---- requests --------------------------------------------------------------------------------------------------------


def _bulk(part: bytes | str | int) -> bytes:
    raw = part if isinstance(part, bytes) else str(part).encode()
    return b"$%d\r\n%b\r\n" % (len(raw), raw)


def command(*parts: bytes | str | int) -> bytes:
    """One command, packed."""
    return b"*%d\r\n" % len(parts) + b"".join(map(_bulk, parts))


def variadic(n_members: int, *head: bytes | str | int) -> bytes:
    """The beginning of a command with ``n_members`` names behind ``head``: :func:`members` gives the rest."""
    return b"*%d\r\n" % (len(head) + n_members) + b"".join(map(_bulk, head))


def members(names: U64) -> U8:
    """Names as arguments, (N, 14) uint8: row i is one packed argument; consecutive rows are as many."""
    block = np.empty((len(names), _MEMBER_BYTES), np.uint8)
    block[:, : len(_MEMBER_HEAD)] = _MEMBER_HEAD
    block[:, len(_MEMBER_HEAD) : -2] = names.astype("<u8").view(np.uint8).reshape(-1, NAME_BYTES)
    block[:, -2:] = _CRLF
    return block


# ---- the connection --------------------------------------------------------------------------------------------------


class Connection:
    """One connection, for one thread at a time. Deadlines are absolute, by ``time.monotonic()``."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = bytearray()
        self._at = 0

    @classmethod
    def open(cls, endpoint: Endpoint, deadline: float) -> Connection:
        """Connect, authenticate, select, and have one PING answered. Raises OSError, DirectoryError.

        Resolving a host's name takes as long as the system's resolver takes: not for threads that an engine waits for.
        """
        try:
            return cls._open(endpoint, deadline)
        except ValueError as e:  # a name that none can be, a path with a zero in it
            raise DirectoryError(f"directory_url names no place that can be connected to: {e}") from None

    @classmethod
    def _open(cls, endpoint: Endpoint, deadline: float) -> Connection:
        timeout = _left(deadline)
        if endpoint.path:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout)
            try:
                sock.connect(endpoint.path)
            except OSError:
                sock.close()
                raise
        else:
            sock = socket.create_connection((endpoint.host, endpoint.port), timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # what is asked seldom must not be forgotten
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
        try:
            if endpoint.tls:
                context = ssl.create_default_context(cafile=endpoint.tls_ca)
                sock.settimeout(_left(deadline))
                sock = context.wrap_socket(sock, server_hostname=endpoint.host)
            connection = cls(sock)
            asked = [command("PING")]
            if endpoint.database:
                asked.insert(0, command("SELECT", endpoint.database))
            if endpoint.password:
                user = (endpoint.username,) if endpoint.username else ()
                asked.insert(0, command("AUTH", *user, endpoint.password))
            connection.send(asked, deadline)
            for _ in asked:
                answer = connection.read(deadline)
                if isinstance(answer, ServerError):
                    raise answer
        except BaseException:
            sock.close()
            raise
        return connection

    def close(self) -> None:
        """Close it. Idempotent."""
        with contextlib.suppress(OSError):
            self._sock.close()

    def send(self, frames: Iterable[bytes], deadline: float) -> None:
        """Send packed commands. Raises OSError (TimeoutError at the deadline)."""
        self._sock.settimeout(_left(deadline))
        self._sock.sendall(b"".join(frames))

    def call(self, deadline: float, *commands: bytes) -> list[Reply]:
        """One round trip for a few commands: their answers."""
        self.send(commands, deadline)
        return [self.read(deadline) for _ in commands]

    def read(self, deadline: float) -> Reply:
        """The next answer, whatever it is. Raises OSError, DirectoryError."""
        return self._read(deadline, 0, [MAX_ANSWER_BYTES])

    def _read(self, deadline: float, depth: int, room: list[int]) -> Reply:
        """``room``: bytes that what is left of the whole answer may have."""
        line = self._line(deadline)
        kind, rest = line[:1], line[1:]
        room[0] -= len(line) + 2
        if room[0] < 0:
            raise DirectoryError(f"the server answered with more than {MAX_ANSWER_BYTES} bytes")
        if kind == b"+":
            return rest
        if kind == b"-":
            return ServerError(rest.decode("utf-8", "replace"))
        if kind == b":":
            return _int(rest)
        size = _int(rest)
        if kind == b"$":
            if size == -1:
                return None
            if not 0 <= size <= MAX_BULK_BYTES:
                raise DirectoryError(f"the server announced {size} bytes; at most {MAX_BULK_BYTES} are taken")
            room[0] -= size
            if room[0] < 0:
                raise DirectoryError(f"the server answered with more than {MAX_ANSWER_BYTES} bytes")
            raw = self._take(size + 2, deadline)
            if raw[size:] != b"\r\n":
                raise _not_resp(raw[size:])
            return raw[:size]
        if kind == b"*" and depth < MAX_DEPTH and -1 <= size <= MAX_ARRAY:
            return None if size == -1 else [self._read(deadline, depth + 1, room) for _ in range(size)]
        raise _not_resp(line)

    def read_flags(self, n: int, deadline: float) -> npt.NDArray[np.bool_] | ServerError:
        """An array of ``n`` integers that are 0 or 1: bool[n]. An error that the server answered is returned."""
        line = self._line(deadline)
        if line[:1] == b"-":
            return ServerError(line[1:].decode("utf-8", "replace"))
        if line != b"*%d" % n:
            raise _not_resp(line)
        cells = np.frombuffer(self._take(4 * n, deadline), np.uint8).reshape(n, 4)
        if (cells[:, 0] != ord(":")).any() or ((cells[:, 1] | 1) != ord("1")).any() or (cells[:, 2:] != _CRLF).any():
            raise DirectoryError("the server answered other integers than 0 and 1 where flags were asked for")
        flags: npt.NDArray[np.bool_] = cells[:, 1] == ord("1")
        return flags

    def read_names(self, deadline: float) -> U64 | ServerError:
        """An array of names, uint64[N]; members of another length are what nobody here wrote, and raise."""
        line = self._line(deadline)
        if line[:1] == b"-":
            return ServerError(line[1:].decode("utf-8", "replace"))
        n = _int(line[1:])
        if line[:1] != b"*" or not 0 <= n <= MAX_ARRAY:
            raise _not_resp(line)
        cells = np.frombuffer(self._take(n * _MEMBER_BYTES, deadline), np.uint8).reshape(n, _MEMBER_BYTES)
        head = len(_MEMBER_HEAD)
        if (cells[:, :head] != _MEMBER_HEAD).any() or (cells[:, -2:] != _CRLF).any():
            raise DirectoryError(f"a set of the directory has members that are not {NAME_BYTES} bytes long")
        return np.ascontiguousarray(cells[:, head:-2]).view("<u8").ravel()

    def _line(self, deadline: float) -> bytes:
        while (end := self._data.find(b"\r\n", self._at)) < 0:
            if len(self._data) - self._at > MAX_LINE_BYTES:
                raise DirectoryError(f"the server sent a line of more than {MAX_LINE_BYTES} bytes: no Redis or Valkey")
            self._fill(deadline)
        line = bytes(self._data[self._at : end])
        self._at = end + 2
        return line

    def _take(self, n: int, deadline: float) -> bytes:
        while len(self._data) - self._at < n:
            self._fill(deadline)
        raw = bytes(memoryview(self._data)[self._at : self._at + n])
        self._at += n
        return raw

    def _fill(self, deadline: float) -> None:
        if self._at:
            del self._data[: self._at]
            self._at = 0
        self._sock.settimeout(_left(deadline))
        got = self._sock.recv(RECV_BYTES)
        if not got:
            raise ConnectionResetError("the server closed the connection")
        self._data += got


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left


def _int(raw: bytes) -> int:
    try:
        return whole_number(raw, "")
    except DecodeError:
        raise _not_resp(raw) from None


def _not_resp(line: bytes) -> DirectoryError:
    return DirectoryError(f"the server answered {line[:40]!r}: not what a Redis or Valkey answers here")


def checked(reply: Reply) -> Any:
    """The answer; raises it if it is an error."""
    if isinstance(reply, ServerError):
        raise reply
    return reply


def number(reply: Reply) -> int:
    """An answer that is a number. Raises DirectoryError: the server's error, or that it is none."""
    if not isinstance(checked(reply), int):
        raise _other("a number", reply)
    return int(checked(reply))


def text(reply: Reply) -> str:
    """An answer that is text; what is not UTF-8 in it is replaced. Raises DirectoryError."""
    if not isinstance(checked(reply), bytes):
        raise _other("text", reply)
    return str(reply, "utf-8", "replace")  # type: ignore[arg-type]


def listed(reply: Reply, n: int | None = None) -> list[Reply]:
    """An answer that is an array, of ``n`` entries if that is known. Raises DirectoryError."""
    if not isinstance(checked(reply), list):
        raise _other("an array", reply)
    entries: list[Reply] = checked(reply)
    if n is not None and len(entries) != n:
        raise DirectoryError(f"the server answered {len(entries)} entries where {n} were asked for")
    return entries


def _other(wanted: str, reply: Reply) -> DirectoryError:
    return DirectoryError(f"the server answered {type(reply).__name__} {str(reply)[:40]!r} where {wanted} was due")
