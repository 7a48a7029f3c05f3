"""Faults of the verbs, in one guest or between two: right bytes or a miss, noticed within two seconds, and it heals.

The other end is real, and what breaks is really broken: keys, registrations, queue pairs, leases, memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from kvplug.errors import Code
from kvplug.rdma.control.leases import HeldLease
from kvplug.rdma.verbs.binding import QueuePair
from tests.rdma.hosts import Host
from tests.rdma_lab.checks.stage import NOTICED_S, SEED, Stage, same
from tests.rdma_lab.far import Far

pytestmark = pytest.mark.verbs


@pytest.fixture
def stage(make_host: Callable[..., Host], far: Far, settings: dict[str, Any]) -> Stage:
    return Stage(make_host, far, settings)


def remotes(stage: Stage) -> Any:
    """What the reader knows of the owner's memory."""
    (remote,) = stage.verbs._remotes.values()
    return remote


def test_a_key_of_the_memory_that_is_wrong(stage: Stage) -> None:
    def spoil() -> None:
        known = remotes(stage)._keys
        assert known
        for region in known:
            known[region] ^= 0x55

    stage.before = stage.fault(spoil)
    came, codes = stage.fetch_and_check()
    assert (came, same(codes, Code.TIMEOUT)) == (0, True)
    stage.works_again()


def test_memory_that_its_owner_has_deregistered(stage: Stage) -> None:
    stage.before = stage.fault(lambda: stage.far.break_agent("deregister"))
    came, _ = stage.fetch_and_check()
    assert came == 0
    assert stage.far.break_agent("register") > 0
    stage.works_again()


def test_the_third_read_lies_outside_the_owners_memory(stage: Stage) -> None:
    """Past the reader's own check of what it was told."""
    remote = remotes(stage)
    real = remote.nbytes
    past = 1 << 30  # of another region, which there is not
    remote.nbytes = 2 * past
    remote._keys[past // remote.region_bytes] = next(iter(remote._keys.values()))
    reading = stage.verbs.read
    seen: list[int] = []

    def read(wanted: Any, deadline: float, arrived: Any) -> Any:
        if stage.fault_at == 0:
            stage.fault_at = time.monotonic()
            wanted.sources[2] = past

        def noted(which: Any) -> None:
            seen.extend(which.tolist())
            arrived(which)

        return reading(wanted, deadline, noted)

    stage.verbs.read = read  # type: ignore[method-assign]
    came, _ = stage.fetch_and_check()
    assert came == len(seen) <= 2
    assert set(seen) <= {0, 1}, "what comes behind a READ that failed does not come"
    remote.nbytes = real
    stage.works_again()


@pytest.mark.parametrize("how", ["fail_queues", "reset_queues"])
def test_the_owners_queue_pair_is(stage: Stage, how: str) -> None:
    def break_them() -> None:
        assert stage.far.break_agent(how) >= 1

    stage.before = stage.fault(break_them)
    came, codes = stage.fetch_and_check()
    assert (came, same(codes, Code.TIMEOUT)) == (0, True)
    stage.works_again()
    assert stage.far.break_agent("queues") <= 2, "what was broken is replaced, not added to"


def test_a_stopped_owner_is_read_from_but_not_asked(stage: Stage) -> None:
    """A READ is one-sided: what was leased comes, whatever its owner does. The next question is not answered."""
    stage.before = stage.fault(lambda: stage.far.signal_agent("SIGSTOP"))
    codes = stage.fetch()
    assert stage.check(codes) == stage.n
    assert stage.peer.counters()["not_released"] == 1
    began = time.monotonic()
    assert same(stage.peer.fetch(stage.other_keys(4)), Code.TIMEOUT)
    assert time.monotonic() - began < NOTICED_S
    stage.far.signal_agent("SIGCONT")
    stage.reader.store.remove(stage.keys)
    stage.works_again()


def test_bytes_that_do_not_fit_their_checksum(stage: Stage) -> None:
    assert stage.far.scribble(stage.n, SEED, 3, 5) == 2
    codes = stage.fetch()
    assert stage.check(codes) == stage.n - 2
    assert same(codes[3:5], Code.CORRUPT)
    assert stage.far.scribble(stage.n, SEED, 3, 5) == 2  # the same again makes it right
    stage.works_again()


def test_a_lease_that_runs_out_while_completions_are_late(
    make_host: Callable[..., Host], far: Far, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes have landed and are right; but nobody here can know that by then."""
    stage = Stage(make_host, far, settings, lease_s=2.0)
    pair = held_pair(stage)
    polling = pair.poll

    def poll(self: QueuePair) -> Any:
        done = polling(self)
        if done and not stage.fault_at:
            time.sleep(max(0.0, stage.lease.ends - time.monotonic() + 0.05))
            stage.fault_at = stage.lease.ends
        return done

    monkeypatch.setattr(pair, "poll", poll)
    came, _ = stage.fetch_and_check()
    assert came == 0
    assert stage.peer.counters()["leases_run_out"] == stage.n
    monkeypatch.undo()
    stage.works_again()


@pytest.mark.parametrize("believes", [False, True], ids=["clock", "checksum"])
def test_a_slot_that_is_reused_before_its_read_arrives(
    make_host: Callable[..., Host], far: Far, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, believes: bool
) -> None:
    """The owner's lease is over, its slots hold other blocks: the reader's clock says so, or the checksums do."""
    stage = Stage(make_host, far, settings, lease_s=0.5)

    def reuse() -> None:
        if believes:
            monkeypatch.setattr(HeldLease, "holds", lambda self: True)
        time.sleep(1.0)
        assert far.settled()["pinned"] == 0
        assert far.remove(stage.n, SEED) == stage.n
        far.put(stage.n, SEED + 2, stage.nbytes)

    stage.before = stage.fault(reuse)
    came, codes = stage.fetch_and_check(within_s=NOTICED_S + 10)  # the owner takes its time to do this
    assert came == 0
    assert same(codes, Code.CORRUPT if believes else Code.TIMEOUT), codes.tolist()
    monkeypatch.undo()
    far.remove(stage.n, SEED + 2)
    far.put(stage.n, SEED, stage.nbytes)
    stage.works_again()


def test_a_queue_pair_that_cannot_be_destroyed_keeps_its_slots_out_of_use(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what such a device still writes, so nobody gets the slots."""
    from kvplug.errors import VerbsError

    pair = held_pair(stage)

    closing = pair.close
    kept: list[QueuePair] = []

    def refuse(self: QueuePair) -> None:
        kept.append(self)
        raise VerbsError("told to")

    def spoil() -> None:
        known = remotes(stage)._keys
        for region in known:
            known[region] ^= 0x55

    monkeypatch.setattr(pair, "close", refuse)
    stage.before = stage.fault(spoil)
    codes = stage.fetch()
    assert same(codes, Code.TIMEOUT)
    stats = stage.reader.store.stats
    assert stats().quarantined_slots + stats().writing_slots == stage.n
    time.sleep(3 * stage.reader.config.quarantine_grace_s)
    assert stats().quarantined_slots + stats().writing_slots == stage.n
    monkeypatch.undo()
    for queue in set(kept):
        closing(queue)


def held_pair(stage: Stage) -> type[QueuePair]:
    """The class of the reader's queue pairs: that of the binding in use."""
    (lane,) = stage.verbs._idle
    return type(lane.queue)
