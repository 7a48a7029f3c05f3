"""The TCP data path: the owner sends from the segment, the reader receives into its own slots.

Owner: `sendfile` hands the kernel the segment's pages; nothing is copied in Python, and on the way out not in the
kernel either. What is on its way refers to the slot's memory: the lease keeps it in place until the reader has
released, and a slot that was reused all the same arrives as bytes that do not fit their checksum. To a reader on this
same host `send` copies instead, which costs both ends half as much CPU: loopback hands the sender's buffers to the
receiver, and by reference those are single pages of 4 KiB.

Reader: `recvmsg` scatters a stretch of the stream over the slots. One read is spread over several connections, each
with a thread; a thread checks and seals a piece while it is in the cache and the next one is under way.

Over TLS both ends go through the cipher, a range at a time, from and to the same memory.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np

from kvplug.errors import PeerError, PeerTimeoutError, ProtocolError
from kvplug.rdma.blocks import U8
from kvplug.rdma.control import faults
from kvplug.rdma.control.leases import Lease, LeaseTable
from kvplug.rdma.control.link import Link
from kvplug.rdma.control.protocol import I64, Failed, Read, ReadStart, array, expect, raw
from kvplug.rdma.control.wire import ClosedError, Connection
from kvplug.rdma.data.datapath import Arrived, Wanted, runs
from kvplug.rdma.data.spread import SpreadPath

SEND_BYTES: Final = 4 << 20
"""Most that one call sends: the lease is looked at in between."""
SEND_STALL_S: Final = 1.0
IDLE_S: Final = 600.0
PIECE_BYTES: Final = 2 << 20
MOST_PIECE_BYTES: Final = 8 << 20
MOST_WHEN_BUSY_BYTES: Final = 32 << 20
"""What is received before it is checked: at first, at most, and at most where the interpreter is busy. A thread needs
it three times for a piece, 5 ms of waiting each: that costs more than that a piece has left the nearest cache."""
FAST_PIECE_S: Final = 0.05
SLOW_PIECE_S: Final = 0.2
BUSY_S: Final = 0.004
CHECKED_BYTES_A_S: Final = 4e9
"""Checking that takes BUSY_S longer than at this rate has waited for the interpreter."""
PIECE_BLOCKS: Final = 480  # numpy lets go of the interpreter in operations on 500 and more, and would wait for it again
WAKE_BYTES: Final = 1 << 20
"""The kernel wakes a thread that receives when so much is there: a quarter less CPU than for each segment."""
STALL_LOOKS: Final = 4
"""How often within a peer's time-out its connection is looked at: a stall is noticed a quarter late at most."""


# ---- the owner's end -------------------------------------------------------------------------------------------------


