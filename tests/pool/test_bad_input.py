"""Wrong input is a typed error at the call, and nothing was changed: no figure, no word of any table."""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kvplug import errors
from kvplug.errors import Code
from kvplug.shm import layout as lay
from kvplug.store import KvStore
from tests.inside import pool_of
from tests.stress import calls

BLOCK = 4000
KEYS = np.arange(3 * 32, dtype=np.uint8).reshape(3, 32)


def digest(store: KvStore) -> tuple[Any, str]:
    """All figures, and a hash of header, slabs, classes, rows, parts, index and events."""
    return store.stats(), hashlib.sha256(pool_of(store).T.tobytes()).hexdigest()


@pytest.fixture
def store(make_store: Callable[..., KvStore]) -> Iterator[KvStore]:
    """A store with one block, whose background thread is stopped so that only the calls can change anything."""
    made = make_store(size="8mib", prefault=False)
    made.put(KEYS[:1], np.ones((1, BLOCK), np.uint8))
    pool_of(made)._maintenance.stop()
    yield made
    made.check_integrity()


def refused(
    store: KvStore,
    error: type[Exception] | tuple[type[Exception], ...],
    call: Callable[[], Any],
    match: str | None = None,
) -> None:
    before = digest(store)
    with pytest.raises(error, match=match):
        call()
    assert digest(store) == before


def test_the_digest_sees_a_change(store: KvStore) -> None:
    """The other tests here mean something only if this holds."""
    before = digest(store)
    store.touch(KEYS[:1])
    assert digest(store) != before


WRONG_KEYS: dict[str, Any] = {
    "31 bytes": [b"k" * 31],
    "33 bytes": [b"k" * 32, b"k" * 33],
    "empty bytes": [b""],
    "str": ["k" * 32],
    "int": [7],
    "None": None,
    "one key, not a list": b"k" * 32,
    "array of 31 columns": np.zeros((2, 31), np.uint8),
    "array of one dimension": np.zeros(32, np.uint8),
    "array of three dimensions": np.zeros((1, 1, 32), np.uint8),
    "int64 words": np.zeros((2, 4), np.int64),
    "int8": np.zeros((2, 32), np.int8),
}


