"""What happens to READs that are under way, between two guests: each bound counted from the instant of the fault."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvplug.errors import Code
from kvplug.rdma.verbs import binding, reads
from kvplug.rdma.verbs.binding import QueuePair
from tests.pool.children import put
from tests.rdma.hosts import Host, keys, until
from tests.rdma_lab.checks.stage import KIB, NOTICED_S, SEED, Stage, same
from tests.rdma_lab.far import Far
from tests.rdma_lab.owner import netem

pytestmark = [pytest.mark.verbs, pytest.mark.pair]
LANDS_LATE_S = 4.0
A_READ_PACKETS = 64  # 64 KiB at RoCE's 1024 bytes a packet


@pytest.fixture(autouse=True)
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated link is a thousand times slower than a real one: READs in proportion, or none ends in a second."""
    monkeypatch.setattr(reads, "READ_BYTES", 64 * KIB)
    monkeypatch.setattr(reads, "SIGNAL_BYTES", 64 * KIB)


@pytest.fixture(autouse=True)
def _the_wire_is_mended(far: Far) -> Iterator[None]:
    yield
    netem("")
    far.wire("")


@pytest.fixture
def large(make_host: Callable[..., Host], far: Far, settings: dict[str, Any]) -> Stage:
    """A read that takes its time."""
    return Stage(make_host, far, settings, n=128)


def test_the_owner_is_killed_with_reads_in_flight(large: Stage) -> None:
    large.on_arrival = large.fault(lambda: large.far.signal_agent("SIGKILL"))
    came, _ = large.fetch_and_check()
    assert came < large.n, "it was over before its owner was gone"
    assert large.far.settled() == {"pinned": 0, "writing": 0, "quarantined": 0}
    assert large.far.start_agent() == large.peer.address
    large.works_again()


def test_the_link_is_cut_with_reads_in_flight(large: Stage) -> None:
    def cut() -> None:
        netem("loss 100%")  # takes effect as it ends, and takes its time to begin
        large.fault_at = time.monotonic()

    large.far.wire("rate 20mbit")  # seconds for all of it: longer than it takes to cut
    large.on_arrival = cut
    came, _ = large.fetch_and_check()
    assert came < large.n
    netem("")
    large.works_again()


def test_the_owner_is_stopped_with_reads_in_flight(large: Stage) -> None:
    """Those that are under way come all the same; what needs asking for does not, and is not waited for."""
    large.on_arrival = large.fault(lambda: large.far.signal_agent("SIGSTOP"))
    codes = large.fetch()
    assert time.monotonic() - max(large.fault_at, large.last_arrival) < NOTICED_S
    assert large.check(codes) > 0
    began = time.monotonic()
    assert same(large.peer.fetch(large.other_keys(4)), Code.TIMEOUT)
    assert time.monotonic() - began < NOTICED_S
    large.far.signal_agent("SIGCONT")
    large.works_again()


def test_slots_that_are_written_over_with_reads_in_flight(large: Stage) -> None:
    """As if they had been reused: what came before is right, what came after is not taken."""
    large.on_arrival = large.fault(lambda: large.far.scribble(large.n, SEED, 0, large.n))
    came, codes = large.fetch_and_check(within_s=NOTICED_S + 10)  # nothing is broken but the bytes
    assert 0 < came < large.n
    assert (codes == Code.CORRUPT).any()
    large.far.scribble(large.n, SEED, 0, large.n)
    large.works_again()


def test_one_packet_in_ten_is_lost(make_host: Callable[..., Host], far: Far, settings: dict[str, Any]) -> None:
    stage = Stage(make_host, far, settings)
    far.wire("loss 10%")
    netem("loss 10%")
    for _ in range(3):
        began = time.monotonic()
        codes = stage.fetch(5.0)
        assert time.monotonic() - began < 5.0 + NOTICED_S
        print(f"{stage.check(codes)} of {stage.n} blocks came in {time.monotonic() - began:.1f} s")
    netem("")
    for attempt in range(20):  # the request to fix the far end gets through at last
        try:
            far.wire("")
            break
        except OSError:
            assert attempt < 19
    stage.works_again()


def packets() -> int:
    """That this guest has received, for whatever queue pair."""
    return int(Path(f"/sys/class/net/{os.environ['LAB_DEVICE']}/statistics/rx_packets").read_text())


def late_read(stage: Stage) -> None:
    """A read that is given up while its READs are on their way; then all slots go to others; then the bytes arrive."""
    others = keys(1 << 10, SEED + 3)

    def delay() -> None:
        stage.far.wire(f"delay {LANDS_LATE_S:g}s")  # its answer is the first that is late
        stage.fault_at = time.monotonic()

    stage.before = delay
    codes = stage.fetch()
    assert time.monotonic() - stage.fault_at < NOTICED_S + stage.reader.config.peer_timeout_s
    assert same(codes, Code.TIMEOUT)
    before = packets()
    put(stage.reader.store, others, stage.nbytes)  # whatever slot may be had is had
    until(lambda: packets() >= before + A_READ_PACKETS, 60)  # of those that were asked for before it was given up
    now = -1
    while now != packets():  # until no more come
        now = packets()
        time.sleep(1.0)
    assert stage.reader.holds(others, stage.nbytes) > 0


@pytest.fixture
def patient(
    make_host: Callable[..., Host], far: Far, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Stage:
    """Queue pairs that don't give up by themselves, so that only who destroys them does."""
    monkeypatch.setattr(binding, "ACK_TIMEOUT", 22)  # 17 s
    return Stage(make_host, far, settings | {"size": "16mib", "lease_s": 60.0})


def test_a_read_that_lands_late_reaches_no_slot_that_someone_may_seal(patient: Stage) -> None:
    late_read(patient)
    patient.far.wire("")
    patient.works_again()


def test_it_would_be_seen_if_it_did(patient: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the destruction of the queue pair its late bytes do land in other blocks."""
    (lane,) = patient.verbs._idle
    kept: list[QueuePair] = []
    closing = type(lane.queue).close
    monkeypatch.setattr(type(lane.queue), "close", lambda self: kept.append(self))
    with pytest.raises(AssertionError, match="a hit gave other bytes"):
        late_read(patient)
    monkeypatch.undo()
    for queue in kept:
        closing(queue)
