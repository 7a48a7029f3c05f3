"""Which path a read takes: verbs where both ends have them, TCP otherwise.

``data_path`` = auto takes verbs if the agent offers them and this host can open a device, but not on loopback, where
nothing beats the kernel's own copy, and not with TLS, which a READ would go around. What can't be had by verbs just
now comes over TCP within the same read; what broke by verbs is a miss, as with any fault. Who fails twice in a row, or
can't be set up, is set aside for a time that doubles, so that a fabric that does not carry RDMA between these two hosts
costs little. ``tcp`` and ``verbs`` take that and nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from kvplug.rdma.blocks import U8
from kvplug.rdma.control.link import Link
from kvplug.rdma.control.protocol import I64
from kvplug.rdma.control.wire import is_loopback
from kvplug.rdma.data.datapath import Arrived, DataPath, Landing, Wanted
from kvplug.rdma.data.tcp import TcpPath
from kvplug.rdma.verbs.verbs import NotReadyError, RegisteringError, VerbsPath

if TYPE_CHECKING:
    from kvplug.config import Config

log = logging.getLogger("kvplug")

ASIDE_FIRST_S: Final = 5.0
ASIDE_MOST_S: Final = 300.0
FAULTS_IN_A_ROW: Final = 2


class ChosenPath(DataPath):
    """One peer's way, as settings, devices and experience say."""

    name = "auto"

    def __init__(self, link: Link, memory: U8, config: Config, count: Callable[[str], None]) -> None:
        """``count``: adds one to a counter of that name. Nothing is opened before the first read."""
        self._link, self._count = link, count
        encrypted = config.tls_cert is not None  # which READs are not
        self._wish = "tcp" if config.data_path == "auto" and encrypted else config.data_path
        self.tcp = TcpPath(link, memory, connections=config.peer_connections, stall_s=config.peer_timeout_s)
        self.verbs = VerbsPath(link, memory, config)
        self._mutex = threading.Lock()
        self._aside_until = 0.0
        self._aside_s = 0.0
        self._faults = 0
        self._warned = False

    def takes_verbs(self) -> bool:
        """Whether the next read begins by verbs."""
        if self._wish != "auto":
            return self._wish == "verbs"
        welcome = self._link.welcome
        if welcome is None or self.verbs.name not in welcome.paths or is_loopback(self._link.ends[1]):
            return False
        return time.monotonic() >= self._aside_until

    def read(self, wanted: Wanted, deadline: float, arrived: Arrived) -> Landing:
        """As the interface says."""
        if not self.takes_verbs():
            return self.tcp.read(wanted, deadline, arrived)
        here = np.zeros(len(wanted), np.bool_)

        def noted(which: I64) -> None:
            here[which] = True
            arrived(which)

        landing = self.verbs.read(wanted, deadline, noted)
        if landing.error is None or time.monotonic() < deadline:  # else it was the caller who had no more time
            self._learn(landing)
        if self._wish == "verbs" or not isinstance(landing.error, NotReadyError) or not landing.is_settled:
            return landing
        self._count("verbs_to_tcp")
        rest = np.flatnonzero(~here)
        left = Wanted(wanted.lease, wanted.index[rest], wanted.sources[rest], wanted.nbytes[rest], wanted.targets[rest])
        return self.tcp.read(left, deadline, lambda which: arrived(rest[which]))

    def _learn(self, landing: Landing) -> None:
        error = landing.error
        with self._mutex:
            if error is None:
                self._aside_s, self._faults, self._warned = 0.0, 0, False
                what = "verbs_reads"
            elif isinstance(error, RegisteringError):
                what = "verbs_registering"
            elif isinstance(error, NotReadyError):
                what = "verbs_not_set_up"
                self._set_aside()
            else:
                what = "verbs_faults"
                self._faults += 1
                if self._faults >= FAULTS_IN_A_ROW:
                    self._set_aside()
            warn = error is not None and what != "verbs_registering" and not self._warned
            self._warned = self._warned or warn
        self._count(what)
        if warn:
            text = "peer %s, by verbs: %s; its blocks come over TCP for now"
            if self._wish == "verbs":
                text = "peer %s, by verbs: %s; its blocks are misses, since data_path = verbs"
            log.warning(text, self._link.address, error)

    def _set_aside(self) -> None:
        self._aside_s = min(max(2 * self._aside_s, ASIDE_FIRST_S), ASIDE_MOST_S)
        self._aside_until = time.monotonic() + self._aside_s

    def close(self) -> None:
        """Close both."""
        self.verbs.close()
        self.tcp.close()
