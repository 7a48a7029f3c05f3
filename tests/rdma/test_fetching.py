"""Fetching for an engine: in the background, from who has most, once; over real pools and agents."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest

from kvplug.errors import Code
from kvplug.rdma.reader.remote import Peer
from kvplug.remote import fetcher as fetching
from kvplug.remote.fetcher import Fetch, Outcome, Plan, Wanted
from kvplug.remote.peering import directory_publisher
from kvplug.remote.sources import Holders
from tests.rdma.fetch_parts import (
    END_S,
    FAR_LINK,
    SPAN,
    MakeFetcher,
    MakeHost,
    ended,
    fetcher_inside,
    sent,
    settled,
    wanted,
)
from tests.rdma.hosts import BLOCK, Child, Fault, Proxy, keys, put, until
from tests.rdma.redis_server import RedisServer


def test_other_hosts_are_asked_where_the_settings_name_some(make_host: MakeHost) -> None:
    settings = make_host().config
    assert not settings.asks_other_hosts
    assert settings.with_changes(peers=("127.0.0.1:9410",)).asks_other_hosts
    assert settings.with_changes(directory_url="redis://127.0.0.1").asks_other_hosts


def test_a_prefix_comes_from_who_has_most_and_is_pinned_until_it_is_released(
    make_host: MakeHost, make_fetcher: MakeFetcher
) -> None:
    here, most, some = make_host(), make_host(), make_host()
    of = keys(60, 1)
    put(here.store, of[:5], BLOCK)
    put(most.store, of[:40], BLOCK)
    put(some.store, of[:20], BLOCK)
    agents = [most.agent(), some.agent()]
    fetcher = make_fetcher(here, *(agent.address for agent in agents))
    fetch = fetcher.start(wanted(of, first=5))
    assert fetch.wait(END_S)
    assert ended(fetch) is Outcome.FETCHED
    assert fetch.tokens == 35 * SPAN
    assert here.holds(of) == 40
    assert [sent(agent) for agent in agents] == [35 * BLOCK, 0]
    assert here.store.stats().pinned_slots == 40
    assert (here.store.remove(of[:1]) == Code.PINNED).all()
    fetch.release()
    assert here.store.stats().pinned_slots == 0
    counts = fetcher.take_counts()
    assert counts.pop("fetch_ns") > 0
    assert counts == {"fetches": 1, "fetched_blocks": 35, "fetched_bytes": 35 * BLOCK, "fetched_tokens": 35 * SPAN}
    assert not fetcher.take_counts()
    settled(here)


def test_what_one_host_lacks_the_next_one_gives(make_host: MakeHost, make_fetcher: MakeFetcher) -> None:
    here, head, tail = make_host(), make_host(), make_host()
    of = keys(50, 2)
    put(head.store, of[:30], BLOCK)
    put(tail.store, of[20:45], BLOCK)
    fetcher = make_fetcher(here, head.agent().address, tail.agent().address)
    fetch = fetcher.start(wanted(of))
    assert ended(fetch) is Outcome.FETCHED
    assert fetch.tokens == 45 * SPAN
    assert here.holds(of) == 45


def test_the_directory_says_whom_to_ask_and_without_it_the_known_hosts_are_asked(
    make_host: MakeHost, make_fetcher: MakeFetcher
) -> None:
    server = RedisServer()
    try:
        here, there = make_host(), make_host()
        of = keys(30, 3)
        put(there.store, of, BLOCK)
        url = {"directory_url": server.url, "directory_ttl_s": 1.0, "directory_timeout_s": 5.0}
        address = there.agent().address
        publisher = directory_publisher(there.config.with_changes(**url), there.store, address)
        assert publisher is not None
        publisher.start()
        try:
            fetcher = make_fetcher(here, **url)
            sources = fetcher._sources
            assert isinstance(sources, Holders)
            directory = sources._directory
            assert directory is not None
            until(lambda: directory.lookup(of[:1]).have.any(), END_S)
            fetch = fetcher.start(wanted(of[:20]))
            assert ended(fetch) is Outcome.FETCHED
            fetch.release()
            server.kill()
            fetch = fetcher.start(wanted(of, first=20))
            assert ended(fetch) is Outcome.FETCHED
            assert here.holds(of) == 30
        finally:
            publisher.stop()
    finally:
        server.close()


def test_what_nobody_has_is_not_asked_for_again_at_once(
    make_host: MakeHost, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "MISS_FOR_S", 60.0)
    here, there = make_host(), make_host()
    agent = there.agent()
    fetcher = make_fetcher(here, agent.address)
    of = keys(10, 4)
    assert ended(fetcher.start(wanted(of))) is Outcome.MISSING
    asked = agent.counters()["lookups"]
    again = fetcher.start(wanted(of))
    assert (again.done, again.outcome) == (True, Outcome.MISSING), "answered on the spot"
    put(there.store, of, BLOCK)
    assert fetcher.start(wanted(of)).outcome is Outcome.MISSING
    assert agent.counters()["lookups"] == asked
    assert fetcher.take_counts()["fetch_misses"] == 3
    monkeypatch.setattr(fetching, "MISS_FOR_S", 0.0)
    assert ended(fetcher.start(wanted(of[1:]))) is Outcome.FETCHED


def test_many_misses_are_forgotten_in_their_order(
    make_host: MakeHost, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "MISS_FOR_S", 60.0)
    monkeypatch.setattr(fetching, "MAX_MISSES", 8)
    fetcher = make_fetcher(make_host(), make_host().agent().address)
    of = keys(20, 5)
    for i in range(len(of)):
        assert ended(fetcher.start(wanted(of[i : i + 1]))) is Outcome.MISSING
    assert len(fetcher._misses) == 8


def test_two_requests_for_one_prefix_fetch_it_once(
    make_host: MakeHost, make_fetcher: MakeFetcher, proxy: Proxy
) -> None:
    """The second one comes while the first is in mid-read, and asks for more."""
    here, there = make_host(), make_host(**FAR_LINK, agent_advertise=proxy.address)
    of = keys(100, 6)
    put(there.store, of, BLOCK)
    agent = there.agent()
    proxy.upstream = agent.address
    fetcher = make_fetcher(here, proxy.address, peer_connections=1)
    second: list[Fetch] = []
    proxy.fault = Fault("delay", 1, to_agent=False, at=20 * BLOCK, act=lambda: second.append(fetcher.start(wanted(of))))
    first = fetcher.start(wanted(of[:80]))
    assert ended(first) is Outcome.FETCHED
    until(lambda: second, END_S)
    assert ended(second[0]) is Outcome.FETCHED
    assert (first.tokens, second[0].tokens) == (80 * SPAN, 20 * SPAN)
    assert here.holds(of) == 100
    assert sent(agent) == 100 * BLOCK
    assert agent.counters()["lookups"] == 4, "each asked once who has it, and once for what it fetched"
    for fetch in (first, *second):
        assert here.store.stats().pinned_slots > 0
        fetch.release()
    settled(here)


def test_two_processes_of_one_host_fetch_a_prefix_once(
    make_host: MakeHost, make_fetcher: MakeFetcher, proxy: Proxy
) -> None:
    here, there = make_host(), make_host(**FAR_LINK, agent_advertise=proxy.address)
    of = keys(100, 7)
    put(there.store, of, BLOCK)
    agent = there.agent()
    proxy.upstream = agent.address
    started = threading.Event()
    read_end, write_end = os.pipe()

    def other() -> None:
        fetcher = fetcher_inside(here, here.config.with_changes(peers=(agent.address,), fetch_timeout_s=END_S))
        os.write(write_end, b"1")
        assert os.read(go_end, 1) == b"1"
        fetch = fetcher.start(wanted(of))
        assert ended(fetch) is Outcome.FETCHED
        assert fetch.tokens == 100 * SPAN
        assert here.holds(of) == 100
        fetch.release()
        fetcher.close()
        here.store.close()

    go_end, say_end = os.pipe()
    with Child(other) as child:
        assert os.read(read_end, 1) == b"1"
        fetcher = make_fetcher(here, proxy.address, peer_connections=1)

        def let_the_other_begin() -> None:
            os.write(say_end, b"1")
            until(lambda: agent.counters()["lookups"] > asked, END_S)  # it has been told what there is
            started.set()

        proxy.fault = Fault("delay", 1, to_agent=False, at=20 * BLOCK, act=let_the_other_begin)
        asked = 2
        fetch = fetcher.start(wanted(of))
        assert ended(fetch) is Outcome.FETCHED
        assert started.is_set()
        assert child.wait(END_S) == 0
    for end in (read_end, write_end, go_end, say_end):
        os.close(end)
    assert here.holds(of) == 100
    assert sent(agent) == 100 * BLOCK


def test_a_fetch_is_not_begun_where_computing_is_faster(make_host: MakeHost, make_fetcher: MakeFetcher) -> None:
    here, there = make_host(), make_host()
    of = keys(60, 8)
    put(there.store, of, BLOCK)
    agent = there.agent()
    fetcher = make_fetcher(here, agent.address)
    assert ended(fetcher.start(wanted(of[:40]), tokens_per_s=1e4)) is Outcome.FETCHED, "not known yet: tried"
    sources = fetcher._sources
    assert isinstance(sources, Holders)
    (peer,) = sources._open.values()
    rate = peer.speed.now.bytes_per_s
    assert rate is not None
    assert rate > 1e6
    peer.speed._bytes_per_s._value = BLOCK * 10.0  # ten blocks a second
    before = sent(agent)
    slower = fetcher.start(wanted(of, first=40), tokens_per_s=100.0 * SPAN)
    assert ended(slower) is Outcome.NOT_WORTH_IT
    assert (slower.tokens, sent(agent)) == (0, before)
    assert fetcher.take_counts()["fetch_not_worth_it"] == 1
    faster = fetcher.start(wanted(of, first=40), tokens_per_s=2.0 * SPAN)
    assert ended(faster) is Outcome.FETCHED
    assert faster.tokens == 20 * SPAN
    assert here.holds(of) == 60


def test_what_is_computed_in_a_moment_is_not_asked_for(make_host: MakeHost, make_fetcher: MakeFetcher) -> None:
    here, there = make_host(), make_host()
    agent = there.agent()
    fetcher = make_fetcher(here, agent.address)
    fetch = fetcher.start(wanted(keys(4, 9)), tokens_per_s=1e6)
    assert (fetch.done, fetch.outcome) == (True, Outcome.NOT_WORTH_IT)
    assert agent.counters().get("lookups", 0) == 0


def test_a_fetch_ends_when_the_link_turns_out_slower_than_computing(
    make_host: MakeHost, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at after each slice; what has arrived is here."""
    monkeypatch.setattr(fetching, "FIRST_SLICE_BYTES", 20 * BLOCK)
    here, there = make_host(), make_host(**FAR_LINK)
    of = keys(100, 10)
    put(there.store, of, BLOCK)
    fetcher = make_fetcher(here, there.agent().address)
    read = Peer.fetch

    def slow(self: Peer, *args: Any, **kwargs: Any) -> Any:
        codes = read(self, *args, **kwargs)
        self.speed._bytes_per_s._value = 1.0
        return codes

    monkeypatch.setattr(Peer, "fetch", slow)
    fetch = fetcher.start(wanted(of), tokens_per_s=1000.0)
    assert ended(fetch) is Outcome.NOT_WORTH_IT
    assert fetch.tokens == 20 * SPAN
    assert here.holds(of) == 20
    assert here.store.stats().pinned_slots == 20


