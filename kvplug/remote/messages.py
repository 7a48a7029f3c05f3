"""What an engine process and the process that fetches for it say to each other, over sockets that nobody else has.

One question at a time on each socket, and its answer; length and body, msgpack. Moments are of the monotonic clock,
which is one clock for both.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Any, Final, TypeVar

import msgspec

from kvplug.errors import DecodeError, KvplugError
from kvplug.outside import decoded
from kvplug.remote.sources import Standing

__all__ = ["Begin", "Begun", "Channel", "ChannelError", "Fetch", "Fetched", "Found", "Problem", "WhoHas"]

_LENGTH: Final = struct.Struct("<I")
_TIMEVAL: Final = struct.Struct("ll")
MAX_FRAME_BYTES: Final = 256 << 20
READ_BYTES: Final = 256 << 10


class ChannelError(KvplugError):
    """The other process is gone, or has not answered in time."""


class _Word(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class Begin(_Word, frozen=True):
    """The first word: which pool (16 bytes, its segment's identity), and the settings as :class:`Config` takes them."""

    pool_uuid: bytes
    settings: dict[str, Any]


class Begun(_Word, frozen=True):
    """The pool is attached; questions are answered from now on."""


class WhoHas(_Word, frozen=True):
    """Who has some of these keys (N times 32 bytes)?"""

    keys: bytes
    deadline: float


class Found(_Word, frozen=True):
    """Peers with what they have, bool[N] each, and whether some did not answer."""

    peers: list[tuple[Standing, bytes]]
    silent: bool


class Fetch(_Word, frozen=True):
    """Bring a prefix of these keys from this peer."""

    address: str
    keys: bytes
    deadline: float


class Fetched(_Word, frozen=True):
    """Codes, int8[N], and how the peer is now."""

    codes: bytes
    standing: Standing | None


class Problem(_Word, frozen=True):
    """A question that could not be answered: what is wrong with the settings, or the trace of an error of kvplug's."""

    text: str
    goes_on: bool = True
    """Whether others will be."""


Word = Begin | Begun | WhoHas | Found | Fetch | Fetched | Problem
W = TypeVar("W", bound=_Word)
_DECODER: Final = msgspec.msgpack.Decoder(Word)
_ENCODER: Final = msgspec.msgpack.Encoder()


class Channel:
    """One socket. For one thread at a time; :meth:`interrupt` is for any.

    Each call into the kernel lets go of the interpreter, and beside a busy thread it takes 5 ms to have it again. So
    the kernel keeps the time, and an answer is read in as few calls as it comes in.
    """

    def __init__(self, sock: socket.socket) -> None:
        """``sock``: connected, and closed with this."""
        sock.settimeout(None)
        self._sock = sock
        self._buffer = bytearray(READ_BYTES)

    def send(self, word: _Word, deadline: float | None = None) -> None:
        """Say it. Raises ChannelError."""
        try:
            body = _ENCODER.encode(word)
            self._limit(socket.SO_SNDTIMEO, deadline)
            self._sock.sendall(_LENGTH.pack(len(body)) + body)
        except (OSError, TypeError, ValueError, OverflowError) as e:
            raise ChannelError(f"nothing could be sent: {e}") from None

    def receive(self, deadline: float | None = None) -> _Word:
        """The next word. Raises ChannelError: it has not come by then, or never will."""
        buffer, got, length = self._buffer, 0, _LENGTH.size
        while got < length:
            try:
                self._limit(socket.SO_RCVTIMEO, deadline)
                n = self._sock.recv_into(memoryview(buffer)[got:])
            except OSError as e:
                raise ChannelError(f"nothing has come: {e}") from None
            if not n:
                raise ChannelError("the other process has hung up")
            if got < _LENGTH.size <= got + n:
                (body,) = _LENGTH.unpack_from(buffer)
                if body > MAX_FRAME_BYTES:
                    raise ChannelError(f"a word of {body} bytes; there are none above {MAX_FRAME_BYTES}")
                length += body
                if length > len(buffer):
                    buffer += bytes(length - len(buffer))
            got += n
        try:
            word: _Word = decoded(_DECODER, memoryview(buffer)[_LENGTH.size : length], "that is no word")
        except DecodeError as e:
            raise ChannelError(str(e)) from None
        return word

    def _limit(self, option: int, deadline: float | None) -> None:
        left = 0.0 if deadline is None else max(1e-6, deadline - time.monotonic())
        self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(left), int(left % 1 * 1e6)))

    def interrupt(self) -> None:
        """Whoever waits here stops waiting, at both ends."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Close it. Idempotent."""
        self._sock.close()


def expected(word: _Word, kind: type[W]) -> W:
    """The word, if it is of this kind. Raises ChannelError."""
    if not isinstance(word, kind):
        raise ChannelError(f"a {type(word).__name__} where a {kind.__name__} was due")
    return word
