"""What came from another host is sealed only if all of it is what its owner stored, whatever happens meanwhile."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from kvplug import KvStore
from kvplug.errors import BufferError, Code
from kvplug.remote.pool_blocks import PoolExchange
from kvplug.shm import pool as shm_pool
from kvplug.shm.local import L_THREAD
from tests.inside import pool_of
from tests.pool.children import check_nothing_left, die_at, put, settle
from tests.rdma.hosts import Host, checksums, keys

MakeHost = Callable[..., Host]
I64 = npt.NDArray[np.int64]
PARTS = (3000, 5000, 77)
N = 6
TURN_S = 10.0
OF = keys(N, 9)


def arrive(store: KvStore) -> tuple[I64, I64, I64, I64, I64]:
    """Slots whose parts are written, and what :meth:`PoolExchange.complete` takes."""
    b = store.reserve_batch(OF, PARTS)
    assert not b.codes.any()
    offsets = b.offsets[:, None] + np.array(store.part_offsets(PARTS))[None, :]
    nbytes = np.broadcast_to(np.array(PARTS, np.int64), offsets.shape)
    rng = np.random.default_rng(5)
    for at, n in zip(offsets.ravel(), nbytes.ravel(), strict=True):
        store.mapping[at : at + n] = rng.integers(0, 256, n, np.uint8)
    sums = checksums(store, offsets.ravel(), nbytes.ravel()).reshape(offsets.shape)
    return b.slots, b.gens, offsets, nbytes, sums


def test_all_parts_are_recorded_and_the_blocks_sealed(make_host: MakeHost) -> None:
    host = make_host()
    slots, gens, offsets, nbytes, sums = arrive(host.store)
    assert host.exchange.complete(slots, gens, offsets, nbytes, sums).tolist() == [Code.OK] * N
    pinned = host.exchange.pin(OF, prefix=False)
    assert (pinned.part_sums == sums.ravel()).all()
    host.exchange.unpin(pinned.slots)
    host.store.check_integrity(deep=True)
    again = host.exchange.complete(slots, gens, offsets, nbytes, sums)
    assert again.tolist() == [Code.STALE] * N, "sealed is sealed"


@pytest.mark.parametrize("part", range(len(PARTS)))
def test_one_wrong_byte_in_any_part_keeps_that_block_out_and_no_other(make_host: MakeHost, part: int) -> None:
    host = make_host()
    slots, gens, offsets, nbytes, sums = arrive(host.store)
    at = int(offsets[2, part] + nbytes[2, part] - 1)
    host.store.mapping[at] ^= 1
    codes = host.exchange.complete(slots, gens, offsets, nbytes, sums)
    assert codes.tolist() == [Code.CORRUPT if i == 2 else Code.OK for i in range(N)]
    assert host.store.exists(OF).tolist() == [i != 2 for i in range(N)]
    host.store.mapping[at] ^= 1
    one = [array[2:3] for array in (slots, gens, offsets, nbytes, sums)]
    assert host.exchange.complete(*one).tolist() == [Code.OK], "it is still being written"
    host.store.check_integrity(deep=True)


def test_slots_of_others_and_blocks_of_other_parts_are_left_alone(make_host: MakeHost) -> None:
    host = make_host()
    slots, gens, offsets, nbytes, sums = arrive(host.store)
    wrong = slots.copy()
    wrong[:3] = -1, 1 << 40, slots[1]
    older = gens.copy()
    older[2:] -= 1
    codes = host.exchange.complete(wrong, older, offsets, nbytes, sums)
    assert codes.tolist() == [Code.STALE] * N
    assert host.exchange.complete(slots, gens, offsets[:, :2], nbytes[:, :2], sums[:, :2]).tolist() == [Code.STALE] * N
    for fewer in ((slots[1:], gens[1:], offsets, nbytes, sums), (slots, gens, offsets, nbytes[:, :2], sums)):
        with pytest.raises(BufferError):
            host.exchange.complete(*fewer)
    assert not host.store.exists(OF).any()
    assert host.exchange.complete(slots, gens, offsets, nbytes, sums).tolist() == [Code.OK] * N


def test_while_the_lock_is_held_what_is_right_is_queued_and_what_is_wrong_is_said(make_host: MakeHost) -> None:
    host = make_host(lock_timeout_s=0.1)
    arrived = arrive(host.store)
    theirs = keys(2, 10)
    with die_at(host.store, "locked", lambda own: (put(own, theirs, 8192), own.close()), sig=signal.SIGSTOP) as held:
        host.store.mapping[int(arrived[2][0, 0])] ^= 1
        assert host.exchange.complete(*arrived).tolist() == [Code.CORRUPT] + [Code.TIMEOUT] * (N - 1)
        assert not host.store.exists(OF).any()
        held.signal(signal.SIGCONT)
        assert held.wait() == 0
    pool_of(host.store).maintain()
    assert host.store.exists(OF).tolist() == [False] + [True] * (N - 1)
    host.store.check_integrity(deep=True)


@pytest.mark.parametrize(("point", "sealed"), [("part_recorded", 0), ("part_done", 3), ("sealed_word", 3)])
def test_a_reader_that_dies_while_it_seals_leaves_whole_blocks_or_none(
    make_host: MakeHost, point: str, sealed: int
) -> None:
    host = make_host()
    die_at(host.store, point, lambda own: PoolExchange(own).complete(*arrive(own)), skip=2)
    settle(host.store)
    assert host.store.exists(OF).tolist() == [i < sealed for i in range(N)]
    check_nothing_left(host.store)


def _is_free(host: Host) -> bool:
    """Whether a thread of this process can enter a section: upkeep is in one for moments."""
    deadline = time.monotonic() + TURN_S
    while int(pool_of(host.store).L[L_THREAD]) and time.monotonic() < deadline:
        time.sleep(0.001)
    return int(pool_of(host.store).L[L_THREAD]) == 0


def test_nobody_waits_for_the_checking(make_host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's scheduler uses the same store: while bytes are checked, the process's turn at the pool is free."""
    host = make_host()
    free: list[bool] = []
    plain = shm_pool.check_parts

    def watched(*args: object) -> None:
        other = threading.Thread(target=lambda: free.append(_is_free(host)))
        other.start()
        other.join()
        plain(*args)

    monkeypatch.setattr(shm_pool, "check_parts", watched)
    assert host.exchange.complete(*arrive(host.store)).tolist() == [Code.OK] * N
    assert free == [True]
