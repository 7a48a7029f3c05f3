"""Copy kernels: the right bytes at the right place, nothing beside them, and a checksum of what lies there."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.shm import copy as kernels
from tests.kernels import HAS_LIBRARY, NUMBA_ONLY

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int64]

SEED = 20261124
GUARD = 0xA5
GUARD_BYTES = 256
LENGTHS = (0, 1, 63, 64, 65, 240, 241, 1023, 1024, 1025, 2047, 2048, 2049, 4096, 5000, 32768, 100_001)


def reference(content: bytes) -> int:
    """XXH3 as int64 bits."""
    return int(np.uint64(xxhash.xxh3_64_intdigest(content)).astype(np.int64))


def words(*values: int) -> Words:
    return np.array(values, dtype=np.int64)


class Arena:
    """A destination with guard bytes all around each range that is handed out."""

    def __init__(self, nbytes: list[int], offset: int = 0) -> None:
        """`offset`: each range starts this many bytes behind a multiple of 64."""
        self.nbytes = nbytes
        room = sum(n + 2 * GUARD_BYTES + 192 for n in nbytes) + 64
        self.memory = np.full(room, GUARD, np.uint8)
        self.starts: list[int] = []
        at = -self.memory.ctypes.data % 64 + GUARD_BYTES
        for n in nbytes:
            self.starts.append(at + offset)
            at += -(-(n + 64) // 64) * 64 + GUARD_BYTES
        self.addrs = words(*(self.memory.ctypes.data + s for s in self.starts))

    def contents(self) -> list[bytes]:
        """What lies in each range, after checking that no byte outside of them was written."""
        outside = np.ones(self.memory.nbytes, bool)
        for start, n in zip(self.starts, self.nbytes, strict=True):
            outside[start : start + n] = False
        assert (self.memory[outside] == GUARD).all(), "wrote outside its range"
        return [self.memory[s : s + n].tobytes() for s, n in zip(self.starts, self.nbytes, strict=True)]


@pytest.fixture(scope="module")
def source() -> Bytes:
    return np.random.default_rng(SEED).integers(0, 256, 1 << 20, dtype=np.uint8)


@NUMBA_ONLY
@pytest.mark.parametrize("dst_offset", [0, 1, 8, 63])
@pytest.mark.parametrize("src_offset", [0, 3, 64])
def test_copy_hash_stores_the_bytes_and_returns_their_hash(source: Bytes, dst_offset: int, src_offset: int) -> None:
    for n in LENGTHS:
        arena = Arena([n], dst_offset)
        got = kernels.copy_hash(int(arena.addrs[0]), source.ctypes.data + src_offset, n)
        expected = source[src_offset : src_offset + n].tobytes()
        assert arena.contents() == [expected]
        assert got == reference(expected), n


@NUMBA_ONLY
@pytest.mark.parametrize("dst_offset", [0, 1, 16, 63])
def test_copy_and_copy_stream_store_the_bytes(source: Bytes, dst_offset: int) -> None:
    src = source.ctypes.data + 5
    for n in LENGTHS:
        plain, streamed = Arena([n], dst_offset), Arena([n], dst_offset)
        kernels.copy(int(plain.addrs[0]), src, n)
        kernels.copy_stream(int(streamed.addrs[0]), src, n, src)
        assert plain.contents() == streamed.contents() == [source[5 : 5 + n].tobytes()]


@settings(deadline=None)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 500_000), st.integers(0, 20_000)), max_size=8),
    offset=st.sampled_from([0, 0, 17]),
)
def test_batches_do_the_same_as_single_calls(ranges: list[tuple[int, int]], offset: int) -> None:
    source = np.random.default_rng(SEED).integers(0, 256, 1 << 20, dtype=np.uint8)
    src = words(*(source.ctypes.data + at for at, _ in ranges))
    nbytes = words(*(n for _, n in ranges))
    expected = [source[at : at + n].tobytes() for at, n in ranges]
    hashes = [reference(content) for content in expected]
    for kernel in (kernels.copy_hash_batch, kernels.copy_batch):
        arena = Arena([n for _, n in ranges], offset)
        out = np.zeros(len(ranges), np.int64)
        if kernel is kernels.copy_batch:
            kernel(arena.addrs, src, nbytes)
        else:
            kernel(arena.addrs, src, nbytes, out)
            assert out.tolist() == hashes
        assert arena.contents() == expected
        out = np.zeros(len(ranges), np.int64)
        kernels.hash_batch(arena.addrs, nbytes, out)
        assert out.tolist() == hashes


@pytest.mark.parametrize("offset", [0, 16])
def test_a_batch_large_enough_to_be_streamed_arrives_whole(offset: int) -> None:
    source = np.random.default_rng(SEED).integers(0, 256, kernels.STREAM_BYTES + 12_345, dtype=np.uint8)
    nbytes = [kernels.STREAM_BYTES, 100, 0, 12_245]  # with ranges too small for streaming beside it
    starts = np.cumsum([0, *nbytes[:-1]])
    arena = Arena(nbytes, offset)
    kernels.copy_batch(arena.addrs, source.ctypes.data + starts, words(*nbytes))
    assert arena.contents() == [source[s : s + n].tobytes() for s, n in zip(starts, nbytes, strict=True)]


def cache_of(blocks: int, run_nbytes: list[int], seed: int) -> tuple[list[Bytes], Words, Words]:
    """Layers as an engine lays them out: (memory per run, run_base, run_stride), strides wider than the runs."""
    rng = np.random.default_rng(seed)
    layers = [rng.integers(0, 256, blocks * (n + 24) + 8, dtype=np.uint8) for n in run_nbytes]
    return layers, words(*(layer.ctypes.data + 8 for layer in layers)), words(*(n + 24 for n in run_nbytes))


@settings(deadline=None)
@given(
    run_nbytes=st.lists(st.sampled_from([1, 64, 100, 512, 1000, 1024, 2048, 3000, 8192]), max_size=6),
    block_ids=st.lists(st.integers(0, 6), max_size=5),
    offset=st.sampled_from([0, 0, 33]),
)
def test_gathered_runs_lie_one_after_another_and_go_back_where_they_came_from(
    run_nbytes: list[int], block_ids: list[int], offset: int
) -> None:
    layers, base, stride = cache_of(7, run_nbytes, SEED)
    arena = Arena([sum(run_nbytes)] * len(block_ids), offset)
    out = np.zeros(len(block_ids), np.int64)
    kernels.gather_runs(words(*block_ids), arena.addrs, base, stride, words(*run_nbytes), out)
    expected = [
        b"".join(
            layer[8 + b * int(s) : 8 + b * int(s) + n].tobytes()
            for layer, s, n in zip(layers, stride, run_nbytes, strict=True)
        )
        for b in block_ids
    ]
    assert arena.contents() == expected
    assert out.tolist() == [reference(content) for content in expected]

    before = [layer.copy() for layer in layers]
    for layer, s, n in zip(layers, stride, run_nbytes, strict=True):
        for b in block_ids:
            layer[8 + b * int(s) : 8 + b * int(s) + n] = 0
    kernels.scatter_runs(words(*block_ids), arena.addrs, base, stride, words(*run_nbytes))
    for layer, old in zip(layers, before, strict=True):
        assert np.array_equal(layer, old), "scatter changed something else, or left something out"


def test_a_large_scatter_is_streamed_and_complete() -> None:
    run_nbytes = [300_000, 64, 200_008]
    blocks = 40
    layers, base, stride = cache_of(blocks, run_nbytes, SEED + 1)
    assert blocks * sum(run_nbytes) >= kernels.STREAM_BYTES
    ids = np.random.default_rng(SEED).permutation(blocks).astype(np.int64)
    arena = Arena([sum(run_nbytes)] * blocks)
    kernels.gather_runs(ids, arena.addrs, base, stride, words(*run_nbytes), np.zeros(blocks, np.int64))
    before = [layer.copy() for layer in layers]
    for layer, s, n in zip(layers, stride, run_nbytes, strict=True):
        for b in ids:
            layer[8 + b * int(s) : 8 + b * int(s) + n] = 0
    kernels.scatter_runs(ids, arena.addrs, base, stride, words(*run_nbytes))
    assert all(np.array_equal(layer, old) for layer, old in zip(layers, before, strict=True))


@settings(deadline=None)
@given(
    items=st.lists(
        st.lists(
            st.tuples(st.integers(0, 500_000), st.sampled_from([0, 1, 64, 100, 1000, 1024, 2048, 5000])), max_size=6
        ),
        max_size=5,
    ),
    offset=st.sampled_from([0, 0, 5]),
)
def test_fragments_gather_into_parts(items: list[list[tuple[int, int]]], offset: int) -> None:
    source = np.random.default_rng(SEED).integers(0, 256, 1 << 20, dtype=np.uint8)
    frags = [frag for item in items for frag in item]
    offsets = np.cumsum([0, *(len(item) for item in items)]).astype(np.int64)
    # an empty fragment may carry any address: it must not be touched
    addrs = words(*(source.ctypes.data + at if n else 0 for at, n in frags))
    nbytes = words(*(n for _, n in frags))
    parts = Arena([sum(n for _, n in item) for item in items], offset)
    out = np.zeros(len(items), np.int64)
    kernels.gather_multi(offsets, addrs, nbytes, parts.addrs, out)
    expected = [b"".join(source[at : at + n].tobytes() for at, n in item) for item in items]
    assert parts.contents() == expected
    assert out.tolist() == [reference(content) for content in expected]


def keep_writing(source: Bytes, stop: threading.Event) -> None:
    """Without the GIL for most of the time: it is memset that writes."""
    value, address, nbytes = 0, source.ctypes.data, source.nbytes
    while not stop.is_set():
        value += 1
        ctypes.memset(address, value & 0xFF, nbytes)


@pytest.mark.parametrize("nbytes", [200, 1000, 5000])
def test_the_hash_is_of_the_stored_bytes_while_somebody_still_writes_the_source(nbytes: int) -> None:
    copies = 1000
    source = np.zeros(nbytes, np.uint8)
    parts = np.zeros((copies, -(-nbytes // 64) * 64), np.uint8)
    src, dst = np.full(copies, source.ctypes.data), parts.ctypes.data + np.arange(copies) * parts.shape[1]
    run_base, run_nbytes = words(source.ctypes.data, source.ctypes.data + 150), words(150, nbytes - 150)
    ids, stride = np.zeros(copies, np.int64), words(0, 0)
    lengths, got, there = np.full(copies, nbytes), np.zeros(copies, np.int64), np.zeros(copies, np.int64)
    stop = threading.Event()
    writer = threading.Thread(target=keep_writing, args=(source, stop))
    writer.start()
    try:
        mixed, deadline = 0, time.monotonic() + 60
        while mixed < 2 * copies and time.monotonic() < deadline:
            kernels.copy_hash_batch(dst, src, lengths, got)
            kernels.hash_batch(dst, lengths, there)
            assert np.array_equal(got, there)
            kernels.gather_runs(ids, dst, run_base, stride, run_nbytes, got)
            kernels.hash_batch(dst, lengths, there)
            assert np.array_equal(got, there)
            mixed += int((parts[:, :nbytes].min(axis=1) != parts[:, :nbytes].max(axis=1)).sum())
    finally:
        stop.set()
        writer.join(timeout=60)
    assert mixed > 0, "the source never changed during a copy: nothing was tested"


@pytest.fixture
def page_before_nothing() -> Iterator[Bytes]:
    """One readable page, its end followed by one that may not be touched."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    view = np.frombuffer(memory, np.uint8)
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert mprotect(view.ctypes.data + page, page, 0) == 0
    yield view[:page]
    assert mprotect(view.ctypes.data + page, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0


def test_nothing_behind_the_source_is_read_though_prefetching_runs_ahead(page_before_nothing: Bytes) -> None:
    source = page_before_nothing
    source[:] = np.random.default_rng(SEED).integers(0, 256, source.nbytes, dtype=np.uint8)
    for n in (*range(1, 1100), 2048, 4096):
        src = source[source.nbytes - n :]
        arena = Arena([n])
        out, at, of = words(0), words(src.ctypes.data), words(n)
        kernels.copy_hash_batch(arena.addrs, at, of, out)
        assert out[0] == reference(src.tobytes())
        kernels.hash_batch(at, of, out)
        assert out[0] == reference(src.tobytes())
        if HAS_LIBRARY:
            kernels.copy_batch(arena.addrs, at, of)
        else:  # so little is streamed only if it is asked for
            kernels.copy_stream(int(arena.addrs[0]), src.ctypes.data, n, src.ctypes.data)
        assert arena.contents() == [src.tobytes()]


def test_the_kernels_need_no_engine() -> None:
    code = "import sys, kvplug.shm.copy; print(*(m for m in ('torch', 'vllm', 'sglang') if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == ""
