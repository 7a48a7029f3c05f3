"""Copy kernels against memcpy (`np.copyto` between the same buffers), and XXH3 against the C library.

Each round of a kernel is preceded by a round of `np.copyto` over as many bytes elsewhere in the same buffers, blocks in
random order, so that a busy neighbour slows both; the figure is the median of the pairs' ratios. The buffers are many
times the last-level cache, and faulted in.
"""

from __future__ import annotations

import itertools
import mmap
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from pytest_benchmark.fixture import BenchmarkFixture

from kvplug.shm import copy as kernels

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
WORKING_SET_BYTES = 384 * MIB
ROUND_BYTES = 16 * MIB
ROUNDS = 60
SIZES = (32 * KIB, 256 * KIB, 2 * MIB)
RUNS_PER_PART = 16

Words = npt.NDArray[np.int64]


class Buffers:
    """Private memory to copy from, shared memory to copy to: what an engine and a pool have."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.source = np.tile(rng.integers(0, 256, MIB, dtype=np.uint8), WORKING_SET_BYTES // MIB)
        self.target = np.frombuffer(mmap.mmap(-1, WORKING_SET_BYTES), np.uint8)
        self.target[:] = 1
        self.rng = rng

    def batches(self, size: int, per_batch: int) -> Any:
        """Endless: (dst_addrs, src_addrs) of `per_batch` blocks, no block twice before all were used."""
        count = WORKING_SET_BYTES // size
        order = [itertools.cycle(self.rng.permutation(count).tolist()) for _ in range(2)]
        while True:
            yield tuple(np.fromiter(itertools.islice(o, per_batch), np.int64) * size for o in order)


@pytest.fixture(scope="module")
def buffers() -> Buffers:
    return Buffers()


def compare(
    benchmark: BenchmarkFixture, buffers: Buffers, size: int, call: Callable[..., None], per_batch: int = 0
) -> float:
    """Time `call(dst_addrs, src_addrs, nbytes, out)` and return (its speed) ÷ (speed of np.copyto)."""
    per_batch = per_batch or ROUND_BYTES // size
    batches = buffers.batches(size, per_batch)
    nbytes, out = np.full(per_batch, size), np.zeros(per_batch, np.int64)
    plain_s: list[float] = []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        dst, src = next(batches)
        pairs = [
            (buffers.target[d : d + size], buffers.source[s : s + size])
            for d, s in zip(dst.tolist(), src.tolist(), strict=True)
        ]
        start = time.perf_counter()
        for to, of in pairs:
            np.copyto(to, of)
        plain_s.append(time.perf_counter() - start)
        dst, src = next(batches)
        return (buffers.target.ctypes.data + dst, buffers.source.ctypes.data + src, nbytes, out), {}

    rounds = ROUNDS if per_batch > 1 else 10 * ROUNDS
    benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=3)
    ours_s = benchmark.stats.stats.data
    ratio = statistics.median(p / o for p, o in zip(plain_s[-len(ours_s) :], ours_s, strict=True))
    benchmark.extra_info["ratio"] = round(ratio, 3)
    benchmark.extra_info["gib_per_s"] = round(per_batch * size / statistics.median(ours_s) / GIB, 2)
    benchmark.extra_info["memcpy_gib_per_s"] = round(per_batch * size / statistics.median(plain_s) / GIB, 2)
    return ratio


def report(capsys: pytest.CaptureFixture[str], benchmark: BenchmarkFixture, what: str, at_least: float | None) -> None:
    info = benchmark.extra_info
    target = "" if at_least is None else f"  (at least {at_least})"
    with capsys.disabled():
        print(
            f"\n{what}: {info['gib_per_s']:.1f} GiB/s, memcpy {info['memcpy_gib_per_s']:.1f} GiB/s, "
            f"ratio {info['ratio']:.2f}{target}"
        )


@pytest.mark.parametrize(("size", "at_least"), [*zip(SIZES, (0.65, 0.80, 0.80), strict=True)])
def test_copy_with_checksum(
    benchmark: BenchmarkFixture, buffers: Buffers, capsys: pytest.CaptureFixture[str], size: int, at_least: float
) -> None:
    compare(benchmark, buffers, size, kernels.copy_hash_batch)
    report(capsys, benchmark, f"copy and checksum, {size // KIB} KiB", at_least)


def test_one_block_copied_with_checksum(
    benchmark: BenchmarkFixture, buffers: Buffers, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(benchmark, buffers, 256 * KIB, kernels.copy_hash_batch, per_batch=1)
    report(capsys, benchmark, "copy and checksum, one call of 256 KiB", None)


@pytest.mark.parametrize("size", SIZES)
def test_runs_gathered_with_checksum(
    benchmark: BenchmarkFixture, buffers: Buffers, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    run = size // RUNS_PER_PART
    base, stride = run * np.arange(RUNS_PER_PART), np.full(RUNS_PER_PART, size)
    runs = np.full(RUNS_PER_PART, run)

    def call(dst: Words, src: Words, _nbytes: Words, out: Words) -> None:
        first = buffers.source.ctypes.data
        kernels.gather_runs((src - first) // size, dst, base + first, stride, runs, out)

    compare(benchmark, buffers, size, call)
    report(capsys, benchmark, f"gather of {RUNS_PER_PART} runs with checksum, {size // KIB} KiB", None)


@pytest.mark.parametrize("size", SIZES)
def test_runs_scattered(
    benchmark: BenchmarkFixture, buffers: Buffers, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    run = size // RUNS_PER_PART
    base, stride = run * np.arange(RUNS_PER_PART), np.full(RUNS_PER_PART, size)
    runs = np.full(RUNS_PER_PART, run)

    def call(dst: Words, src: Words, _nbytes: Words, _out: Words) -> None:
        first = buffers.target.ctypes.data
        kernels.scatter_runs((dst - first) // size, src, base + first, stride, runs)

    compare(benchmark, buffers, size, call)
    report(capsys, benchmark, f"scatter of {RUNS_PER_PART} runs, {size // KIB} KiB", None)


@pytest.mark.parametrize(("size", "at_least"), [*zip(SIZES, (0.75, 0.90, 0.95), strict=True)])
def test_copy_out(
    benchmark: BenchmarkFixture, buffers: Buffers, capsys: pytest.CaptureFixture[str], size: int, at_least: float
) -> None:
    def call(dst: Words, src: Words, nbytes: Words, _out: Words) -> None:
        kernels.copy_batch(dst, src, nbytes)

    compare(benchmark, buffers, size, call)
    report(capsys, benchmark, f"copy out in one large batch (streamed), {size // KIB} KiB", at_least)


@pytest.mark.parametrize(("size", "at_least"), [*zip(SIZES, (0.75, 0.90, 0.95), strict=True)])
def test_copy_out_of_a_small_batch(
    benchmark: BenchmarkFixture, buffers: Buffers, capsys: pytest.CaptureFixture[str], size: int, at_least: float
) -> None:
    def call(dst: Words, src: Words, nbytes: Words, _out: Words) -> None:
        kernels.copy_batch(dst, src, nbytes)

    compare(benchmark, buffers, size, call, per_batch=kernels.STREAM_BYTES // size - 1)
    report(capsys, benchmark, f"copy out in a smaller batch (memcpy), {size // KIB} KiB", at_least)


@pytest.mark.parametrize("size", [4 * KIB, *SIZES[:2]])
def test_checksum_of_bytes_in_the_cache(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    calls = max(1, 4 * MIB // size)
    addrs, nbytes, out = np.full(calls, data.ctypes.data), np.full(calls, size), np.zeros(calls, np.int64)
    theirs_s: list[float] = []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        view = memoryview(data)
        start = time.perf_counter()
        for _ in range(calls):
            xxhash.xxh3_64_intdigest(view)
        theirs_s.append(time.perf_counter() - start)
        return (addrs, nbytes, out), {}

    benchmark.pedantic(kernels.hash_batch, setup=setup, rounds=ROUNDS, warmup_rounds=3)
    ours, theirs = (calls * size / statistics.median(t) / GIB for t in (benchmark.stats.stats.data, theirs_s))
    benchmark.extra_info.update(gib_per_s=round(ours, 1), xxhash_gib_per_s=round(theirs, 1))
    with capsys.disabled():
        print(f"\nXXH3 of {size // KIB} KiB in the cache: {ours:.0f} GiB/s, xxhash (one call each) {theirs:.0f} GiB/s")


def test_call_overhead_of_a_kernel(benchmark: BenchmarkFixture) -> None:
    """A kernel called from Python with nothing to do: what a batch of one pays."""
    empty = np.zeros(0, np.int64)
    benchmark(kernels.gather_runs, empty, empty, empty, empty, empty, empty)