def test_progress_moves_the_deadline_and_silence_does_not(make_host: MakeHost) -> None:
    fetch = Fetch(wanted(keys(1, 1)), 1.5, moves=True, tokens_per_s=100.0)
    assert fetch.deadline == fetch.began + 1.5
    fetch.progress(400)
    assert fetch.deadline == fetch.began + 1.5 + 2.0
    strict = Fetch(wanted(keys(1, 1)), 1.5, moves=False, tokens_per_s=100.0)
    strict.progress(400)
    assert strict.deadline == strict.began + 1.5


def test_groups_that_need_a_window_only_get_it_and_nothing_before_it(
    make_host: MakeHost, make_fetcher: MakeFetcher
) -> None:
    """Two groups: all blocks of one, the last two before the hit's end of the other, whose first keys nobody has."""
    here, there = make_host(), make_host()
    of = keys(40, 19)
    full, window = of[:20], of[20:]
    put(there.store, full[:15], BLOCK)
    put(there.store, window[10:15], BLOCK)

    def plan(have: Any) -> Plan:
        for n in range(20, 1, -1):
            index = np.concatenate((np.arange(n), 20 + np.arange(n - 2, n)))
            if have[index].all():
                return Plan(index, n * SPAN)
        return Plan(np.arange(0), 0)

    agent = there.agent()
    fetcher = make_fetcher(here, agent.address)
    fetch = fetcher.start(Wanted(of, np.full(40, BLOCK), plan, 20 * SPAN))
    assert ended(fetch) is Outcome.FETCHED
    assert fetch.tokens == 15 * SPAN
    assert here.store.exists(of).tolist() == [True] * 15 + [False] * 5 + [False] * 13 + [True] * 2 + [False] * 5
    assert sent(agent) == 17 * BLOCK


