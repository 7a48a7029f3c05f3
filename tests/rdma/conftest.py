"""Hosts of the tests' own, each with a pool that nobody else uses and that is gone afterwards."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvplug.remote.fetcher import Fetcher
from tests.pool.conftest import leave_nothing
from tests.rdma.fetch_parts import END_S, MakeFetcher, fetcher_inside
from tests.rdma.handshakes import opened
from tests.rdma.hosts import Host, Proxy, certificates

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _hang_up() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()


@pytest.fixture
def make_host() -> Iterator[Callable[..., Host]]:
    """``make_host(**settings)``: a host with a pool of its own."""
    made: list[Host] = []

    def make(**settings: Any) -> Host:
        made.append(Host(f"t-rdma-{os.getpid()}-{next(_numbers)}", **settings))
        return made[-1]

    yield make
    for host in reversed(made):
        host.close()
    for host in made:
        leave_nothing(host.config.pool)


@pytest.fixture
def make_fetcher() -> Iterator[MakeFetcher]:
    """``make_fetcher(host, *addresses, **settings)``: for the host's store; closed before the hosts are.

    It reads the other hosts in this process, where a test can look at it and meddle; an engine's has one of its own.
    """
    made: list[Fetcher] = []

    def make(host: Host, *addresses: str, **settings: Any) -> Fetcher:
        settings = {"fetch_timeout_s": END_S} | settings
        made.append(fetcher_inside(host, host.config.with_changes(peers=addresses, **settings)))
        return made[-1]

    yield make
    for fetcher in made:
        fetcher.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A link that breaks on cue."""
    made = Proxy()
    yield made
    made.close()


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """TLS settings of three hosts, one of them a stranger."""
    return certificates(tmp_path_factory.mktemp("certificates"))
