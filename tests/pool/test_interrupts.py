"""An exception that a signal handler raises inside of a call takes nothing with it: no lock, no pin, no slot."""

from __future__ import annotations

import gc
import random
import signal
from collections.abc import Callable

import numpy as np

from kvplug import KvStore
from kvplug.errors import Code
from tests.inside import pool_of
from tests.stress import interrupts

MakeStore = Callable[..., KvStore]


def test_exceptions_at_random_instants_leave_nothing_behind(pool_name: str) -> None:
    seed = random.SystemRandom().getrandbits(31)
    tally = interrupts.at_random(pool_name, 100, seed)
    assert (tally.notes, tally.failed, tally.leaked) == ([], 0, 0), f"seed {seed}"
    assert tally.interrupts >= 100


def test_exceptions_at_any_instruction_leave_nothing_behind(pool_name: str) -> None:
    stride = 150
    offset = random.SystemRandom().randrange(stride)
    tally = interrupts.at_every_instruction(pool_name, stride=stride, offset=offset)
    assert (tally.notes, tally.failed, tally.leaked) == ([], 0, 0), f"offset {offset}"
    assert tally.interrupts >= 50


def test_a_batch_that_nobody_read_is_given_back_and_one_that_was_read_is_the_callers(make_store: MakeStore) -> None:
    store = make_store()
    keys = interrupts.keys(4, 1)
    store.put(keys, interrupts.blocks(keys))
    assert (store.pin_batch(keys).codes == Code.OK).all()
    assert (store.reserve_batch(interrupts.keys(2, 2), [100]).codes == Code.OK).all()
    pool_of(store).maintain()
    assert (store.stats().pinned_slots, store.stats().writing_slots) == (0, 0)
    pinned = store.pin_batch(keys).slots.copy()
    reserved = store.reserve_batch(interrupts.keys(2, 2), [100])
    slots, gens = reserved.slots.copy(), reserved.gens.copy()
    del reserved
    pool_of(store).maintain()
    assert (store.stats().pinned_slots, store.stats().writing_slots) == (4, 2)
    store.unpin(pinned)
    assert (store.abort_batch(slots, gens, True) == Code.OK).all()
    assert (store.stats().pinned_slots, store.stats().writing_slots) == (0, 0)


def test_a_view_keeps_its_block_when_its_store_was_dropped(make_store: MakeStore) -> None:
    onlooker = make_store()
    keys = interrupts.keys(1, 1)
    onlooker.put(keys, interrupts.blocks(keys))
    store = KvStore(config=onlooker.config)
    held = store.pin(keys)
    view = held[0]
    del held, store
    gc.collect()
    for _ in range(3):
        pool_of(onlooker).maintain()
        assert onlooker.remove(keys).tolist() == [Code.PINNED]
    assert view is not None
    assert bytes(view) == interrupts.blocks(keys).tobytes()


def test_memory_is_reserved_under_a_profilers_timer(make_store: MakeStore) -> None:
    """Each signal ends the kernel's call and undoes what it has done: a whole slab at a time would never be there."""
    store = make_store("300mib", slab="128mib", prefault=False)
    struck = []
    before = signal.signal(signal.SIGALRM, lambda *_: struck.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    try:
        assert pool_of(store).grow()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert store.stats().reserved_slabs == 2


def test_what_was_registered_is_whole_whenever_it_is_interrupted(make_store: MakeStore) -> None:
    store = make_store()
    memory = np.zeros(4096, np.uint8)
    n = 1
    while interrupts.struck_at(lambda: store.register_buffer(memory.ctypes.data, 4096), n):
        store.register_buffer(memory.ctypes.data, 4096)
        store._registered.check(np.array([memory.ctypes.data]), np.array([4096]))
        store.unregister_buffer(memory.ctypes.data)
        n += 1
    assert n > 10
