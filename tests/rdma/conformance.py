"""What every data path must do, whatever carries its bytes: subclass :class:`Conformance`, give it a ``wire``."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from kvplug.errors import PeerError, StoreClosedError
from kvplug.rdma.control.leases import HeldLease
from kvplug.rdma.control.protocol import Leased, LeasedBlocks, Lookup, check_leased
from kvplug.rdma.data.datapath import DataPath, Landing, Wanted
from kvplug.rdma.reader.remote import Peer
from tests.rdma.hosts import BLOCK, Host, blocks, keys, put
from tests.stopwatch import Stopwatch

N = 96


class Wire:
    """A reader with a path to an owner that has N blocks."""

    within_s = 5.0
    """What a lease lasts, and any read is over within."""

    def __init__(self, owner: Host, reader: Host, peer: Peer, path: DataPath) -> None:
        self.owner, self.reader, self.peer, self.path = owner, reader, peer, path
        self.keys = keys(N, 31)
        assert (put(owner.store, self.keys, BLOCK) == 0).all()

    def lease(self, of: Any = None, seconds: float | None = None) -> tuple[HeldLease, LeasedBlocks]:
        """A lease on these keys."""
        of = self.keys if of is None else of
        asked = time.monotonic()
        answer = self.peer.link.ask(Lookup(of.tobytes(), seconds or self.within_s), Leased, asked + self.within_s)
        return HeldLease.counted(answer.lease, asked, answer.seconds), check_leased(answer, len(of))

    def slots(self, leased: LeasedBlocks) -> Any:
        """Slots of the reader's for what was leased."""
        return self.reader.exchange.reserve(self.keys[leased.codes == 0], np.array([BLOCK]), (1, 0))

    def wanted(self, lease: HeldLease, leased: LeasedBlocks, targets: Any) -> Wanted:
        """All of it."""
        return Wanted(lease, np.arange(len(leased.offsets)), leased.offsets, leased.nbytes, targets)


