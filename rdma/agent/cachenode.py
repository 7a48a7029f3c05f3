"""A cache node: an agent that takes over blocks which other hosts are about to evict.

It is offered keys and reads the blocks itself, like any reader: lease, checksum, seal. So an offer can put nothing
into its pool but what a host that it knows has under those keys, and it dials only addresses from its own settings or
the directory, whatever a message says. Reading goes on in the background; who has offered waits for none of it, and
what was evicted meanwhile is gone. What is taken in evicts what this pool's own policy says.

Everything that an offer may cost is bounded: offers that wait, those of one reader, their bytes, the time for each.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from kvplug.errors import Code, PoolError, ProtocolError
from kvplug.rdma.blocks import U8, Blocks
from kvplug.rdma.control.protocol import KEY_BYTES, MAX_BLOCK_BYTES, Failed, Message, Offer, Offered, array, raw
from kvplug.rdma.directory.peers import PeerSource
from kvplug.rdma.reader.remote import Peer
from kvplug.threads import LivingThread

if TYPE_CHECKING:
    from kvplug.config import Config

MAX_WAITING: Final = 64
MAX_WAITING_A_READER: Final = 2
WAITING_SHARE: Final = 1 / 8
"""Of this pool's bytes: what offers that wait may bring, but one alone is always taken."""
MAX_SOURCES: Final = 64
"""Hosts whose connections are kept."""
READERS: Final = 2
"""Threads that read: a host that answers slowly does not hold up the others."""
TAKE_S: Final = 5.0
ROUND_S: Final = 0.5
STOP_S: Final = 2.0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """An offer that was accepted."""

    reader: int
    address: str
    keys: U8
    nbytes: int


class CacheNode:
    """Takes offers for one pool. Thread-safe."""

    def __init__(self, blocks: Blocks, config: Config, peers: PeerSource, count: Callable[[str, int], None]) -> None:
        """``peers``: the hosts that may offer. ``count``: adds to a counter of the agent."""
        self._blocks, self._config, self._peers, self._count = blocks, config, peers, count
        self._changed = threading.Condition()
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._at_work: list[_Waiting] = []
        self._sources: collections.OrderedDict[str, Peer] = collections.OrderedDict()
        self._stopping = False
        self._threads = [LivingThread("kvplug-take", self._run) for _ in range(READERS)]

    def start(self) -> None:
        """Take over what is offered from now on."""
        for thread in self._threads:
            thread.start()

    # ---- offers ------------------------------------------------------------------------------------------------------

    def answer(self, offer: Offer, reader: int) -> Message:
        """Which of the offered blocks are going to be read. Waits for nobody. Raises ProtocolError."""
        keys = array(offer.keys, np.uint8)
        nbytes = array(offer.nbytes, np.int64)
        if len(keys) != len(nbytes) * KEY_BYTES:
            raise ProtocolError(f"an offer of {len(keys)} bytes of keys and {len(nbytes)} sizes")
        if len(nbytes) and not 0 < int(nbytes.min()) <= int(nbytes.max()) <= MAX_BLOCK_BYTES:
            raise ProtocolError(f"an offer of blocks of {nbytes.min()} to {nbytes.max()} bytes")
        keys = keys.reshape(-1, KEY_BYTES)
        address = self._address_of(offer)
        if address is None:
            self._count("offers_of_strangers", 1)
            return Failed("stranger")
        here = self._blocks.exists(keys)
        codes = np.where(here, np.int8(Code.EXISTS), np.int8(Code.OK))
        if not here.all():
            waiting = _Waiting(reader, address, keys[~here], int(nbytes[~here].sum()))
            if not self._enqueue(waiting):
                codes[~here] = Code.BUDGET
        self._count("offers", 1)
        self._count("keys_offered", len(keys))
        self._count("keys_declined", int((codes == Code.BUDGET).sum()))
        return Offered(raw(codes, np.int8))

    def _address_of(self, offer: Offer) -> str | None:
        """Where this node would dial the host that says it offers; None: it knows no such host."""
        host = offer.host.hex()
        known = self._peers.peers()
        return next((peer.address for peer in known if peer.id == host or peer.address in offer.addresses), None)

    def _enqueue(self, offer: _Waiting) -> bool:
        with self._changed:
            all_ = [*self._waiting, *self._at_work]
            mine = sum(other.reader == offer.reader for other in all_)
            total = offer.nbytes + sum(other.nbytes for other in all_)
            if self._stopping or len(all_) >= MAX_WAITING or mine >= MAX_WAITING_A_READER:
                return False
            source = self._sources.get(offer.address)
            if source is not None and source.is_down:
                return False  # what it has may be there still when it answers again
            if all_ and total > self._blocks.data_bytes * WAITING_SHARE:
                return False
            self._waiting.append(offer)
            self._changed.notify()
        return True

    def forget(self, reader: int) -> None:
        """The reader has gone: what it offered and is not being read yet is not read."""
        with self._changed:
            kept = [offer for offer in self._waiting if offer.reader != reader]
            self._waiting = collections.deque(kept)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                offer = self._next()
                while offer is None and not self._stopping:
                    self._changed.wait(ROUND_S)
                    offer = self._next()
                if offer is None or self._stopping:
                    return
            try:
                with self._changed:
                    source = self._source(offer.address)
                self._take(source, offer)
            except PoolError:
                self._count("pool_errors", 1)
            finally:
                with self._changed:
                    self._at_work.remove(offer)
                    self._changed.notify()

    def _next(self) -> _Waiting | None:
        """The first offer of a host that no other thread reads from: it is at work from now on."""
        busy = {offer.address for offer in self._at_work}
        for offer in self._waiting:
            if offer.address not in busy:
                self._waiting.remove(offer)
                self._at_work.append(offer)
                return offer
        return None

    def _take(self, source: Peer, offer: _Waiting) -> None:
        began = time.monotonic()
        codes = source.fetch(offer.keys, TAKE_S, touch=False)
        self._count("keys_taken", int((codes == Code.OK).sum()))
        self._count("keys_gone", int((codes == Code.MISSING).sum()))
        self._count("keys_not_taken", int(((codes < 0) & (codes != Code.MISSING)).sum()))
        self._count("taking_ms", int((time.monotonic() - began) * 1000))

    def _source(self, address: str) -> Peer:
        """The connection with a host; one that was not used for longest makes room."""
        peer = self._sources.pop(address, None)
        if peer is None:
            peer = Peer(address, self._blocks, self._config)
        self._sources[address] = peer
        busy = {offer.address for offer in self._at_work}
        while len(self._sources) > MAX_SOURCES:
            oldest = next(one for one in self._sources if one not in busy)
            self._sources.pop(oldest).close()
        return peer

    def close(self) -> None:
        """Give up what waits, end what is being read. Idempotent."""
        with self._changed:
            self._stopping = True
            self._waiting.clear()
            sources, self._sources = list(self._sources.values()), collections.OrderedDict()
            self._changed.notify_all()
        for source in sources:
            source.close()
        for thread in self._threads:
            thread.end(STOP_S)
