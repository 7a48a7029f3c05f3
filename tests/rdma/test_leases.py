"""Leases: bounded, counted on two clocks that are never compared, and over on the reader's side first."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug.rdma.control.leases import MAX_LEASES_A_READER, HeldLease, LeaseTable

MOST = 1000


class Table:
    """A table with a clock that stands still unless told, and a record of what it unpinned."""

    def __init__(self) -> None:
        self.now = 100.0
        self.unpinned: list[int] = []
        self.leases = LeaseTable(lambda s: self.unpinned.extend(s.tolist()), most_bytes=MOST, clock=lambda: self.now)
        self._slot = 0

    def grant(self, reader: int, nbytes: int, seconds: float = 10.0) -> Any:
        self._slot += 1
        slots = np.array([self._slot])
        return self.leases.grant(reader, seconds, slots, slots * 4096, np.array([nbytes]))


@pytest.fixture
def table() -> Table:
    return Table()


def test_a_lease_ends_by_itself_and_its_pins_go(table: Table) -> None:
    lease = table.grant(1, 10, seconds=5)
    table.now += 4.9
    assert table.leases.of(lease.id, 1) is lease
    assert table.leases.expire() == 0
    table.now += 0.2
    assert table.leases.of(lease.id, 1) is None
    assert not table.leases.holds(lease)
    assert table.leases.expire() == 1
    assert table.unpinned == [1]
    assert table.leases.held() == (0, 0)


def test_only_its_reader_sees_extends_or_releases_a_lease(table: Table) -> None:
    lease = table.grant(1, 10)
    assert table.leases.of(lease.id, 2) is None
    assert not table.leases.extend(lease.id, 2, 5)
    assert table.leases.release([lease.id], 2) == 0
    assert table.leases.release([lease.id, lease.id, 999], 1) == 1
    assert table.unpinned == [1]


def test_a_lease_that_has_ended_is_not_made_longer(table: Table) -> None:
    lease = table.grant(1, 10, seconds=1)
    assert table.leases.extend(lease.id, 1, 3)
    table.now += 2.5
    assert table.leases.of(lease.id, 1) is lease
    table.now += 1
    assert not table.leases.extend(lease.id, 1, 3)


def test_a_readers_end_releases_what_it_had_and_nothing_else(table: Table) -> None:
    for reader in (1, 2, 1):
        table.grant(reader, 10)
    assert table.leases.release_reader(1) == 2
    assert sorted(table.unpinned) == [1, 3]
    assert table.leases.held() == (1, 10)


def test_bytes_are_bounded_for_one_reader_and_for_all(table: Table) -> None:
    assert table.leases.room(1) == MOST // 2
    assert table.grant(1, MOST // 2)
    assert table.leases.room(1) == 0
    assert table.grant(1, 1) is None
    assert table.grant(2, MOST // 2)
    assert table.leases.room(3) == 0
    assert table.grant(3, 1) is None
    table.leases.release_reader(1)
    assert table.grant(3, 1)


def test_the_number_of_leases_of_a_reader_is_bounded(table: Table) -> None:
    for _ in range(MAX_LEASES_A_READER):
        assert table.grant(1, 1)
    assert table.leases.room(1) == 0
    assert table.leases.room(2) > 0


@given(st.floats(0.02, 600), st.floats(0, 5), st.floats(0, 5), st.floats(0.97, 1.03), st.floats(-1e6, 1e6))
def test_the_readers_lease_is_over_before_the_owners(
    seconds: float, there: float, back: float, drift: float, owner_clock: float
) -> None:
    """Whatever the network took each way, wherever the clocks stand, and if they run up to 3 % apart."""
    asked = time.monotonic()
    granted = asked + there  # true time
    owner_ends = granted + seconds / drift  # the owner's clock runs ``drift`` times as fast as the reader's
    held = HeldLease.counted(1, asked, seconds)
    assert held.ends <= owner_ends + 1e-6
    if granted + back >= owner_ends:
        assert held.ends <= granted + back
