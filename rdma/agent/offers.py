"""An engine host's side of cache nodes: what is about to be evicted and worth keeping is offered to one of them.

The agent watches the pool without its lock; engines have no part in it and wait for none of it. It offers some keys at
a time, the most worth first, and goes on as soon as the node has said which it wants: whether the node gets to read a
block before it is evicted is the node's affair. Each host keeps to one node as long as that answers, so that a prefix
lies in one place; which one follows from both identities, so that hosts spread over the nodes.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
from blake3 import blake3

from kvplug.errors import Code, PeerError, ProtocolError
from kvplug.rdma.blocks import Blocks
from kvplug.rdma.control.link import Link, RefusedError
from kvplug.rdma.control.protocol import I8, MAX_OFFER_KEYS, Offer, Offered, array, raw
from kvplug.rdma.directory.peers import PeerInfo, PeerSource
from kvplug.threads import LivingThread

if TYPE_CHECKING:
    from kvplug.config import Config

log = logging.getLogger("kvplug")

OFFER_BYTES: Final = 64 << 20
"""Blocks of one offer; the next follows when the node has answered."""
LOOK_S: Final = 0.1
STALE_S: Final = 2.0
"""What a look has found is offered for so long; then it is looked anew."""
DECLINED_S: Final = 0.1
LOOKING_SHARE: Final = 0.05
"""Of one core, at most."""
NO_NODE_S: Final = 30.0
"""A host that takes no offers is asked again after so long."""
BACK_OFF_FIRST_S: Final = 0.5
BACK_OFF_MOST_S: Final = 30.0
REFUSED_WARN_S: Final = 8.0
STOP_S: Final = 2.0


@dataclasses.dataclass(slots=True, eq=False)
class _Node:
    """A host that takes offers, or may."""

    link: Link
    not_before: float = 0.0
    back_off_s: float = 0.0
    warned: bool = False

    def leave_alone(self, seconds: float) -> None:
        self.not_before = time.monotonic() + seconds

    def failed(self) -> None:
        self.back_off_s = min(max(2 * self.back_off_s, BACK_OFF_FIRST_S), BACK_OFF_MOST_S)
        self.leave_alone(self.back_off_s)


class Offerer:
    """Watches one pool and offers, in a thread, from :meth:`start` to :meth:`close`."""

    def __init__(self, blocks: Blocks, config: Config, peers: PeerSource, count: Callable[[str, int], None]) -> None:
        """``count``: adds to a counter of the agent."""
        self._blocks, self._config, self._peers, self._count = blocks, config, peers, count
        self._addresses: tuple[str, ...] = ()
        self._nodes: dict[str, _Node] = {}
        self._has_seen_node = False
        self._stop = threading.Event()
        self._thread = LivingThread("kvplug-offer", self._run)

    def start(self, addresses: tuple[str, ...]) -> None:
        """Begin. ``addresses``: this host's agent, as others may name it."""
        self._addresses = addresses
        self._thread.start()

    def close(self) -> None:
        """End it. Idempotent."""
        self._stop.set()
        for node in list(self._nodes.values()):
            node.link.close()
        self._thread.end(STOP_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._stop.wait(self._round())
        for node in self._nodes.values():
            node.link.close()

    def _round(self) -> float:
        """Look, and offer what was found. How long to wait before the next."""
        peers = self._peers.peers()
        if not self._has_seen_node:  # from the first one on every look counts, also while there is none
            self._has_seen_node = self._node(peers) is not None
            if not self._has_seen_node:
                return LOOK_S
        began = time.monotonic()
        keys, nbytes = self._blocks.at_risk(OFFER_BYTES, MAX_OFFER_KEYS, anew=True)
        self._count("looks", 1)
        pause = max(LOOK_S, (time.monotonic() - began) / LOOKING_SHARE)
        while len(keys) and time.monotonic() < began + STALE_S and not self._stop.is_set():
            node = self._node(peers)
            if node is None:
                break
            offer = Offer(keys.tobytes(), raw(nbytes, np.int64), self._blocks.host, self._addresses)
            codes = self._ask(node, offer, len(keys))
            if codes is None:
                break
            if (codes == Code.BUDGET).any():
                self._stop.wait(DECLINED_S)
                continue
            self._blocks.offered(codes >= 0)
            self._count("keys_offered_to_nodes", len(codes))
            self._count("keys_wanted_by_nodes", int((codes == Code.OK).sum()))
            keys, nbytes = self._blocks.at_risk(OFFER_BYTES, MAX_OFFER_KEYS, anew=False)
        return pause

    def _ask(self, node: _Node, offer: Offer, n: int) -> I8 | None:
        try:
            answer = node.link.ask(offer, Offered, time.monotonic() + self._config.peer_timeout_s, again=True)
            codes = array(answer.codes, np.int8)
            if len(codes) != n:
                raise ProtocolError(f"{node.link.address} answered an offer of {n} blocks with {len(codes)} codes")
        except RefusedError as e:
            self._count("offers_refused", 1)
            node.failed()  # one that does not know this host may get to know it
            if node.back_off_s >= REFUSED_WARN_S and not node.warned:
                node.warned = True
                log.warning("cache node %s takes no offers of this host: %s", node.link.address, e)
            return None
        except PeerError:
            self._count("offers_failed", 1)
            node.failed()
            return None
        node.back_off_s = 0.0
        return codes

    def _node(self, peers: tuple[PeerInfo, ...]) -> _Node | None:
        """The first node in this host's order that is not left alone just now; at most one that fails is waited for."""
        here = self._blocks.host
        for address in self._nodes.keys() - {peer.address for peer in peers}:
            self._nodes.pop(address).link.close()
        now = time.monotonic()
        for peer in sorted(peers, key=lambda peer: blake3(here + peer.id.encode()).digest(8)):
            if peer.epoch and not peer.cache_node:  # its record says so
                continue
            node = self._nodes.get(peer.address)
            if node is None:
                node = self._nodes[peer.address] = _Node(Link(peer.address, self._config))
            if now < node.not_before:
                continue
            try:
                node.link.connect(now + self._config.peer_timeout_s)
            except PeerError:
                self._count("nodes_not_reached", 1)
                node.failed()
                return None
            if node.link.welcome is not None and node.link.welcome.cache_node:
                return node
            node.leave_alone(NO_NODE_S)
            node.link.close()  # not kept for nothing
            node.link = Link(peer.address, self._config)
        return None
