"""The verbs data path: the reader's device reads the owner's memory and writes into the reader's slots.

Neither process touches a byte. A lane is a queue pair; its thread posts the READs of its share as chains, as many as
the queue holds, and checks and seals what has arrived while the rest is under way. One READ in SIGNAL_BYTES reports,
for itself and all before it.

What could still be written is a matter of the queue pair alone: it is destroyed after any error, at the deadline, and
when nothing has moved for the peer's time-out, and a device writes nothing for a queue pair that is no more. Only then
is a share over, so a READ that lands late never lands in a slot that was given up. The next share opens another.

The owner can't revoke anything: see :mod:`kvplug.rdma.verbs.queues`. A READ that came too late for its lease brings
whatever lies there by then; its reader's clock and the block's checksum say so.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
import numpy.typing as npt

from kvplug.errors import PeerError, PeerTimeoutError, ProtocolError, VerbsError
from kvplug.rdma.blocks import U8
from kvplug.rdma.control.link import Link, RefusedError
from kvplug.rdma.control.protocol import (
    I64,
    MAX_QUEUES_A_READER,
    MAX_REGIONS_A_REQUEST,
    GetRegions,
    OpenQueue,
    QueueEnd,
    QueueOpened,
    RegionKeys,
    array,
    raw,
)
from kvplug.rdma.data.datapath import Arrived, Wanted
from kvplug.rdma.data.spread import SpreadPath
from kvplug.rdma.verbs.binding import CHAIN, FLUSHED, QUEUE_DEPTH, STATUSES, U32, Endpoint, QueuePair, Reads
from kvplug.rdma.verbs.rails import Rail, Rails, borrow, give_back
from kvplug.rdma.verbs.reads import Plan, plan

if TYPE_CHECKING:
    from kvplug.config import Config

log = logging.getLogger("kvplug")

REPORT_BYTES: Final = 2 << 20
"""What is checked and sealed at once: fits the cache, and is worth the lock that sealing takes."""
WAIT_S: Final = 0.05
"""Longest sleep of a lane: how late it notices that it was interrupted."""
ASK_SHARE: Final = 0.5
"""Share of the peer's time-out that one answer may wait for memory to be registered there."""
DESTROY_TRIES: Final = 20
DESTROY_PAUSE_S: Final = 0.1


class NotReadyError(PeerError):
    """There is no reading by verbs just now, and nothing was written: another path may do it."""


class RegisteringError(NotReadyError):
    """Memory at one of the ends is still being registered: next time it will be."""


class _Remote:
    """The owner's segment, as one of its devices knows it: the keys that were told so far."""

    def __init__(self, generation: int, opened: QueueOpened) -> None:
        self.generation, self.device = generation, opened.device
        self.base, self.nbytes, self.region_bytes = opened.base, opened.nbytes, opened.region_bytes
        self._keys: dict[int, int] = {}

    def missing(self, regions: I64) -> list[int]:
        return [one for one in regions.tolist() if one not in self._keys]

    def learn(self, regions: list[int], ready: npt.NDArray[np.bool_], rkeys: U32) -> None:
        self._keys.update(
            (one, key) for one, is_ready, key in zip(regions, ready.tolist(), rkeys.tolist(), strict=True) if is_ready
        )

    def rkeys(self, regions: I64) -> U32:
        """uint32[K]; each is known."""
        return np.array([self._keys[one] for one in regions.tolist()], np.uint32)


class _Lane:
    """A connected queue pair."""

    def __init__(self, path: VerbsPath, queue: QueuePair, rail: Rail) -> None:
        self._path, self.queue, self.rail = path, queue, rail
        self.generation = 0
        self.remote: _Remote | None = None
        self.far_qpn = -1
        self.stopped = threading.Event()

    def interrupt(self) -> None:
        self.stopped.set()

    def close(self) -> bool:
        if self.far_qpn >= 0:
            self._path._gone(self)
        for attempt in range(DESTROY_TRIES):
            try:
                self.queue.close()
                return True
            except VerbsError as e:
                if not attempt:
                    log.warning("a queue pair can't be destroyed, so its slots stay out of use: %s", e)
                time.sleep(DESTROY_PAUSE_S)
        return False


