"""What the tests of fetching for an engine share: what is wanted, how it must end, and what it must leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvplug.config import Config
from kvplug.rdma.agent.agent import Agent
from kvplug.remote.fetcher import Fetch, Fetcher, Outcome, Wanted, leading
from kvplug.remote.sources import Holders
from tests.pool.children import check_nothing_left
from tests.rdma.hosts import BLOCK, Host, until

MakeHost = Callable[..., Host]
MakeFetcher = Callable[..., Fetcher]
SPAN = 16
END_S = 60.0
"""Longest wait for what ends by itself, on a machine that does other things as well."""
FAR_LINK = {"agent_pin_share": 1.0, "pin_budget_share": 1.0}


def fetcher_inside(host: Host, config: Config) -> Fetcher:
    """One that starts no process."""
    return Fetcher(host.store, config, Holders(host.exchange, config))


def wanted(of: Any, first: int = 0, nbytes: int = BLOCK) -> Wanted:
    """All of a prefix of one group."""
    return Wanted(of, nbytes, leading(SPAN), SPAN * (len(of) - first), first)


def ended(fetch: Fetch) -> Outcome:
    """How it ended, which it must by itself."""
    until(lambda: fetch.outcome is not None, END_S)
    assert fetch.done
    assert fetch.outcome is not None
    return fetch.outcome


def sent(agent: Agent) -> int:
    return agent.counters().get("bytes_sent", 0)


def settled(host: Host) -> None:
    """No pin, nothing in writing or quarantine, tables and bytes whole."""
    until(lambda: host.store.stats().pinned_slots == 0)
    until(lambda: host.store.stats().writing_slots == 0)
    until(lambda: host.store.stats().quarantined_slots == 0)
    check_nothing_left(host.store)
