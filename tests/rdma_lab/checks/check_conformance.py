"""The conformance suite over this session's path, from a pool at the other end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.rdma.conformance import Conformance, N, Wire
from tests.rdma.hosts import BLOCK, Host, keys
from tests.rdma_lab.far import Far


class FarWire(Wire):
    """A reader here; its owner is asked by name."""

    within_s = 40.0

    def __init__(self, far: Far, reader: Host, settings: dict[str, Any]) -> None:
        self.reader = reader
        self.peer = reader.peer(far.begin(settings))
        self.path = self.peer._path
        self.keys = keys(N, 31)
        assert far.put(N, 31, BLOCK) == N


class TestPath(Conformance):
    """Between two hosts."""

    @pytest.fixture
    def wire(self, make_host: Callable[..., Host], far: Far, settings: dict[str, Any]) -> Wire:
        patient = settings | {"lease_s": FarWire.within_s, "peer_timeout_s": FarWire.within_s / 2}
        return FarWire(far, make_host(**patient), patient)