class VerbsPath(SpreadPath[_Lane]):
    """Reads by one-sided READs over up to ``peer_connections`` queue pairs, on all devices of the settings in turn."""

    name = "verbs"

    def __init__(self, link: Link, memory: U8, config: Config) -> None:
        """Nothing is imported, opened or registered before the first read."""
        super().__init__(link, config.peer_connections)
        self._memory, self._config = memory, config
        self._stall_s = config.peer_timeout_s
        self._rails: Rails | None = None
        self._next_rail = 0
        self._remotes: dict[int, _Remote] = {}
        self._broken: list[tuple[int, int]] = []
        self._asking = threading.Lock()

    def open_devices(self) -> Rails:
        """This host's rails. Raises VerbsError: there is no binding or no device."""
        with self._mutex:
            if self._closed:
                raise VerbsError("the path was closed")
            if self._rails is None:
                self._rails = borrow(self._config, self._memory)
            return self._rails

    # ---- a lane ------------------------------------------------------------------------------------------------------

    def _open_lane(self, deadline: float) -> _Lane:
        soon = min(deadline, time.monotonic() + self._stall_s)
        lane: _Lane | None = None
        try:
            self._link.connect(soon)
            rails = self.open_devices().all
            with self._mutex:
                rail = rails[self._next_rail % len(rails)]
                self._next_rail += 1
                gone, self._broken = self._broken[:MAX_QUEUES_A_READER], self._broken[MAX_QUEUES_A_READER:]
            lane = _Lane(self, rail.device.queue_pair(QUEUE_DEPTH), rail)
            near, gid_index = rail.endpoint(lane.queue.qpn, self._link.ends[0])
            end = QueueEnd(near.qpn, near.psn, near.gid, near.lid, near.mtu, near.reads)
            instead = tuple(qpn for generation, qpn in gone if generation == self._link.generation)
            message = OpenQueue(end, rail.number % 256, instead)
            lane.generation, opened = self._link.ask_here(message, QueueOpened, soon)
            lane.far_qpn = opened.queue.qpn
            lane.queue.connect(
                near, Endpoint(*msgspec.structs.astuple(opened.queue)), port=rail.port.number, gid_index=gid_index
            )
            lane.remote = self._remote(lane.generation, opened)
        except (VerbsError, RefusedError) as e:
            if lane is not None:
                lane.close()
            raise NotReadyError(f"no queue pair with {self._link.address}: {e}") from None
        except BaseException:
            if lane is not None:
                lane.close()
            raise
        return lane

    def _remote(self, generation: int, opened: QueueOpened) -> _Remote:
        with self._mutex:
            known = self._remotes.get(opened.device)
            if known is None or known.generation != generation:
                known = self._remotes[opened.device] = _Remote(generation, opened)
            return known

    def _forget_keys(self, lane: _Lane) -> None:
        """What was told of the owner's memory may have been why: the next lane asks anew."""
        with self._mutex:
            known = self._remotes.pop(lane.remote.device, None) if lane.remote else None
            if known is not None and known is not lane.remote:
                self._remotes[known.device] = known  # told since then

    def _gone(self, lane: _Lane) -> None:
        """The other end's half of this lane can go too: the next lane says so."""
        with self._mutex:
            self._broken = [*self._broken[-MAX_QUEUES_A_READER:], (lane.generation, lane.far_qpn)]

    # ---- a share -----------------------------------------------------------------------------------------------------

    def _carry(self, lane: _Lane, wanted: Wanted, part: I64, deadline: float, arrived: Arrived) -> None:
        assert lane.remote is not None
        remote, local = lane.remote, lane.rail.regions
        sources, targets, nbytes = wanted.sources[part], wanted.targets[part], wanted.nbytes[part]
        if int((sources + nbytes).max()) > remote.nbytes:
            raise ProtocolError(f"{self._link.address} leased a block that lies outside its segment")
        planned = plan(
            sources,
            targets,
            nbytes,
            regions=(local.each_bytes, remote.region_bytes),
            longest=lane.rail.port.max_message,
        )
        reads = self._keyed(lane, remote, planned, wanted.lease.id, deadline)
        self._run(lane, planned, reads, part, deadline, arrived)

    def _keyed(self, lane: _Lane, remote: _Remote, planned: Plan, lease: int, deadline: float) -> Reads:
        """The READs with addresses and keys. Raises NotReadyError while either end's memory is being registered."""
        local = lane.rail.regions
        soon = min(deadline, time.monotonic() + self._stall_s)
        near, near_of = np.unique(planned.local // local.each_bytes, return_inverse=True)
        far, far_of = np.unique(planned.remote // remote.region_bytes, return_inverse=True)
        try:
            ready, lkeys, _ = local.keys(near, soon)
        except VerbsError as e:
            raise NotReadyError(f"this pool's memory can't be used for reading into: {e}") from None
        if not ready.all():
            raise RegisteringError(f"{int((~ready).sum())} regions of this pool are still being registered")
        if not self._asking.acquire(timeout=max(0.0, soon - time.monotonic())):  # lanes want the same ones
            raise RegisteringError(f"another read asks {self._link.address} for the same regions")
        try:
            while (missing := remote.missing(far)) and time.monotonic() < soon:
                self._learn(lane, remote, missing[:MAX_REGIONS_A_REQUEST], lease, soon)
        finally:
            self._asking.release()
        if remote.missing(far):
            raise RegisteringError(f"regions of {self._link.address} are still being registered")
        return Reads(
            planned.local + local.base,
            planned.remote + remote.base,
            planned.nbytes,
            lkeys[near_of.ravel()],
            remote.rkeys(far)[far_of.ravel()],
            planned.signalled,
        )

    def _learn(self, lane: _Lane, remote: _Remote, some: list[int], lease: int, deadline: float) -> None:
        message = GetRegions(remote.device, lease, raw(np.array(some), np.uint32), self._stall_s * ASK_SHARE)
        try:
            generation, answer = self._link.ask_here(message, RegionKeys, deadline)
        except RefusedError as e:
            raise NotReadyError(f"{self._link.address} gives no keys: {e}") from None
        if generation != lane.generation:
            raise PeerError(f"the connection with {self._link.address} is a new one")
        ready, rkeys = array(answer.ready, np.bool_), array(answer.rkeys, np.uint32)
        if not len(ready) == len(rkeys) == len(some):
            raise ProtocolError(f"{len(rkeys)} keys where {len(some)} were asked for")
        remote.learn(some, ready, rkeys)

    def _run(self, lane: _Lane, planned: Plan, reads: Reads, part: I64, deadline: float, arrived: Arrived) -> None:
        """Post, and report what arrives. Raises PeerError, and then the lane is to be dropped."""
        queue, address = lane.queue, self._link.address
        posted = done = reported = 0
        progress = time.monotonic()
        try:
            while done < len(reads) or reported < len(part):
                room = min(CHAIN, QUEUE_DEPTH - (posted - done), len(reads) - posted)
                if room > 0 and (room == CHAIN or posted + room == len(reads)):
                    queue.post(reads, posted, posted + room)
                    posted += room
                completed = queue.poll()
                if completed:
                    failed = [(at, status) for at, status in completed if status]
                    if failed:
                        self._forget_keys(lane)
                        raise PeerError(_why(address, failed, len(reads)))
                    done = completed[-1][0] + 1
                    progress = time.monotonic()
                here = planned.arrived(done)
                if here > reported and (not completed or _bytes(planned, reported, here) >= REPORT_BYTES):
                    arrived(part[reported:here])
                    reported = here
                    continue
                if completed or room == CHAIN:
                    continue
                now = time.monotonic()
                if self._closed or lane.stopped.is_set():
                    raise PeerError("the read was given up")
                if now >= deadline:
                    raise PeerTimeoutError(f"{address}: {len(reads) - done} of {len(reads)} READs were under way at "
                                           f"the deadline")  # fmt: skip
                if now >= progress + self._stall_s:
                    raise PeerTimeoutError(f"{address}: no READ completed for {self._stall_s:g} s")
                queue.wait(min(WAIT_S, deadline - now, progress + self._stall_s - now))
        except VerbsError as e:
            raise PeerError(f"reading from {address}: {e}") from None

    def close(self) -> None:
        """As the interface says."""
        super().close()
        with self._mutex:
            rails, self._rails = self._rails, None
        if rails is not None:
            self._workers().shutdown(wait=True)  # lanes see it within WAIT_S; their queue pairs go before the devices
            with contextlib.suppress(KeyError):
                give_back(self._config, self._memory)


def _bytes(planned: Plan, first: int, end: int) -> int:
    return int(planned.block_ends[end - 1] - (planned.block_ends[first - 1] if first else 0))


def _why(address: str, failed: list[tuple[int, int]], n: int) -> str:
    first = next(((at, status) for at, status in failed if status != FLUSHED), failed[0])
    return f"READ {first[0] + 1} of {n} from {address}: {STATUSES.get(first[1], f'status {first[1]}')}"
