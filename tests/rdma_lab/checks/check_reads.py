"""Whole prefixes, read from the pool at the other end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvplug.errors import Code
from tests.rdma.hosts import Host, keys
from tests.rdma_lab.far import Far

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(("n", "nbytes"), [(512, 16 * KIB), (16, MIB)], ids=["512x16KiB", "16x1MiB"])
def test_a_prefix_comes_over_with_every_byte(
    make_host: Callable[..., Host], far: Far, settings: dict[str, Any], path: str, n: int, nbytes: int
) -> None:
    settings = settings | {"lease_s": 60.0, "peer_timeout_s": 20.0}
    reader = make_host(**settings)
    peer = reader.peer(far.begin(settings))
    assert far.put(n, 3, nbytes) == n
    codes = peer.fetch(keys(n, 3), 60.0, prefix=True)
    assert (codes == Code.OK).all(), codes.tolist()
    assert reader.holds(keys(n, 3), nbytes) == n
    reader.store.check_integrity(deep=True)
    if path != "tcp":
        assert set(peer.counters()) >= {"verbs_reads"}


@pytest.mark.verbs
def test_by_itself_it_takes_verbs_between_hosts(
    make_host: Callable[..., Host], far: Far, settings: dict[str, Any]
) -> None:
    """And the device has carried what came."""
    settings = settings | {"data_path": "auto", "lease_s": 60.0, "peer_timeout_s": 20.0}
    reader = make_host(**settings)
    peer = reader.peer(far.begin(settings))
    assert far.put(8, 5, 64 * KIB) == 8
    before = packets()
    assert (peer.fetch(keys(8, 5), 60.0) == Code.OK).all()
    assert packets() - before >= 8 * 64 * KIB // 4096
    assert peer.counters()["verbs_reads"] == 1
    assert "verbs_to_tcp" not in peer.counters()


def packets() -> int:
    """That this guest's RDMA device has received."""
    return int(Path("/sys/class/infiniband/rxe0/ports/1/hw_counters/rcvd_pkts").read_text())
