"""Fetching for an engine that ends early: the other host does, nobody wants it, the fetcher or the store is closed."""

from __future__ import annotations

import signal
import time

import pytest

from kvplug.remote import fetcher as fetching
from kvplug.remote.fetcher import Fetch, Outcome
from tests.rdma.fetch_parts import END_S, FAR_LINK, SPAN, MakeFetcher, MakeHost, ended, settled, wanted
from tests.rdma.hosts import BLOCK, Child, Fault, Proxy, keys, put, until
from tests.stopwatch import LONG_S, Stopwatch


@pytest.mark.parametrize("kind", ["killed", "stopped"])
def test_an_agent_that_ends_in_mid_read_costs_what_had_not_arrived(
    make_host: MakeHost, make_fetcher: MakeFetcher, proxy: Proxy, kind: str
) -> None:
    here = make_host(peer_timeout_s=0.5)
    there = make_host(**FAR_LINK, agent_advertise=proxy.address)
    of = keys(200, 11)
    put(there.store, of, BLOCK)
    child, proxy.upstream = there.agent_process()
    fetcher = make_fetcher(here, proxy.address, peer_connections=1)
    number = signal.SIGKILL if kind == "killed" else signal.SIGSTOP
    fault = proxy.fault = Fault("delay", 1, to_agent=False, at=100 * BLOCK, act=lambda: child.signal(number))
    fetch = fetcher.start(wanted(of), timeout_s=END_S)
    outcome = ended(fetch)
    assert fault.happened.is_set()
    if outcome is Outcome.FETCHED:  # the rest was in the sockets already
        assert fetch.tokens == 200 * SPAN
    else:
        assert outcome is Outcome.TIMEOUT
        assert time.monotonic() < fetch.deadline, "noticed, not waited for"
        assert 0 < fetch.tokens < 200 * SPAN
        assert here.holds(of) * SPAN == fetch.tokens
    fetch.release()
    settled(here)
    again = fetcher.start(wanted(keys(5, 12)))
    ended(again)


def test_a_stopped_agent_holds_nobody_beyond_the_deadline(make_host: MakeHost, make_fetcher: MakeFetcher) -> None:
    here, there = make_host(), make_host()
    of = keys(20, 13)
    put(there.store, of, BLOCK)
    child, address = there.agent_process()
    fetcher = make_fetcher(here, address)
    assert ended(fetcher.start(wanted(of[:5]))) is Outcome.FETCHED
    child.signal(signal.SIGSTOP)
    fetch = fetcher.start(wanted(of, first=5), timeout_s=0.3)
    assert not fetch.done, "asked in the background"
    assert fetch.wait(END_S)
    fetch.release()
    ended(fetch)
    child.signal(signal.SIGCONT)

    def fetched() -> bool:
        """A slow machine may see the deadline of the fetch that has brought the last of them."""
        return ended(fetcher.start(wanted(of[::-1].copy()))) in (Outcome.FETCHED, Outcome.PRESENT)

    until(fetched, END_S)
    assert here.holds(of) == 20


def test_an_engine_that_does_not_come_loses_its_pins(
    make_host: MakeHost, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "HOLD_S", 0.2)
    here, there = make_host(), make_host()
    of = keys(20, 14)
    put(there.store, of, BLOCK)
    fetcher = make_fetcher(here, there.agent().address)
    fetch = fetcher.start(wanted(of))
    assert ended(fetch) is Outcome.FETCHED
    until(lambda: here.store.stats().pinned_slots == 0, END_S)
    fetch.release()
    assert here.holds(of) == 20


def test_a_fetch_that_nobody_wants_any_more_ends_and_pins_nothing(
    make_host: MakeHost, make_fetcher: MakeFetcher, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "FIRST_SLICE_BYTES", 10 * BLOCK)
    monkeypatch.setattr(fetching, "MOST_SLICE_BYTES", 10 * BLOCK)
    here, there = make_host(), make_host(**FAR_LINK, agent_advertise=proxy.address)
    of = keys(100, 15)
    put(there.store, of, BLOCK)
    proxy.upstream = there.agent().address
    fetcher = make_fetcher(here, proxy.address, peer_connections=1)
    made: list[Fetch] = []
    proxy.fault = Fault("delay", 1, to_agent=False, at=5 * BLOCK, act=lambda: made[0].release())
    made.append(fetcher.start(wanted(of)))
    assert ended(made[0]) is Outcome.GIVEN_UP
    assert here.holds(of) == 10
    settled(here)


