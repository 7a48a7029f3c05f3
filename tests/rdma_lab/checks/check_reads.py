"""Whole prefixes, read from the pool at the other end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvplug.errors import Code
from tests.rdma.hosts import Host, keys
from tests.rdma_lab.far import Far

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(("n", "nbytes"), [(512, 16 * KIB), (16, MIB)], ids=["512x16KiB", "16x1MiB"])
def test_a_prefix_comes_over_with_every_byte(
    make_host: Callable[..., Host], far: Far, settings: dict[str, Any], n: int, nbytes: int
) -> None:
    settings = settings | {"size": "64mib"}
    reader = make_host(**settings)
    peer = reader.peer(far.begin(settings))
    assert far.put(n, 3, nbytes) == n
    codes = peer.fetch(keys(n, 3), 60.0, prefix=True)
    assert (codes == Code.OK).all(), codes.tolist()
    assert reader.holds(keys(n, 3), nbytes) == n
    reader.store.check_integrity(deep=True)
    assert peer.stats(10.0).counters["keys_leased"] >= n
