"""When a read over several lanes is over, and when nothing of it can arrive any more, whatever its lanes do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvplug.errors import PeerError, PeerTimeoutError
from kvplug.rdma.control.leases import HeldLease
from kvplug.rdma.data import spread
from kvplug.rdma.data.datapath import Arrived, Landing, Wanted
from kvplug.rdma.data.spread import SHARE_BYTES, SpreadPath
from tests.rdma.hosts import SOON_S, until
from tests.stopwatch import Stopwatch

BEGUN_S = 1.0
"""A deadline by which every share has begun, also on a busy machine."""


class Slow:
    """A lane whose share takes until it is let go on, or interrupted. What it carries is under the test's hand."""

    def __init__(self, path: SlowPath) -> None:
        self.path, self.generation = path, 1
        self.interrupted = threading.Event()
        self.closed = 0

    def interrupt(self) -> None:
        self.interrupted.set()

    def close(self) -> bool:
        self.closed += 1
        return self.path.can_close


class SlowPath(SpreadPath[Slow]):
    name = "slow"

    def __init__(self, lanes: int) -> None:
        self.link = SimpleNamespace(generation=1)
        super().__init__(self.link, lanes)  # type: ignore[arg-type]
        self.go_on = threading.Event()
        self.heeds_interrupts = True
        self.can_close = True
        self.lanes: list[Slow] = []
        self.carried: list[int] = []

    def _open_lane(self, deadline: float) -> Slow:
        self.lanes.append(Slow(self))
        return self.lanes[-1]

    def _carry(self, lane: Slow, wanted: Wanted, part: Any, deadline: float, arrived: Arrived) -> None:
        self.carried += part.tolist()
        while not self.go_on.wait(0.01):
            if self.heeds_interrupts and lane.interrupted.is_set():
                raise PeerError("interrupted")
        arrived(part)


@pytest.fixture
def path() -> Iterator[SlowPath]:
    made = SlowPath(2)
    yield made
    made.go_on.set()
    made.close()


def wanted(n: int) -> Wanted:
    """Blocks of a share each."""
    at = np.arange(n, dtype=np.int64)
    return Wanted(HeldLease(1, time.monotonic() + SOON_S), at, at, np.full(n, SHARE_BYTES), at)


def reading(path: SlowPath, n: int, for_s: float) -> tuple[threading.Thread, list[Landing]]:
    """A read on a thread of its own, and its landing once it has returned."""
    landings: list[Landing] = []
    deadline = time.monotonic() + for_s
    thread = threading.Thread(target=lambda: landings.append(path.read(wanted(n), deadline, lambda _: None)))
    thread.start()
    return thread, landings


def test_shares_that_had_not_begun_are_over_at_the_deadline(path: SlowPath) -> None:
    """Both threads carry another read; what stood in line writes nothing later."""
    first, firsts = reading(path, 2, SOON_S)
    until(lambda: len(path.carried) == 2)
    watch = Stopwatch()
    second, seconds = reading(path, 2, 0.1)
    second.join(SOON_S)
    assert watch.took_s() < spread.LET_GO_S, "nothing was waited for that had not begun"
    assert isinstance(seconds[0].error, PeerTimeoutError)
    assert seconds[0].is_settled
    path.go_on.set()
    first.join(SOON_S)
    assert firsts[0].error is None
    assert len(path.carried) == 2, "a share that was given up was carried all the same"


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 33])
def test_lanes_get_equal_shares(n: int) -> None:
    path = SlowPath(4)
    path.go_on.set()
    shares: list[int] = []
    assert path.read(wanted(n), time.monotonic() + SOON_S, lambda part: shares.append(len(part))).error is None
    path.close()
    assert sum(shares) == n
    assert len(shares) == min(4, n)
    assert max(shares) - min(shares) <= 1


def test_a_share_that_does_not_let_go_settles_when_it_ends(path: SlowPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "LET_GO_S", 0.05)
    path.heeds_interrupts = False
    thread, landings = reading(path, 2, BEGUN_S)
    until(lambda: len(path.carried) == 2)
    thread.join(SOON_S)
    (landing,) = landings
    assert isinstance(landing.error, PeerTimeoutError)
    assert not landing.is_settled
    assert all(lane.interrupted.is_set() for lane in path.lanes)
    path.go_on.set()
    assert landing.wait_settled(SOON_S)


def test_what_a_lane_may_still_write_to_is_never_settled(path: SlowPath) -> None:
    path.can_close = False
    thread, landings = reading(path, 2, BEGUN_S)
    until(lambda: len(path.carried) == 2)
    thread.join(SOON_S)
    assert isinstance(landings[0].error, PeerError)
    assert all(lane.closed for lane in path.lanes)
    assert not landings[0].wait_settled(0.2)


def test_a_lane_is_used_again_after_a_whole_share_and_dropped_after_an_error(path: SlowPath) -> None:
    path.go_on.set()
    for _ in range(3):
        assert path.read(wanted(2), time.monotonic() + SOON_S, lambda _: None).error is None
    kept = [lane for lane in path.lanes if not lane.closed]
    assert kept == path.lanes
    assert len(kept) <= 2
    path.go_on.clear()
    path.carried.clear()
    thread, landings = reading(path, 2, BEGUN_S)
    until(lambda: len(path.carried) == 2)
    thread.join(SOON_S)
    assert landings[0].error is not None
    assert landings[0].is_settled
    assert all(lane.closed for lane in path.lanes)


def test_lanes_of_an_earlier_connection_are_not_used(path: SlowPath) -> None:
    path.go_on.set()
    assert path.read(wanted(2), time.monotonic() + SOON_S, lambda _: None).error is None
    before = list(path.lanes)
    path.link.generation = 2
    path.lanes.clear()
    path.read(wanted(2), time.monotonic() + SOON_S, lambda _: None)
    assert all(lane.closed for lane in before)
    assert path.lanes


def test_closing_ends_a_read_at_once(path: SlowPath) -> None:
    thread, landings = reading(path, 2, SOON_S)
    until(lambda: len(path.carried) == 2)
    second, seconds = reading(path, 2, SOON_S)
    time.sleep(0.1)
    path.close()
    thread.join(SOON_S / 2)
    assert landings
    assert isinstance(landings[0].error, PeerError)
    assert landings[0].is_settled
    second.join(SOON_S / 2)
    assert seconds, "shares that had not begun are waited for to their deadline"
    assert isinstance(seconds[0].error, PeerError)
    assert seconds[0].is_settled
    late = path.read(wanted(1), time.monotonic() + 1, lambda _: None)
    assert isinstance(late.error, PeerError)
    assert late.is_settled