class Sender:
    """Serves the data connections of one agent."""

    def __init__(self, leases: LeaseTable, fd: int, memory: U8, count: Callable[[str, int], None]) -> None:
        self._leases, self._fd, self._count = leases, fd, count
        self._view = memory.data

    def serve(self, connection: Connection, reader: int) -> None:
        """Answer this reader's Reads until it goes. Raises PeerError."""
        while True:
            message, request, _ = connection.receive(0, idle_deadline=time.monotonic() + IDLE_S)
            read = expect(message, Read)
            picked = array(read.blocks, np.uint32).astype(np.int64)
            lease = self._leases.of(read.lease, reader)
            soon = time.monotonic() + SEND_STALL_S
            if lease is None:
                connection.send(Failed("lease"), request, soon)
                continue
            if not len(picked) or int(picked.max()) >= len(lease.slots):
                raise ProtocolError(f"{connection.peer} wants block {picked.max(initial=-1)} of {len(lease.slots)}")
            offsets, nbytes = lease.offsets[picked], lease.nbytes[picked]
            connection.send(ReadStart(int(nbytes.sum())), request, soon)
            connection.block_with_timeout(SEND_STALL_S)
            firsts, lengths = runs(offsets, nbytes)
            stretches: Iterable[tuple[int, int]] = zip(offsets[firsts].tolist(), lengths.tolist(), strict=True)
            if faults.armed:
                stretches = self._with_faults(connection, stretches, int(nbytes.sum()))
            for at, length in stretches:
                self._send(connection, lease, at, length)
            self._count("reads", 1)
            self._count("bytes_sent", int(nbytes.sum()))

    def _with_faults(
        self, connection: Connection, stretches: Iterable[tuple[int, int]], total: int
    ) -> Iterator[tuple[int, int]]:
        """The stretches, cut where a fault may be due; a byte that is to be another one is sent from here."""
        names = {0: "first byte sent", total // 2: "half sent", total - 1: "last byte sent"}
        done = 0
        for begin, length in stretches:
            at, end = begin, begin + length
            while at < end:
                n = min(end - at, min((mark for mark in names if mark > done), default=total) - done)
                if done in names:
                    n = 1
                    byte = bytearray(self._view[at : at + 1])
                    swallowed = faults.meddle(names[done], byte, connection.interrupt)
                    if byte != self._view[at : at + 1]:
                        connection.sock.sendall(byte)
                    elif not swallowed:
                        yield at, 1
                else:
                    yield at, n
                at, done = at + n, done + n

    def _send(self, connection: Connection, lease: Lease, at: int, length: int) -> None:
        end = at + length
        while at < end:
            if not self._leases.holds(lease):
                raise PeerError(f"the lease of {connection.peer} ended while it was reading")
            n = min(end - at, SEND_BYTES)
            try:
                if connection.is_tls or connection.is_same_host:
                    at += connection.sock.send(self._view[at : at + n])
                else:
                    sent = os.sendfile(connection.sock.fileno(), self._fd, at, n)
                    if sent == 0:
                        raise PeerError("the segment ended before its blocks did")
                    at += sent
            except (BlockingIOError, TimeoutError):
                self._count("send_stalls", 1)  # a reader that is stopped: its lease ends by itself
            except (OSError, ValueError) as e:
                raise connection.broken(e) from None


# ---- the reader's end ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True, eq=False)
class _Lane:
    generation: int
    connection: Connection

    def interrupt(self) -> None:
        self.connection.interrupt()

    def close(self) -> bool:
        self.connection.close()
        return True


class TcpPath(SpreadPath[_Lane]):
    """Reads over up to ``connections`` connections."""

    name = "tcp"

    def __init__(self, link: Link, memory: U8, *, connections: int, stall_s: float) -> None:
        super().__init__(link, connections)
        self._stall_s = stall_s
        self._view = memory.data
        self._piece_bytes = PIECE_BYTES

    def _lanes(self) -> int:
        """On one host both ends share its cores: more connections than those only wait for each other."""
        here, there = self._link.ends
        return min(self._most, len(os.sched_getaffinity(0))) if here == there else self._most

    def _open_lane(self, deadline: float) -> _Lane:
        generation, connection = self._link.dial_data(min(deadline, time.monotonic() + self._stall_s))
        return _Lane(generation, connection)

    def _carry(self, lane: _Lane, wanted: Wanted, part: I64, deadline: float, arrived: Arrived) -> None:
        connection = lane.connection
        soon = min(deadline, time.monotonic() + self._stall_s)
        connection.send(Read(wanted.lease.id, raw(wanted.index[part], np.uint32)), 0, soon)
        answer = connection.receive(soon)[0]
        if isinstance(answer, Failed):
            raise PeerError(f"{connection.peer} sends nothing: the lease has ended there")
        nbytes = wanted.nbytes[part]
        total = int(nbytes.sum())
        if expect(answer, ReadStart).nbytes != total:
            raise ProtocolError(f"{connection.peer} sends {answer} where {total} bytes were asked for")
        connection.block_with_timeout(self._stall_s / STALL_LOOKS)
        targets = wanted.targets[part]
        first, wake_at, left = 0, 0, total
        while first < len(part):
            began = time.monotonic()
            before = left
            piece = slice(first, first + max(1, min(PIECE_BLOCKS, self._piece_bytes * len(part) // total)))
            first = piece.stop
            firsts, lengths = runs(targets[piece], nbytes[piece])
            starts = targets[piece][firsts]
            views = [self._view[at : at + n] for at, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
            left -= int(nbytes[piece].sum())
            wake = WAKE_BYTES if left >= WAKE_BYTES else 1  # what is still to come always gets there
            if wake != wake_at:
                connection.wake_at(wake)
                wake_at = wake
            self._fill(connection, views, deadline)
            if faults.armed and faults.meddle("piece received", self._view[int(starts[0]) :][:1], connection.interrupt):
                continue
            came = time.monotonic()
            arrived(part[piece])
            self._resize_pieces(came - began, time.monotonic() - came, before - left)

    def _resize_pieces(self, came_s: float, checked_s: float, nbytes: int) -> None:
        """Large ones where they come fast, small ones where a deadline may find one half-way."""
        is_busy = checked_s > BUSY_S + nbytes / CHECKED_BYTES_A_S
        if came_s > SLOW_PIECE_S:
            self._piece_bytes = max(self._piece_bytes // 2, PIECE_BYTES)
        elif came_s < FAST_PIECE_S:
            most = MOST_WHEN_BUSY_BYTES if is_busy else MOST_PIECE_BYTES
            self._piece_bytes = min(self._piece_bytes * 2, max(most, self._piece_bytes - MOST_PIECE_BYTES))

    def _fill(self, connection: Connection, views: list[memoryview], deadline: float) -> None:
        sock = connection.sock
        progress = time.monotonic()
        while views:
            now = time.monotonic()
            if now >= deadline:
                raise PeerTimeoutError(f"{connection.peer} had not sent everything at the deadline")
            if now >= progress + self._stall_s:
                raise PeerTimeoutError(f"{connection.peer} sent nothing for {self._stall_s:g} s")
            if deadline - now < self._stall_s / STALL_LOOKS:
                connection.block_with_timeout(deadline - now)
            try:
                if connection.is_tls:
                    n = sock.recv_into(views[0])
                else:
                    n = sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
            except (BlockingIOError, TimeoutError):
                continue
            except (OSError, ValueError) as e:
                raise connection.broken(e) from None
            progress = time.monotonic()
            if n == 0:
                raise ClosedError(f"{connection.peer} closed the connection in mid-read")
            while views and n >= len(views[0]):
                n -= len(views.pop(0))
            if n:
                views[0] = views[0][n:]
