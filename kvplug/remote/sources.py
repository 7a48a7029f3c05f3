"""Who has blocks that are missing here, and bringing them: the other hosts as one store sees them.

The directory's word says who has them, or the peers' own where there is no directory that answers. Every answer is a
hint. It comes within the deadline whatever the others do: a host that does not answer in time has nothing this time,
and one that is left alone just now (:attr:`kvplug.rdma.reader.remote.Peer.is_down`) is not asked.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from kvplug.config import Config
from kvplug.errors import Code
from kvplug.rdma.reader.remote import Peer
from kvplug.rdma.reader.speed import Measured
from kvplug.remote.peering import directory_reader, known_peers
from kvplug.remote.pool_blocks import PoolExchange
from kvplug.threads import note

__all__ = ["Holders", "Sources", "Standing"]

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
Bools = npt.NDArray[np.bool_]

MAX_ASKED: Final = 8
"""Peers that are asked directly for one prefix. If there are more, the next ones come with the next question."""
ASK_SHARE: Final = 0.5
"""Of peer_timeout_s: longest wait for the answers of peers that are asked directly."""
MAX_OPEN_PEERS: Final = 64
"""Peers with connections of their own; beyond it the one that was not used for longest hangs up."""


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """How a peer is, as of some moment."""

    address: str
    is_down: bool
    """Whether it is left alone just now, because it did not answer."""
    speed: Measured


class Sources(Protocol):
    """Other hosts' blocks. Thread-safe, and nothing raises for what another host does."""

    def who_has(self, keys: U8, deadline: float) -> tuple[list[tuple[Standing, Bools]], bool]:
        """Peers that have some of these keys ((N, 32) uint8), each with bool[N], and whether some did not answer.

        ``deadline``: of time.monotonic().
        """

    def fetch(self, address: str, keys: U8, deadline: float) -> tuple[I8, Standing | None]:
        """Bring a prefix of these from the peer at ``address``: :meth:`Peer.fetch`'s codes, and how it is then."""

    def close(self) -> None:
        """Hang up; what is under way ends. Idempotent."""


class Holders:
    """The :class:`Sources` of the process that makes it."""

    def __init__(self, exchange: PoolExchange, config: Config) -> None:
        """``config`` names peers, a directory, or both. Raises ConfigError for what can't be a directory."""
        self._exchange, self._config = exchange, config
        self._directory = directory_reader(config, exchange.store)
        self._listed = known_peers(config)
        self._mutex = threading.Lock()
        self._open: OrderedDict[str, Peer] = OrderedDict()
        self._turn = 0
        self._closed = False
        self._threads = ThreadPoolExecutor(MAX_ASKED, "kvplug-ask")

    def who_has(self, keys: U8, deadline: float) -> tuple[list[tuple[Standing, Bools]], bool]:
        """See :class:`Sources`."""
        found: list[tuple[str, Bools]] = []
        addresses = [peer.address for peer in self._listed.peers()]
        if self._directory is not None:
            left = deadline - time.monotonic()
            hits = self._directory.lookup(keys, min(self._config.directory_timeout_s, max(0.0, left)))
            found = [(peer.address, have) for peer, have in zip(hits.peers, hits.have, strict=True)]
            if not hits.known:  # the members known last can still be asked themselves
                addresses += [peer.address for peer in self._directory.peers()]
        answered = {address for address, _ in found}
        rest = [address for address in dict.fromkeys(addresses) if address not in answered]
        peers = [(peer, have) for address, have in found if have.any() and (peer := self._peer(address)) is not None]
        asked, silent = self._ask(rest, keys, deadline)
        return [(_standing(peer), have) for peer, have in peers + asked], silent

    def fetch(self, address: str, keys: U8, deadline: float) -> tuple[I8, Standing | None]:
        """See :class:`Sources`."""
        peer = self._peer(address)
        if peer is None:
            return np.full(len(keys), Code.TIMEOUT, np.int8), None
        codes = peer.fetch(keys, max(0.0, deadline - time.monotonic()), prefix=True)
        return codes, _standing(peer)

    def _ask(self, addresses: list[str], keys: U8, deadline: float) -> tuple[list[tuple[Peer, Bools]], bool]:
        """The peers' own answers, all asked at once, and whether any gave none."""
        with self._mutex:
            self._turn += MAX_ASKED
            at = self._turn % max(1, len(addresses))
        in_turn = addresses[at:] + addresses[:at] if len(addresses) > MAX_ASKED else addresses
        here = [peer for address in in_turn if (peer := self._peer(address)) is not None]
        peers = [peer for peer in here if not peer.is_down]
        asked: dict[Future[Bools | None], Peer] = {}
        try:
            for peer in peers[:MAX_ASKED]:
                asked[self._threads.submit(peer.holds, keys, self._config.peer_timeout_s)] = peer
        except RuntimeError:  # closed meanwhile, or no thread is left
            pass
        done = wait(asked, max(0.0, min(ASK_SHARE * self._config.peer_timeout_s, deadline - time.monotonic()))).done
        answers = {peer: _answer_of(future) for future, peer in asked.items() if future in done}
        silent = len(peers) < len(here) or any(answers.get(peer) is None for peer in peers[:MAX_ASKED])
        return [(peer, have) for peer, have in answers.items() if have is not None and have.any()], silent

    def _peer(self, address: str) -> Peer | None:
        """The peer at this address; None if that is this host itself, or everything is closed."""
        dropped = None
        with self._mutex:
            if self._closed:
                return None
            peer = self._open.get(address)
            if peer is None:
                peer = self._open[address] = Peer(address, self._exchange, self._config)
                if len(self._open) > MAX_OPEN_PEERS:
                    dropped = self._open.popitem(last=False)[1]
            self._open.move_to_end(address)
        if dropped is not None:
            dropped.close()
        return peer if peer.link.host != self._exchange.host else None

    def close(self) -> None:
        """Hang up on everybody; reads under way end. Idempotent."""
        with self._mutex:
            self._closed = True
            peers = list(self._open.values())
        self._threads.shutdown(wait=False, cancel_futures=True)
        for peer in peers:
            peer.close()
        if self._directory is not None:
            self._directory.close()


def _answer_of(asked: Future[Bools | None]) -> Bools | None:
    """What a peer has answered, None if it has not or if that failed here."""
    unforeseen = None if asked.cancelled() else asked.exception()
    if unforeseen is not None:
        note("kvplug-ask", unforeseen, "that host counts as silent this time")
    return None if asked.cancelled() or unforeseen is not None else asked.result()


def _standing(peer: Peer) -> Standing:
    return Standing(peer.address, peer.is_down, peer.speed.now)
