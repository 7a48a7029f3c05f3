"""Fetching from a peer: the block is here with its bytes, or it is a miss, and the owner holds nothing afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from kvplug.errors import Code
from kvplug.rdma.reader.remote import Peer
from tests.rdma.hosts import BLOCK, Child, Fault, Host, Proxy, blocks, checksums, keys, put, until
from tests.stopwatch import Stopwatch

MakeHost = Callable[..., Host]


@pytest.fixture
def pair(make_host: MakeHost) -> tuple[Host, Host, Peer]:
    owner, reader = make_host(), make_host()
    return owner, reader, reader.peer(owner.agent().address)


def released(owner: Host) -> None:
    """Nothing is pinned, in writing or in quarantine."""
    until(lambda: owner.store.stats().pinned_slots == 0)
    owner.store.check_integrity(deep=True)


def test_what_the_peer_has_is_here_afterwards(pair: tuple[Host, Host, Peer]) -> None:
    owner, reader, peer = pair
    of = keys(60, 1)
    put(owner.store, of[:40], BLOCK)
    put(reader.store, of[:5], BLOCK)
    codes = peer.fetch(of)
    assert codes.tolist() == [Code.EXISTS] * 5 + [Code.OK] * 35 + [Code.MISSING] * 20
    assert reader.holds(of) == 40
    assert (peer.fetch(of)[:40] == Code.EXISTS).all()
    released(owner)
    released(reader)
    assert reader.store.stats().writing_slots == 0


def test_the_last_bytes_of_a_read_are_not_waited_for(
    make_host: MakeHost, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread sleeps until much has come: never for more than there is, which would take until the stall's time."""
    monkeypatch.setattr("kvplug.rdma.data.tcp.PIECE_BLOCKS", 6)
    monkeypatch.setattr("kvplug.rdma.data.tcp.WAKE_BYTES", 3 * BLOCK)
    owner = make_host(agent_advertise=proxy.address)
    reader = make_host(peer_timeout_s=60.0, peer_connections=1)
    of = keys(13, 3)
    put(owner.store, of, BLOCK)
    proxy.upstream = owner.agent().address
    proxy.fault = Fault("delay", 1, to_agent=False, at=11 * BLOCK)  # the rest comes once the thread sleeps
    codes = reader.peer(proxy.address).fetch(of, timeout_s=12.0)
    assert proxy.fault.happened.is_set()
    assert (codes == Code.OK).all()


def test_a_prefix_ends_at_the_first_key_that_the_peer_has_not(pair: tuple[Host, Host, Peer]) -> None:
    owner, reader, peer = pair
    of = keys(20, 2)
    put(owner.store, np.delete(of, 7, axis=0), BLOCK)
    codes = peer.fetch(of, prefix=True)
    assert codes.tolist() == [Code.OK] * 7 + [Code.MISSING] * 13
    assert reader.holds(of) == 7


def test_a_prefix_in_turns_ends_at_its_hole_too(pair: tuple[Host, Host, Peer]) -> None:
    """Longer than leases may hold at once, a hole, and what is behind it."""
    owner, reader, peer = pair
    of = keys(200, 12)
    put(owner.store, np.delete(of, 150, axis=0), BLOCK)
    codes = peer.fetch(of, prefix=True)
    assert codes.tolist() == [Code.OK] * 150 + [Code.MISSING] * 50
    assert reader.holds(of) == 150


def test_siblings_stay_siblings(pair: tuple[Host, Host, Peer]) -> None:
    """Blocks that leave the pool together do so in the pool they were fetched into."""
    owner, reader, peer = pair
    one = keys(1, 13)
    of = np.repeat(one, 3, axis=0)
    of[:, 30] ^= np.arange(3, dtype=np.uint8)
    for index in range(3):
        b = owner.store.reserve_batch(of[index : index + 1], [BLOCK], siblings=(3, index))
        sums = checksums(owner.store, b.offsets, b.nbytes)
        assert owner.store.complete(b.slots, b.gens, 0, sums).tolist() == [Code.OK]
    assert (peer.fetch(of) == Code.OK).all()
    assert reader.store.remove(of[1:2]).tolist() == [Code.OK]
    assert not reader.store.exists(of).any()
    assert owner.store.exists(of).all()


def test_a_forked_childs_copy_fetches_nothing_and_disturbs_nobody(pair: tuple[Host, Host, Peer]) -> None:
    owner, _, peer = pair
    of = keys(8, 14)
    put(owner.store, of, BLOCK)
    assert (peer.fetch(of[:4]) == Code.OK).all()

    def child() -> None:
        assert (peer.fetch(of) == Code.TIMEOUT).all()
        peer.close()

    with Child(child) as forked:
        assert forked.wait() == 0
    assert (peer.fetch(of[4:]) == Code.OK).all()
    assert peer.stats().counters["readers"] == 1


