"""What the SDK promises for good input: put, get, look up, pin, reserve, remove, and what each code means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kvplug import errors
from kvplug.errors import Code
from kvplug.identity.keys import fold
from kvplug.shm import layout as lay
from kvplug.shm.index import key_hash
from tests.inside import pool_of
from tests.pool.sample import BLOCK, MakeStore, flip_a_byte, some_blocks, some_keys


def test_what_one_process_puts_another_store_gets(make_store: MakeStore) -> None:
    a, b = make_store(), make_store()
    keys, blocks = some_keys(40), some_blocks(40)
    assert (a.put(keys, blocks) == Code.OK).all()
    out = np.zeros_like(blocks)
    assert (b.get_into(keys, out) == Code.OK).all()
    assert (out == blocks).all()
    a.check_integrity()


def test_put_again_says_exists_and_keeps_the_first_bytes(make_store: MakeStore) -> None:
    store = make_store()
    keys, blocks = some_keys(3), some_blocks(3)
    store.put(keys, blocks)
    assert (store.put(keys, ~blocks) == Code.EXISTS).all()
    out = np.zeros_like(blocks)
    store.get_into(keys, out)
    assert (out == blocks).all()


def test_missing_is_a_code_for_its_key_alone(make_store: MakeStore) -> None:
    store = make_store()
    keys, blocks = some_keys(4), some_blocks(4)
    store.put(keys[[0, 2]], blocks[[0, 2]])
    out = np.zeros_like(blocks)
    assert store.get_into(keys, out).tolist() == [Code.OK, Code.MISSING, Code.OK, Code.MISSING]
    assert (out[[0, 2]] == blocks[[0, 2]]).all()
    assert store.exists(keys).tolist() == [True, False, True, False]
    assert store.match_prefix(keys) == 1
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.read_bytes) == (2, 2, 2 * BLOCK)


@pytest.mark.parametrize("wrong", [BLOCK - 1, BLOCK + 1])
def test_a_buffer_of_another_size_gets_size_and_the_block_stays(make_store: MakeStore, wrong: int) -> None:
    store = make_store()
    keys, blocks = some_keys(1), some_blocks(1)
    store.put(keys, blocks)
    out = np.full(wrong, 7, np.uint8)
    assert store.get_into(keys, [out]).tolist() == [Code.SIZE]
    assert (out == 7).all()
    assert store.exists(keys).all()


def test_of_duplicates_in_a_batch_one_is_stored(make_store: MakeStore) -> None:
    store = make_store()
    keys, blocks = some_keys(3)[[0, 1, 0, 2, 0]], some_blocks(5)
    assert store.put(keys, blocks).tolist() == [Code.OK, Code.OK, Code.EXISTS, Code.OK, Code.EXISTS]
    out = np.zeros_like(blocks)
    assert (store.get_into(keys, out) == Code.OK).all()
    assert (out[0] == blocks[0]).all()
    assert (out[2] == blocks[0]).all()
    assert store.stats().sealed_blocks == 3
    b = store.pin_batch(keys)  # pinned three times, to be released three times
    store.unpin(b.slots[:2])
    assert store.remove(keys[:1]).tolist() == [Code.PINNED]
    store.unpin(b.slots[2:])
    assert store.remove(keys).tolist() == [Code.OK, Code.OK, Code.MISSING, Code.OK, Code.MISSING]
    store.check_integrity()


def test_a_batch_larger_than_the_pool_goes_through_it(make_store: MakeStore) -> None:
    store = make_store(size="8mib")
    keys, blocks = some_keys(700), some_blocks(700)
    codes = store.put(keys, blocks)
    assert (codes == Code.OK).all()
    out = np.zeros_like(blocks)
    got = store.get_into(keys, out)
    assert 0 < (got == Code.OK).sum() < 700
    assert (out[got == Code.OK] == blocks[got == Code.OK]).all()
    assert store.stats().evicted_blocks == 700 - store.stats().sealed_blocks
    store.check_integrity()


def test_a_batch_may_mix_sizes(make_store: MakeStore) -> None:
    store = make_store()
    sizes = [1, 4096, 16384, 16385, 300_000, 1, 1 << 20, 5000]
    keys = some_keys(len(sizes))
    blocks = [some_blocks(1, n, seed=n)[0] for n in sizes]
    assert (store.put(keys, blocks) == Code.OK).all()
    out = [np.zeros(n, np.uint8) for n in sizes]
    assert (store.get_into(keys, out) == Code.OK).all()
    assert all((a == b).all() for a, b in zip(out, blocks, strict=True))
    assert store.stats().sealed_bytes == sum(sizes)
    store.check_integrity()


def test_an_empty_batch_is_an_empty_answer(make_store: MakeStore) -> None:
    store = make_store()
    for keys in ([], np.empty((0, 32), np.uint8)):
        assert store.put(keys, []).shape == (0,)
        assert store.get_into(keys, []).shape == (0,)
        assert store.get_into(keys, np.empty((0, 100), np.uint8)).shape == (0,)
        assert store.exists(keys).shape == (0,)
        assert store.match_prefix(keys) == 0
        assert store.remove(keys).shape == (0,)
        store.touch(keys)
        assert len(store.reserve(keys, 100).seal()) == 0
        with store.pin(keys) as blocks:
            assert len(blocks) == 0
        assert len(store.pin_batch(keys, prefix=True)) == 0
    assert store.batch_put_from_multi_buffers([], [], []) == []
    assert store.batch_get_into_multi_buffers([], [], []) == []
    assert store.batch_is_exist([]) == []
    store.check_integrity()


def _unaligned(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    raw = np.zeros(keys.size + 1, np.uint8)
    raw[1:] = keys.ravel()
    return raw[1:].reshape(keys.shape)


def _read_only(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    copy = keys.copy()
    copy.flags.writeable = False
    return copy


FORMS: dict[str, Callable[[npt.NDArray[np.uint8]], Any]] = {
    "list of bytes": lambda k: [bytes(x) for x in k],
    "tuple of bytes": lambda k: tuple(bytes(x) for x in k),
    "array": lambda k: k,
    "read-only array": _read_only,
    "unaligned array": _unaligned,
    "every second row": lambda k: np.repeat(k, 2, axis=0)[::2],
    "backwards": lambda k: k[::-1].copy()[::-1],
    "columns of a wider array": lambda k: np.hstack([k, k])[:, :32],
    "fortran order": np.asfortranarray,
}


@pytest.mark.parametrize("form", FORMS)
def test_keys_mean_the_same_in_every_form(make_store: MakeStore, form: str) -> None:
    store = make_store()
    keys, blocks = some_keys(5), some_blocks(5)
    store.put(keys[:4], blocks[:4])
    same = FORMS[form](keys)
    assert store.exists(same).tolist() == [True] * 4 + [False]
    assert store.match_prefix(same) == 4
    assert store.put(same, blocks).tolist() == [Code.EXISTS] * 4 + [Code.OK]
    out = np.zeros_like(blocks)
    assert (store.get_into(same, out) == Code.OK).all()
    assert (out == blocks).all()
    with store.pin(same) as pinned:
        assert bytes(pinned[3] or b"") == bytes(blocks[3])
    store.touch(same)
    assert (store.remove(same) == Code.OK).all()


def test_keys_that_collide_in_the_index_stay_apart(make_store: MakeStore) -> None:
    store = make_store(size="8mib")
    mask = int(pool_of(store).T[lay.H_INDEX_CAP]) - 1
    rng = np.random.default_rng(5)
    same_home: list[npt.NDArray[np.uint8]] = []
    while len(same_home) < 24:
        words = rng.integers(-(1 << 62), 1 << 62, 4)
        if int(key_hash(*(int(w) for w in words))) & mask in (3, mask):  # two runs, one of which wraps around
            same_home.append(words.view(np.uint8))
    keys, blocks = np.array(same_home), some_blocks(24)
    assert (store.put(keys, blocks) == Code.OK).all()
    store.check_integrity()
    there = np.ones(24, bool)
    for gone in rng.permutation(24)[:20]:
        assert store.remove(keys[gone][None]).tolist() == [Code.OK]
        there[gone] = False
        assert (store.exists(keys) == there).all()
    out = np.zeros_like(blocks)
    assert ((store.get_into(keys, out) == Code.OK) == there).all()
    assert (out[there] == blocks[there]).all()
    store.check_integrity()


def _tensor(dtype: torch.dtype) -> Callable[[bytes], Any]:
    return lambda raw: torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype)


BUFFERS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": lambda raw: memoryview(bytearray(raw)),
    "uint8": lambda raw: np.frombuffer(raw, np.uint8).copy(),
    "float32 2d": lambda raw: np.frombuffer(raw, np.float32).copy().reshape(4, -1),
    "tensor float32": _tensor(torch.float32),
    "tensor bfloat16": _tensor(torch.bfloat16),
    "tensor float8": _tensor(torch.float8_e4m3fn),
    "tensor 2d": lambda raw: _tensor(torch.bfloat16)(raw).view(8, -1),
}


def _bytes_of(buffer: Any) -> bytes:
    if isinstance(buffer, torch.Tensor):
        return buffer.contiguous().view(torch.uint8).numpy().tobytes()
    return bytes(buffer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("kind", BUFFERS)
def test_any_kind_of_buffer_carries_the_same_bytes(make_store: MakeStore, kind: str, many: int) -> None:
    store = make_store()
    keys = some_keys(many)
    raws = [some_blocks(1, seed=i)[0].tobytes() for i in range(many)]
    assert (store.put(keys, [BUFFERS[kind](raw) for raw in raws]) == Code.OK).all()
    with store.pin(keys) as blocks:
        assert [bytes(b or b"") for b in blocks] == raws
    if kind == "bytes":
        return
    out = [BUFFERS[kind](bytes(BLOCK)) for _ in range(many)]
    assert (store.get_into(keys, out) == Code.OK).all()
    assert [_bytes_of(b) for b in out] == raws


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_tensor_is_a_batch_by_its_rows(make_store: MakeStore, dtype: torch.dtype) -> None:
    store = make_store()
    keys = some_keys(6)
    tensor = torch.arange(6 * 500).view(6, 5, 100).to(dtype)
    assert (store.put(keys, tensor) == Code.OK).all()
    out = torch.zeros_like(tensor)
    assert (store.get_into(keys, out) == Code.OK).all()
    assert torch.equal(out, tensor)


def test_rows_with_gaps_between_them_are_a_batch_too(make_store: MakeStore) -> None:
    store = make_store()
    keys = some_keys(4)
    wide = some_blocks(8, 3000)
    assert (store.put(keys, wide[::2, :2000]) == Code.OK).all()
    out = np.zeros((4, 5000), np.uint8)
    assert (store.get_into(keys, out[:, 100:2100]) == Code.OK).all()
    assert (out[:, 100:2100] == wide[::2, :2000]).all()
    assert not out[:, :100].any()
    assert not out[:, 2100:].any()


# ---- multi_buffers -------------------------------------------------------------------------------------------------


def test_fragments_go_in_and_come_out_in_their_order(make_store: MakeStore) -> None:
    store = make_store(verify="always")
    source, target = some_blocks(1, 50_000)[0], np.zeros(50_000, np.uint8)
    src, dst = source.ctypes.data, target.ctypes.data
    assert store.register_buffer(src, source.nbytes) == 0
    assert store.register_buffer(dst, target.nbytes) == 0
    names = ["a", b"k" * 32, "c"]
    sizes = [[100, 9000, 1], [20_000], [64, 64, 64, 64]]
    starts = [[40_000, 0, 7], [10_000], [0, 300, 200, 100]]
    at = [[src + s for s in one] for one in starts]
    assert store.batch_put_from_multi_buffers(names, at, sizes) == [0, 0, 0]
    assert store.batch_put_from_multi_buffers(names, at, sizes) == [0, 0, 0]  # there already is as good as stored
    assert store.batch_is_exist([*names, "d"]) == [1, 1, 1, 0]
    back = [[dst + s for s in one] for one in starts]
    assert store.batch_get_into_multi_buffers([*names, "d"], [*back, [dst]], [*sizes, [5]]) == [
        9101,
        20_000,
        256,
        Code.MISSING,
    ]
    for one, ns in zip(starts, sizes, strict=True):
        for s, n in zip(one, ns, strict=True):
            assert (target[s : s + n] == source[s : s + n]).all()
    assert store.batch_get_into_multi_buffers(["a"], [[dst]], [[9100]]) == [Code.SIZE]
    flip_a_byte(store, np.frombuffer(b"k" * 32, np.uint8))
    assert store.batch_get_into_multi_buffers([b"k" * 32], [[dst]], [[20_000]]) == [Code.CORRUPT]


def test_raw_addresses_count_only_inside_registered_memory(make_store: MakeStore) -> None:
    store = make_store()
    memory = np.zeros(10_000, np.uint8)
    at = memory.ctypes.data
    with pytest.raises(errors.BufferError, match="not inside a registered buffer"):
        store.batch_put_from_multi_buffers(["a"], [[at]], [[10]])
    store.register_buffer(at, 5000)
    assert store.batch_put_from_multi_buffers(["a"], [[at + 4990]], [[10]]) == [0]
    assert store.batch_put_from_multi_buffers(["e"], [[at, 12345]], [[10, 0]]) == [0]  # of nothing, anywhere
    for begin, nbytes in ((4990, 11), (5000, 1), (-1, 1), (0, -5)):
        with pytest.raises(errors.BufferError):
            store.batch_put_from_multi_buffers(["b"], [[at + begin]], [[nbytes]])
        with pytest.raises(errors.BufferError):
            store.batch_get_into_multi_buffers(["a"], [[at + begin]], [[nbytes]])
    store.unregister_buffer(at)
    with pytest.raises(errors.BufferError):
        store.batch_get_into_multi_buffers(["a"], [[at]], [[10]])
    with pytest.raises(errors.BufferError, match="nothing is registered"):
        store.unregister_buffer(at)
    with pytest.raises(errors.BufferError):
        store.register_buffer(at, 0)
    assert store.batch_is_exist(["a", "b"]) == [1, 0]


# ---- fragments -----------------------------------------------------------------------------------------------------


def cut(memory: np.ndarray, n: int, *sizes: int) -> np.ndarray:
    """Addresses (n, F) of fragments of these sizes, dealt out backwards over ``memory``."""
    ends = memory.ctypes.data + memory.nbytes - np.cumsum(np.tile(sizes, n))
    return ends.reshape(n, len(sizes))


def content_of(memory: np.ndarray, addrs: np.ndarray, nbytes: np.ndarray) -> list[bytes]:
    at = addrs - memory.ctypes.data
    return [
        b"".join(memory[s : s + n].tobytes() for s, n in zip(one.tolist(), ns.tolist(), strict=True))
        for one, ns in zip(at, nbytes, strict=True)
    ]


@pytest.mark.parametrize("verify", ["never", "always"])
@pytest.mark.parametrize("sizes", [(4096, 4096), (20_000,), (1, 0, 9000, 64)])
def test_equal_fragments_go_in_and_come_out(verify: str, sizes: tuple[int, ...], make_store: MakeStore) -> None:
    store = make_store(verify=verify)
    n = 300
    source, target = some_blocks(1, n * sum(sizes))[0], np.zeros(n * sum(sizes), np.uint8)
    of = some_keys(n)
    src, dst = cut(source, n, *sizes), cut(target, n, *sizes)
    assert store.put_fragments(of, src, np.array(sizes)).tolist() == [Code.OK] * n
    assert store.put_fragments(of, src, np.tile(sizes, (n, 1))).tolist() == [Code.EXISTS] * n
    missing = some_keys(1, seed=9)
    codes = store.get_fragments(np.concatenate([missing, of]), np.concatenate([dst[:1], dst]), np.array(sizes))
    assert codes.tolist() == [Code.MISSING] + [Code.OK] * n
    assert (target == source).all()
    whole = np.empty((n, sum(sizes)), np.uint8)
    assert not store.get_into(of, whole).any(), "a block of fragments is a block like any other"
    assert [one.tobytes() for one in whole] == content_of(source, src, np.tile(sizes, (n, 1)))
    assert store.get_fragments(of[:2], dst[:2, :1], [sum(sizes) - 1]).tolist() == [Code.SIZE] * 2
    assert store.put_fragments(of[:0], np.empty((0, 2), np.int64), [1, 1]).tolist() == []
    assert store.stats().hits == 2 * n


def test_each_key_may_have_fragments_of_its_own_lengths(make_store: MakeStore) -> None:
    store = make_store(verify="always")
    source, target = some_blocks(1, 60_000)[0], np.zeros(60_000, np.uint8)
    nbytes = np.array([[10_000, 5000], [1, 29_999], [15_000, 0]])
    at = np.concatenate(([0], np.cumsum(nbytes.ravel())[:-1])).reshape(3, 2)
    assert store.put_fragments(some_keys(3), source.ctypes.data + at, nbytes).tolist() == [Code.OK] * 3
    assert store.get_fragments(some_keys(3), target.ctypes.data + at, nbytes).tolist() == [Code.OK] * 3
    assert (target == source).all()


def test_corrupt_fragments_are_dropped(make_store: MakeStore) -> None:
    store = make_store(verify="always")
    source, target = some_blocks(1, 40_000)[0], np.zeros(40_000, np.uint8)
    assert not store.put_fragments(some_keys(2), cut(source, 2, 15_000, 5000), [15_000, 5000]).any()
    flip_a_byte(store, some_keys(2)[0], at=17_000)
    got = store.get_fragments(some_keys(2), cut(target, 2, 15_000, 5000), [15_000, 5000])
    assert got.tolist() == [Code.CORRUPT, Code.OK]
    assert store.exists(some_keys(2)).tolist() == [False, True]


@pytest.mark.parametrize(
    ("addrs", "nbytes", "says"),
    [
        (np.ones((2, 2), np.int64), [1, 1], "for 3 keys"),
        (np.ones(3, np.int64), [1], "for 3 keys"),
        (np.ones((3, 0), np.int64), [], "must be integers"),
        (np.ones((3, 2), np.int64), [1, 1, 1], "the same for every key"),
        (np.ones((3, 2), np.int64), np.ones((2, 2), np.int64), "the same for every key"),
        (np.ones((3, 2)), [1, 1], "must be integers"),
        (np.ones((3, 2), np.int64), [1.0, 1.0], "must be integers"),
        (np.ones((3, 2), np.int64), [5, -1], "fragment 1 of key 0: -1 bytes"),
        (np.array([[4096, 4096], [4096, 0], [4096, 4096]]), [5, 1], "fragment 1 of key 1: 1 bytes at 0x0"),
        (np.ones((3, 2), np.int64), [0, 0], "0 bytes together"),
    ],
)
def test_fragments_of_a_wrong_shape_are_refused(
    addrs: np.ndarray, nbytes: object, says: str, make_store: MakeStore
) -> None:
    store = make_store()
    for call in (store.put_fragments, store.get_fragments):
        with pytest.raises(errors.BufferError, match=says):
            call(some_keys(3), addrs, nbytes)
    with pytest.raises(errors.ConfigError, match="siblings"):
        store.put_fragments(some_keys(1), np.ones((1, 1), np.int64), [1], siblings=(2, 2))


def test_fragments_have_siblings(make_store: MakeStore) -> None:
    store = make_store()
    source = some_blocks(1, 3 * BLOCK)[0]
    of = [fold(some_keys(3), 0, rank) for rank in range(2)]
    for rank in range(2):
        assert not store.put_fragments(of[rank], cut(source, 3, BLOCK), [BLOCK], siblings=(2, rank)).any()
    assert store.remove(of[1][:1]).tolist() == [Code.OK]
    assert store.exists(of[0]).tolist() == [False, True, True]