@pytest.mark.parametrize("threads", [1, fetching.THREADS])  # with one, all but the first are still waiting for it
def test_closing_with_fetches_under_way_leaves_nothing(
    make_host: MakeHost, make_fetcher: MakeFetcher, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(fetching, "THREADS", threads)
    monkeypatch.setattr(fetching, "CLOSE_S", LONG_S)  # reads end by themselves, however busy the machine
    here, there = make_host(peer_timeout_s=60.0), make_host(**FAR_LINK, agent_advertise=proxy.address)
    of = keys(100, 16)
    put(there.store, of, BLOCK)
    proxy.upstream = there.agent().address
    fetcher = make_fetcher(here, proxy.address, peer_connections=1)
    fault = proxy.fault = Fault("stall", 1, to_agent=False, at=50 * BLOCK)
    fetches = [fetcher.start(wanted(of)) for _ in range(3)]
    fetches += [fetcher.start(wanted(keys(5, 100 + i))) for i in range(12)]  # more than there are threads
    assert fault.happened.wait(END_S)
    fetcher.close()
    assert all(fetch.outcome is not None for fetch in fetches)
    assert not fetcher._under_way, "a read is still under way"
    assert fetches[0].outcome in (Outcome.TIMEOUT, Outcome.GIVEN_UP)
    assert fetcher.start(wanted(of)).outcome is Outcome.GIVEN_UP
    settled(here)
    here.store.close()
    fetcher.close()


def test_a_store_that_is_closed_first_ends_its_fetches(
    make_host: MakeHost, make_fetcher: MakeFetcher, proxy: Proxy
) -> None:
    here, there = make_host(), make_host(**FAR_LINK, agent_advertise=proxy.address)
    of = keys(100, 17)
    put(there.store, of, BLOCK)
    proxy.upstream = there.agent().address
    fetcher = make_fetcher(here, proxy.address, peer_connections=1)
    proxy.fault = Fault("delay", 1, to_agent=False, at=50 * BLOCK, act=here.store.close)
    fetch = fetcher.start(wanted(of))
    assert ended(fetch) is Outcome.GIVEN_UP
    fetch.release()


def test_a_forked_childs_copy_fetches_nothing_and_disturbs_nobody(
    make_host: MakeHost, make_fetcher: MakeFetcher, proxy: Proxy
) -> None:
    here, there = make_host(), make_host(**FAR_LINK, agent_advertise=proxy.address)
    of = keys(100, 18)
    put(there.store, of, BLOCK)
    proxy.upstream = there.agent().address
    fetcher = make_fetcher(here, proxy.address, peer_connections=1)

    def body() -> None:
        fetch = fetcher.start(wanted(of))
        assert fetch.outcome is Outcome.GIVEN_UP
        fetch.release()
        fetcher.close()

    children: list[Child] = []
    proxy.fault = Fault("delay", 1, to_agent=False, at=50 * BLOCK, act=lambda: children.append(Child(body)))
    fetch = fetcher.start(wanted(of))
    assert ended(fetch) is Outcome.FETCHED
    assert children[0].wait() == 0
    assert here.holds(of) == 100


def test_a_close_does_not_wait_for_what_has_not_begun(
    make_host: MakeHost, make_fetcher: MakeFetcher, proxy: Proxy
) -> None:
    """All threads wait for a peer that takes the question and says nothing; two more fetches stand in line."""
    here, there = make_host(peer_timeout_s=0.5), make_host()
    proxy.upstream = there.agent().address
    proxy.taking.clear()
    fetcher = make_fetcher(here, proxy.address)
    fetches = [fetcher.start(wanted(keys(3, 60 + i))) for i in range(fetching.THREADS + 2)]
    until(lambda: len(proxy.passed) > 0, END_S)
    watch = Stopwatch()
    fetcher.close()
    assert watch.took_s() < fetching.CLOSE_S
    assert {fetch.outcome for fetch in fetches} <= {Outcome.GIVEN_UP, Outcome.TIMEOUT}


def test_peers_that_do_not_answer_are_no_peers_that_have_nothing(
    make_host: MakeHost, make_fetcher: MakeFetcher, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted apart, and each new reason is said."""
    here, there = make_host(peer_timeout_s=0.5), make_host()
    child, address = there.agent_process()
    fetcher = make_fetcher(here, address)
    assert ended(fetcher.start(wanted(keys(3, 80)))) is Outcome.MISSING
    child.signal(signal.SIGKILL)
    child.wait()
    assert ended(fetcher.start(wanted(keys(3, 81)))) is Outcome.TIMEOUT
    assert ended(fetcher.start(wanted(keys(3, 82)))) is Outcome.TIMEOUT, "left alone for a moment"
    counts = fetcher.take_counts()
    assert (counts["fetch_misses"], counts["fetch_timeouts"]) == (1, 2)
    assert any(f"kvplug: peer {address}: " in record.getMessage() for record in caplog.records)