class Conformance:
    """One promise each. ``wire`` is a fixture of the subclass's."""

    def test_brings_every_byte_and_reports_each_block_once(self, wire: Wire) -> None:
        lease, leased = wire.lease()
        slots = wire.slots(leased)
        seen: list[Any] = []
        mutex = threading.Lock()

        def arrived(which: Any) -> None:
            with mutex:
                seen.extend(which.tolist())
                for i in which.tolist():  # the bytes are there when it is said, not later
                    at = int(slots.offsets[i])
                    got = wire.reader.store.mapping[at : at + BLOCK]
                    assert (got == blocks(wire.keys[i : i + 1], BLOCK)[0]).all()

        landing = wire.path.read(wire.wanted(lease, leased, slots.offsets), time.monotonic() + wire.within_s, arrived)
        assert landing.error is None
        assert landing.is_settled
        assert sorted(seen) == list(range(N))

    def test_writes_nothing_beside_its_targets(self, wire: Wire) -> None:
        lease, leased = wire.lease()
        slots = wire.slots(leased)
        wire.reader.store.mapping[int(slots.offsets[1]) : int(slots.offsets[1]) + BLOCK] = 0xA5
        some = np.delete(np.arange(N), 1)
        whole = wire.wanted(lease, leased, slots.offsets)
        wanted = Wanted(lease, whole.index[some], whole.sources[some], whole.nbytes[some], whole.targets[some])
        assert wire.path.read(wanted, time.monotonic() + wire.within_s, lambda _: None).error is None
        assert (wire.reader.store.mapping[int(slots.offsets[1]) : int(slots.offsets[1]) + BLOCK] == 0xA5).all()

    def test_reads_in_any_order_and_the_same_block_twice(self, wire: Wire) -> None:
        lease, leased = wire.lease()
        slots = wire.slots(leased)
        order = np.random.default_rng(5).integers(0, N, N)
        targets = slots.offsets
        wanted = Wanted(lease, order, leased.offsets[order], leased.nbytes[order], targets)
        assert wire.path.read(wanted, time.monotonic() + wire.within_s, lambda _: None).error is None
        right = blocks(wire.keys, BLOCK)
        for i, j in enumerate(order.tolist()):
            assert (wire.reader.store.mapping[int(targets[i]) : int(targets[i]) + BLOCK] == right[j]).all()

    def test_an_empty_read_is_over_at_once(self, wire: Wire) -> None:
        lease, leased = wire.lease()
        none = np.empty(0, np.int64)
        landing = wire.path.read(
            Wanted(lease, none, none, none, none), time.monotonic() + wire.within_s, lambda _: None
        )
        assert landing.error is None
        assert landing.is_settled
        assert len(leased.offsets) == N

    def test_a_lease_that_has_run_out_reads_nothing(self, wire: Wire) -> None:
        lease, leased = wire.lease()
        slots = wire.slots(leased)
        seen: list[Any] = []
        over = HeldLease(lease.id, time.monotonic() - 0.001)
        landing = wire.path.read(
            wire.wanted(over, leased, slots.offsets), time.monotonic() + wire.within_s, seen.append
        )
        assert landing.error is not None
        assert landing.wait_settled(2)
        assert not seen

    def test_the_next_read_works_after_one_that_failed(self, wire: Wire) -> None:
        lease, leased = wire.lease()
        slots = wire.slots(leased)
        whole = wire.wanted(lease, leased, slots.offsets)
        beyond = Wanted(lease, whole.index + N, whole.sources + (1 << 40), whole.nbytes, whole.targets)
        assert wire.path.read(beyond, time.monotonic() + wire.within_s, lambda _: None).error is not None
        lease, leased = wire.lease()  # the agent may have hung up on who asked for that
        assert (
            wire.path.read(
                wire.wanted(lease, leased, slots.offsets), time.monotonic() + wire.within_s, lambda _: None
            ).error
            is None
        )

    def test_a_deadline_that_has_passed_ends_it_at_once(self, wire: Wire) -> None:
        lease, leased = wire.lease()
        slots = wire.slots(leased)
        began = time.monotonic()
        watch = Stopwatch()
        landing = wire.path.read(wire.wanted(lease, leased, slots.offsets), began - 1, lambda _: None)
        assert landing.error is not None
        assert landing.wait_settled(2)
        assert watch.took_s() < 2

    def test_reads_from_many_threads_at_once(self, wire: Wire) -> None:
        ends: list[Landing] = []
        cuts = np.split(np.arange(N), 6)
        lease, leased = wire.lease()
        slots = wire.slots(leased)
        whole = wire.wanted(lease, leased, slots.offsets)

        def read(part: Any) -> None:
            wanted = Wanted(lease, whole.index[part], whole.sources[part], whole.nbytes[part], whole.targets[part])
            ends.append(wire.path.read(wanted, time.monotonic() + 2 * wire.within_s, lambda _: None))

        threads = [threading.Thread(target=read, args=(part,)) for part in cuts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * wire.within_s)
        assert [landing.error for landing in ends] == [None] * len(cuts)
        right = blocks(wire.keys, BLOCK)
        for i, at in enumerate(slots.offsets.tolist()):
            assert (wire.reader.store.mapping[at : at + BLOCK] == right[i]).all()

    def test_an_error_of_the_pool_in_arrived_reaches_the_caller(self, wire: Wire) -> None:
        lease, leased = wire.lease()
        slots = wire.slots(leased)

        def arrived(_: Any) -> None:
            raise StoreClosedError("told to")

        with pytest.raises(StoreClosedError, match="told to"):
            wire.path.read(wire.wanted(lease, leased, slots.offsets), time.monotonic() + wire.within_s, arrived)

    def test_any_other_error_in_arrived_is_the_landings_and_settled(self, wire: Wire) -> None:
        lease, leased = wire.lease()
        slots = wire.slots(leased)

        def arrived(_: Any) -> None:
            raise KeyError("told to")

        landing = wire.path.read(wire.wanted(lease, leased, slots.offsets), time.monotonic() + wire.within_s, arrived)
        assert isinstance(landing.error, PeerError)
        assert "told to" in str(landing.error)
        assert landing.wait_settled(wire.within_s)

    def test_closed_it_reads_nothing_and_says_so(self, wire: Wire) -> None:
        lease, leased = wire.lease()
        slots = wire.slots(leased)
        wire.path.close()
        wire.path.close()
        landing = wire.path.read(
            wire.wanted(lease, leased, slots.offsets), time.monotonic() + wire.within_s, lambda _: None
        )
        assert landing.error is not None
        assert landing.is_settled