@pytest.mark.parametrize("keys", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_wrong_keys_are_refused_by_every_call(store: KvStore, keys: Any) -> None:
    buffers = np.zeros((2, BLOCK), np.uint8)
    for call in (
        lambda: store.put(keys, buffers),
        lambda: store.get_into(keys, buffers),
        lambda: store.exists(keys),
        lambda: store.match_prefix(keys),
        lambda: store.touch(keys),
        lambda: store.remove(keys),
        lambda: store.pin(keys),
        lambda: store.pin_batch(keys, prefix=True),
        lambda: store.reserve(keys, 100),
        lambda: store.reserve_batch(keys, [100]),
    ):
        refused(store, errors.KeyFormatError, call)


def _frozen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


WRONG_SOURCES: dict[str, Callable[[], Any]] = {
    "too few": lambda: [b"x"] * 2,
    "too many": lambda: [b"x"] * 4,
    "too few rows": lambda: np.zeros((2, BLOCK), np.uint8),
    "one dimension": lambda: np.zeros(3, np.uint8),
    "bytes": lambda: b"xyz",
    "None": lambda: None,
    "a number among them": lambda: [b"x", 5, b"x"],
    "a str among them": lambda: [b"x", "x", b"x"],
    "an empty one": lambda: [b"x", b"", b"x"],
    "empty arrays": lambda: [np.zeros(0, np.uint8)] * 3,
    "empty rows": lambda: np.zeros((3, 0), np.uint8),
    "strided arrays": lambda: [np.zeros(100, np.uint8)[::2]] * 3,
    "one strided array": lambda: [np.zeros(50, np.uint8), np.zeros(100, np.uint8)[::2], np.zeros(50, np.uint8)],
    "strided memoryview": lambda: [memoryview(bytes(100))[::2]] * 3,
    "strided rows": lambda: np.zeros((3, 100), np.uint8)[:, ::2],
    "backward rows": lambda: np.zeros((3, 100), np.uint8)[::-1],
    "strided tensors": lambda: [torch.zeros(100)[::2]] * 3,
    "a transposed tensor": lambda: torch.zeros(100, 3).T,
    "object arrays": lambda: [np.array([object(), object()])] * 3,
    "object arrays among others": lambda: [np.ones(2), np.array([object(), object()]), bytearray(9)],
    "rows of objects": lambda: np.full((3, 2), object()),
    "structures with an object": lambda: [np.zeros(2, [("n", "i8"), ("o", "O")])] * 3,
    "views of object arrays": lambda: [memoryview(np.array([object(), object()]))] * 3,
    "ctypes objects": lambda: [(ctypes.py_object * 2)(1, 2)] * 3,
    "tensors of no CPU": lambda: [torch.zeros(10, device="meta")] * 3,
    "one tensor of no CPU": lambda: torch.zeros(3, 10, device="meta"),
}


@pytest.mark.parametrize("make", WRONG_SOURCES.values(), ids=WRONG_SOURCES)
def test_wrong_buffers_are_refused_by_put_and_get(store: KvStore, make: Callable[[], Any]) -> None:
    refused(store, errors.BufferError, lambda: store.put(KEYS, make()))
    refused(store, errors.BufferError, lambda: store.get_into(KEYS, make()))


def test_one_object_array_alone_is_refused_too_and_a_field_called_o_is_not(store: KvStore) -> None:
    """Alone: the shortest way through the checks. Copied into, such an array ended the process."""
    for buffers in ([np.array([object(), object()])], np.full((1, 2), object())):
        refused(store, errors.BufferError, lambda b=buffers: store.put(KEYS[:1], b), "references to Python objects")
        refused(
            store, errors.BufferError, lambda b=buffers: store.get_into(KEYS[:1], b), "references to Python objects"
        )
    assert store.put(KEYS[1:2], [memoryview(np.zeros(2, [("O", "i8")]))]).tolist() == [Code.OK]


READ_ONLY: dict[str, Callable[[], Any]] = {
    "bytes": lambda: [bytes(BLOCK)] * 3,
    "memoryview": lambda: [memoryview(bytes(BLOCK))] * 3,
    "arrays": lambda: [_frozen(np.zeros(BLOCK, np.uint8)) for _ in range(3)],
    "one array": lambda: [np.zeros(BLOCK, np.uint8), _frozen(np.zeros(BLOCK, np.uint8)), np.zeros(BLOCK, np.uint8)],
    "rows": lambda: _frozen(np.zeros((3, BLOCK), np.uint8)),
    "mixed": lambda: [np.zeros(BLOCK, np.uint8), bytearray(BLOCK), bytes(BLOCK)],
}


@pytest.mark.parametrize("make", READ_ONLY.values(), ids=READ_ONLY)
def test_a_read_only_buffer_is_never_written_to(store: KvStore, make: Callable[[], Any]) -> None:
    refused(store, errors.BufferError, lambda: store.get_into(KEYS, make()), "read-only")
    assert store.put(KEYS, make()).tolist() == [Code.EXISTS, Code.OK, Code.OK]  # as a source it is as good as any


def test_one_read_only_buffer_alone_is_refused_too(store: KvStore) -> None:
    for buffers in ([bytes(BLOCK)], [_frozen(np.zeros(BLOCK, np.uint8))], _frozen(np.zeros((1, BLOCK), np.uint8))):
        refused(store, errors.BufferError, lambda b=buffers: store.get_into(KEYS[:1], b), "read-only")


def test_a_buffer_of_the_wrong_size_changes_nothing_but_the_count_of_misses(store: KvStore) -> None:
    table = pool_of(store).T[lay.HEADER_WORDS :][pool_of(store).geometry.o_slab - lay.HEADER_WORDS :].copy()
    out = np.full((1, BLOCK + 1), 9, np.uint8)
    assert store.get_into(KEYS[:1], out).tolist() == [Code.SIZE]
    assert (out == 9).all()
    assert (table == pool_of(store).T[lay.HEADER_WORDS :][pool_of(store).geometry.o_slab - lay.HEADER_WORDS :]).all()


@pytest.mark.parametrize("over", ["slab", "pool"])
def test_a_block_that_can_not_fit_is_refused_before_the_rest_of_its_batch_is_stored(store: KvStore, over: str) -> None:
    nbytes = (store.stats().slab_bytes if over == "slab" else 9 << 20) + 1
    big = np.zeros(nbytes, np.uint8)
    small = np.zeros(10, np.uint8)
    match = str(store.stats().slab_bytes)
    refused(store, errors.BlockTooLargeError, lambda: store.put(KEYS, [small, small, big]), match)
    refused(store, errors.BlockTooLargeError, lambda: store.reserve(KEYS, nbytes), match)
    refused(store, errors.BlockTooLargeError, lambda: store.reserve_batch(KEYS, [10, nbytes]), match)
    store.register_buffer(big.ctypes.data, nbytes)
    assert store.batch_put_from_multi_buffers(["a"], [[big.ctypes.data]], [[nbytes]]) == [Code.SIZE]


@pytest.mark.parametrize("parts", [[], [0], [-1], [10, 0], [1] * 63], ids=str)
def test_wrong_parts_are_refused(store: KvStore, parts: list[int]) -> None:
    refused(store, errors.ConfigError, lambda: store.reserve_batch(KEYS, parts))


@pytest.mark.parametrize("nbytes", [0, -5])
def test_a_reservation_has_at_least_one_byte(store: KvStore, nbytes: int) -> None:
    refused(store, errors.ConfigError, lambda: store.reserve(KEYS, nbytes))


@pytest.mark.parametrize("nbytes", [10.9, "10", None, float("nan")])
def test_a_size_that_is_no_whole_number_is_refused(store: KvStore, nbytes: Any) -> None:
    refused(store, errors.ConfigError, lambda: store.reserve(KEYS, nbytes), "whole number")
    refused(store, errors.ConfigError, lambda: store.reserve_batch(KEYS, [10, nbytes]), "whole number")


def test_a_buffer_is_registered_as_it_was_said_last_and_not_beyond_memory(store: KvStore) -> None:
    memory = np.zeros(1000, np.uint8)
    at = memory.ctypes.data
    for wrong in (1 << 63, (1 << 63) - at, 1 << 58):
        refused(store, errors.BufferError, lambda n=wrong: store.register_buffer(at, n), "register_buffer")
    store.register_buffer(at, 1000)
    store.register_buffer(at, 10)
    refused(store, errors.BufferError, lambda: store.batch_put_from_multi_buffers(["a"], [[at]], [[11]]), "not inside")
    assert store.batch_put_from_multi_buffers(["a"], [[at]], [[10]]) == [0]
    store.unregister_buffer(at)
    refused(store, errors.BufferError, lambda: store.unregister_buffer(at))


def test_a_reservation_gives_back_what_was_not_sealed(store: KvStore) -> None:
    with store.reserve(KEYS[1:], 100) as reserved:
        assert store.stats().writing_slots == 2
    assert store.stats().writing_slots == 0
    with store.reserve(KEYS[1:], 100) as reserved:
        reserved.seal()
    assert store.exists(KEYS).all()


def test_wrong_fragments_are_refused(store: KvStore) -> None:
    memory = np.zeros(1000, np.uint8)
    at = memory.ctypes.data
    store.register_buffer(at, 1000)
    wrong: list[tuple[list[Any], list[Any], list[Any]]] = [
        (["a"], [[at], [at]], [[1], [1]]),
        (["a"], [[at], [at]], [[1], [1]]),
        (["a"], [[at, at]], [[1]]),
        (["a"], [[at]], [[1, 1]]),
        (["a"], [at], [1]),
        (["a"], 5, [[1]]),
        (["a"], [["x"]], [[1]]),
        (["a"], [[at]], [[1.0]]),
        (["a"], [[at]], [[1 << 63]]),
        (["a"], [[at]], [[-1]]),
        (["a"], [[at]], [[1001]]),
        (["a", "b"], [[at], [12345]], [[1], [1]]),
    ]
    for keys, addrs, sizes in wrong:
        for call in (store.batch_put_from_multi_buffers, store.batch_get_into_multi_buffers):
            refused(store, errors.BufferError, lambda c=call, k=keys, a=addrs, s=sizes: c(k, a, s))
    for key in (b"short", 5, None, "\ud800"):
        refused(store, errors.KeyFormatError, lambda k=key: store.batch_is_exist([k]))


def test_slots_that_name_nothing_are_stale_and_harmless(store: KvStore) -> None:
    far = np.array([-1, -5, 1 << 40, pool_of(store).geometry.n_rows], np.int64)
    gens = np.zeros(4, np.int64)
    sums = np.zeros(4, np.uint64)
    assert (store.complete(far, gens, 0, sums) == Code.STALE).all()
    assert (store.abort_batch(far, gens, True) == Code.STALE).all()
    assert (store.acknowledge(far, gens) == Code.STALE).all()
    assert (store.verify_parts(far, gens, 0) == Code.STALE).all()
    assert not store.still_writing(far, gens).any()
    store.unpin(far)
    store.check_integrity()


def test_part_sizes_whose_sum_is_no_int64_are_refused_before_anything_is_reserved(store: KvStore) -> None:
    """Their sum as int64 is negative, or small: a block of that length broke the pool's integrity for everybody."""
    for parts in ([1 << 62, 1 << 62], [(1 << 63) - 1, 2], [1 << 63, 1 << 63, 64], [1 << 70], [1 << 40] * 62):
        for call in (store.reserve_batch, lambda keys, p: store.put_fragments(keys, np.ones((3, len(p)), np.int64), p)):
            refused(store, (errors.BlockTooLargeError, errors.BufferError), lambda c=call, p=parts: c(KEYS, p))
    refused(store, errors.BlockTooLargeError, lambda: store.reserve(KEYS, 1 << 64))
    refused(store, errors.BlockTooLargeError, lambda: store.reserve_batch(KEYS, np.array([1 << 63] * 2, np.uint64)))


def test_arrays_that_do_not_fit_together_are_refused_before_they_are_read(store: KvStore) -> None:
    two, three = np.zeros(2, np.int64), np.zeros(3, np.int64)
    for wrong in (three, np.zeros(2), np.zeros((1, 2), np.int64), ["a", "b"], None):
        refused(store, errors.BufferError, lambda w=wrong: store.complete(two, two, 0, w))
        refused(store, errors.BufferError, lambda w=wrong: store.abort_batch(two, w, True))
        refused(store, errors.BufferError, lambda w=wrong: store.acknowledge(two, w))
        refused(store, errors.BufferError, lambda w=wrong: store.still_writing(w, two))
        refused(store, errors.BufferError, lambda w=wrong: store.verify_parts(w, two, 0))
    refused(store, errors.ConfigError, lambda: store.complete(two, two, "0", two))
    refused(store, errors.ConfigError, lambda: store.abort_batch(two, two, 1))
    refused(store, errors.ConfigError, lambda: store.pin_batch(KEYS, prefix="yes"))
    refused(store, errors.ConfigError, lambda: store.reserve_batch(KEYS, [10], siblings=None))
    assert (store.complete(two + 500_000, two, 1 << 70, two) == Code.STALE).all()


def test_addresses_and_lengths_that_can_not_be_are_refused_where_nothing_is_registered(store: KvStore) -> None:
    at = np.zeros((3, 1), np.int64) + KEYS.ctypes.data
    for addrs, nbytes in (
        (at - (1 << 60), [64]),
        (at + (1 << 58), [64]),
        (at.astype(np.uint64) + np.uint64(1 << 63), [64]),
        (at, [1 << 62]),
        (at, np.array([(1 << 64) - 64], np.uint64)),
        ([[1 << 70]] * 3, [64]),
        ([[1, 2], [3], [4]], [64]),
    ):
        for call in (store.put_fragments, store.get_fragments):
            refused(store, errors.BufferError, lambda c=call, a=addrs, n=nbytes: c(KEYS, a, n))
    store.register_buffer(KEYS.ctypes.data, KEYS.nbytes)
    for addr, nbytes in ((KEYS.ctypes.data, (1 << 63) - 1), (KEYS.ctypes.data, (1 << 63) - KEYS.ctypes.data)):
        for call in (store.batch_put_from_multi_buffers, store.batch_get_into_multi_buffers):
            refused(store, errors.BufferError, lambda c=call, a=addr, n=nbytes: c(["a"], [[a]], [[n]]))


def test_any_arguments_are_answered_or_refused_by_a_typed_error_and_change_nothing(pool_name: str) -> None:
    seed = random.SystemRandom().getrandbits(31)
    tally = calls.run(pool_name, 400, seed)
    assert not tally.notes, f"seed {seed}: {tally.notes}"
    assert tally.refused > 50


def test_tokens_that_are_none_are_refused() -> None:
    for token in ("", "x", "a:b:c", "pool:00ff:x", None, 5, b"a:b:c"):
        with pytest.raises(errors.ConfigError, match="token"):
            KvStore.join(token)