def test_blocks_of_many_sizes_and_parts_in_one_fetch(pair: tuple[Host, Host, Peer]) -> None:
    owner, reader, peer = pair
    of, layouts = keys(30, 3), [(100,), (BLOCK,), (3000, 5000, 77), (9000, 64), (1, 1)]
    for i, layout in enumerate(layouts * 6):
        b = owner.store.reserve_batch(of[i : i + 1], layout)
        starts = owner.store.part_offsets(layout)
        for part, nbytes in enumerate(layout):
            at = int(b.offsets[0] + starts[part])
            owner.store.mapping[at : at + nbytes] = blocks(of[i : i + 1], -(-nbytes // 8) * 8)[0, :nbytes]
            sums = checksums(owner.store, np.array([at]), np.array([nbytes]))
            owner.store.complete(b.slots, b.gens, part, sums)
    assert (peer.fetch(of) == Code.OK).all()
    reader.store.check_integrity(deep=True)  # sizes, parts and checksums of every block
    ours, theirs = (host.exchange.pin(of, prefix=False) for host in (reader, owner))
    for name in ("nbytes", "part_counts", "part_nbytes", "part_sums", "siblings"):
        assert (getattr(ours, name) == getattr(theirs, name)).all(), name
    for host, pinned in ((reader, ours), (owner, theirs)):
        host.exchange.unpin(pinned.slots)


def test_more_than_leases_may_hold_comes_in_turns(pair: tuple[Host, Host, Peer]) -> None:
    """A quarter of the pool may be in leases, half of that one reader's; this is twice as much."""
    owner, reader, peer = pair
    of = keys(8 * (1 << 20) // BLOCK, 4)
    put(owner.store, of, BLOCK)
    assert (peer.fetch(of) == Code.OK).all()
    assert reader.holds(of) == len(of)
    released(owner)


def test_more_keys_than_one_lookup_takes(make_host: MakeHost) -> None:
    owner, reader = make_host(size="128mib", min_block=4096), make_host(size="128mib", min_block=4096)
    peer = reader.peer(owner.agent().address)
    of = keys(5000, 5)
    put(owner.store, of, 4096, batch=500)
    assert (peer.fetch(of) == Code.OK).all()
    assert reader.holds(of, 4096) == 5000


def test_who_asks_only_what_there_is_is_told_all_of_it_and_holds_nothing(make_host: MakeHost) -> None:
    """More than one look-up takes, and more than a lease may keep in place."""
    owner, reader = make_host(size="128mib", min_block=4096), make_host()
    agent = owner.agent()
    peer = reader.peer(agent.address)
    of = keys(5000, 15)
    put(owner.store, np.delete(of, [7, 4500], axis=0), 4096, batch=500)
    have = peer.holds(of, 10.0)
    assert have is not None
    assert np.flatnonzero(~have).tolist() == [7, 4500]
    assert agent.leases.held() == (0, 0)
    assert owner.store.stats().pinned_slots == 0
    agent.close()
    assert peer.holds(of, 1.0) is None


def test_a_key_asked_for_twice_is_fetched_once(pair: tuple[Host, Host, Peer]) -> None:
    owner, _, peer = pair
    of = keys(4, 6)
    put(owner.store, of, BLOCK)
    codes = peer.fetch(np.concatenate((of, of)))
    assert (codes == Code.OK).all()
    until(lambda: peer.stats().counters.get("bytes_sent") == 4 * BLOCK)


def test_a_reader_without_room_has_misses_and_keeps_nothing(make_host: MakeHost) -> None:
    owner, reader = make_host(), make_host(size="8mib")
    peer = reader.peer(owner.agent().address)
    of = keys(200, 7)
    put(owner.store, of, BLOCK)
    watch = Stopwatch()
    codes = peer.fetch(of)
    assert set(codes.tolist()) <= {Code.OK, Code.FULL, Code.BUDGET}
    assert watch.took_s() < 5
    assert reader.holds(of) > 0  # what came later may have evicted what came first
    assert reader.store.stats().writing_slots == 0
    released(owner)


def test_a_block_too_large_for_the_readers_pool_is_a_miss(make_host: MakeHost) -> None:
    owner, reader = make_host(slab="4mib"), make_host(slab="1mib")
    peer = reader.peer(owner.agent().address)
    of = keys(1, 8)
    put(owner.store, of, 2 << 20)
    assert (peer.fetch(of) == Code.FULL).all()


def test_many_threads_and_one_peer(pair: tuple[Host, Host, Peer]) -> None:
    owner, reader, peer = pair
    of = keys(64, 9)
    put(owner.store, of, BLOCK)
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda i=i: answers.extend(peer.fetch(np.roll(of, 8 * i, axis=0)).tolist()))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert set(answers) <= {Code.OK, Code.EXISTS, Code.IN_PROGRESS, Code.BUDGET}
    assert reader.holds(of) == 64
    released(owner)


def test_two_fetches_of_one_prefix_move_it_once(pair: tuple[Host, Host, Peer]) -> None:
    owner, reader, peer = pair
    of = keys(64, 10)
    put(owner.store, of, BLOCK)
    second = reader.peer(peer.address)
    thread = threading.Thread(target=second.fetch, args=(of,))
    thread.start()
    peer.fetch(of)
    thread.join(20)
    until(lambda: reader.holds(of) == 64)
    assert peer.stats().counters["bytes_sent"] <= 64 * BLOCK


def test_a_peer_that_is_not_there_costs_a_miss_and_little_time(make_host: MakeHost) -> None:
    reader = make_host(peer_timeout_s=1.0)
    peer = reader.peer("127.0.0.1:9")
    watch = Stopwatch()
    assert (peer.fetch(keys(4, 11)) == Code.TIMEOUT).all()
    assert watch.took_s() < 1.5
    for _ in range(5):
        peer.fetch(keys(4, 11))
    assert peer.is_down
    assert watch.took_s() < 3


def test_a_name_that_nobody_knows_costs_a_miss(make_host: MakeHost) -> None:
    peer = make_host(peer_timeout_s=1.0).peer("no-such-host.invalid:9410")
    watch = Stopwatch()
    assert (peer.fetch(keys(4, 11)) == Code.TIMEOUT).all()
    assert watch.took_s() < 2