def test_a_pool_without_room_ends_the_fetch(make_host: MakeHost, make_fetcher: MakeFetcher) -> None:
    here, there = make_host(size="8mib", slab="1mib"), make_host(slab="4mib", **FAR_LINK)
    of = keys(2, 20)
    put(there.store, of, 2 << 20)
    fetcher = make_fetcher(here, there.agent().address)
    assert ended(fetcher.start(wanted(of, nbytes=2 << 20))) is Outcome.NO_ROOM
    assert fetcher.take_counts()["fetch_no_room"] == 1


def test_a_prefix_larger_than_half_the_pool_brings_its_head(make_host: MakeHost, make_fetcher: MakeFetcher) -> None:
    here, there = make_host(size="8mib"), make_host(**FAR_LINK)
    of = keys(200, 21)
    put(there.store, of, BLOCK)
    fetcher = make_fetcher(here, there.agent().address)
    fetch = fetcher.start(wanted(of))
    assert ended(fetch) is Outcome.FETCHED
    most = here.exchange.data_bytes // 2 // BLOCK
    assert fetch.tokens == most * SPAN
    assert here.store.exists(of).tolist() == [True] * most + [False] * (200 - most)


def test_many_requests_at_once_all_end_and_all_is_there(make_host: MakeHost, make_fetcher: MakeFetcher) -> None:
    here, there = make_host(), make_host(**FAR_LINK)
    of = keys(200, 22)
    put(there.store, of, BLOCK)
    agent = there.agent()
    fetcher = make_fetcher(here, agent.address)
    fetches = [fetcher.start(wanted(of[: 20 + 10 * i])) for i in range(12)]
    fetches += [fetcher.start(wanted(of[i:])) for i in range(0, 100, 7)]
    assert {ended(fetch) for fetch in fetches} <= {Outcome.FETCHED, Outcome.PRESENT}
    assert here.holds(of) == 200
    assert sent(agent) == 200 * BLOCK
    for fetch in fetches:
        fetch.release()
    settled(here)
