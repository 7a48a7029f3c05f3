"""Moving bytes, and taking their checksum on the way: compiled kernels over raw addresses.

All of them run without the GIL, raise nothing and allocate nothing. An address is an int64, a length an int64 of
bytes; every array is C-contiguous, writable int64 (another layout or type compiles another kernel). Source and
destination must not overlap, and the caller answers for both being mapped: a wrong address ends the process.

**The checksum** is XXH3 (see :mod:`kvplug.shm.xxh3`) of what was stored: of the registers on their way into the
destination, or of the destination itself; never of a second read of the source. A source that somebody still writes
gives a block of mixed bytes, but not one whose checksum lies.

**Two ways to store.** A plain store first reads the cache line that it is going to overwrite, and leaves it in the
cache. A streamed (non-temporal) one does neither: a third less traffic, which more than pays for the checksum, but
the bytes are in memory afterwards and not in the cache. So whatever goes *into* a slot is streamed: a pool is many
times the last-level cache, and its next reader comes later. What comes *out* is for somebody who reads it at once:
memcpy, unless one call moves STREAM_BYTES or more, of which the beginning would be gone from the cache anyway. Every
kernel has fenced its streamed stores when it returns: an ordinary release publishes them.
"""

from __future__ import annotations

from typing import Any

from kvplug.shm.atomics import memcpy
from kvplug.shm.jit import entry, kernel
from kvplug.shm.xxh3 import (
    BLOCK_BYTES,
    STRIPE_BYTES,
    block_walker,
    lanes_on_stack,
    stream_fence,
    xxh3_64,
    xxh3_finish,
    xxh3_start,
)

__all__ = [
    "STREAM_BYTES",
    "copy",
    "copy_batch",
    "copy_hash",
    "copy_hash_batch",
    "copy_out",
    "copy_stream",
    "gather_multi",
    "gather_runs",
    "hash_batch",
    "scatter_runs",
    "xxh3_64",
]

STREAM_BYTES = 16 << 20
"""A batch out of the pool of at least this size is streamed. Half of a common last-level cache: what is smaller, a
consumer finds in the cache when it was copied plainly, and reads up to three times as fast."""
_STREAM_RANGE_BYTES = 4096
"""Ranges below this are never streamed on the way out: edges and the fence would cost more than is gained."""

_put_streamed = block_walker(store="stream", hashed=True)
_put_plain = block_walker(store="plain", hashed=True)
_hash_blocks = block_walker(store=None, hashed=True)
_copy_streamed = block_walker(store="stream", hashed=False)


@kernel
def sum_of(nbytes: Any, begin: int, end: int) -> int:
    """The sum of ``nbytes[begin:end]``. Not numpy's: that counts references, which the compiled library has none of."""
    n = 0
    for i in range(begin, end):
        n += nbytes[i]
    return n


@kernel
def copy(dst: int, src: int, nbytes: int) -> None:
    """memcpy: the way out of the pool for a little that is read at once."""
    memcpy(dst, src, nbytes)


@kernel
def copy_stream(dst: int, src: int, nbytes: int, after: int) -> None:
    """Copy past the caches, any alignment: the way out for much, see STREAM_BYTES.

    `after` is the address that is going to be read next (it is prefetched), or `src` if there is none.
    """
    edge = min(-dst % STRIPE_BYTES, nbytes)
    memcpy(dst, src, edge)
    blocks = (nbytes - edge) // BLOCK_BYTES
    _copy_streamed(0, dst + edge, src + edge, blocks, nbytes - edge, after)
    edge += blocks * BLOCK_BYTES
    memcpy(dst + edge, src + edge, nbytes - edge)
    stream_fence()


@kernel
def copy_out(dst: int, src: int, nbytes: int, after: int, stream: bool) -> None:
    """The way out of the pool, streamed if the whole batch is (see STREAM_BYTES); `after` as in copy_stream."""
    if stream and nbytes >= _STREAM_RANGE_BYTES:
        copy_stream(dst, src, nbytes, after)
    else:
        memcpy(dst, src, nbytes)


@kernel
def _put_blocks(state: int, dst: int, src: int, blocks: int, nbytes: int, after: int) -> None:
    if dst % STRIPE_BYTES == 0:  # a part of a slot always is
        _put_streamed(state, dst, src, blocks, nbytes, after)
    else:
        _put_plain(state, dst, src, blocks, nbytes, after)


@kernel
def _copy_hash(dst: int, src: int, nbytes: int, after: int) -> int:
    state = lanes_on_stack()
    xxh3_start(state)
    done = 0
    if nbytes > BLOCK_BYTES:
        blocks = (nbytes - 1) // BLOCK_BYTES
        _put_blocks(state, dst, src, blocks, nbytes, after)
        done = blocks * BLOCK_BYTES
    memcpy(dst + done, src + done, nbytes - done)
    stream_fence()
    return xxh3_finish(state, dst, nbytes)


@kernel
def copy_hash(dst: int, src: int, nbytes: int) -> int:
    """Copy and return the XXH3 of the bytes that are at `dst` now (bits as int64)."""
    return _copy_hash(dst, src, nbytes, src)


@kernel
def _append(state: int, part: int, at: int, total: int, src: int, nbytes: int, after: int) -> int:
    """Copy the next `nbytes` of a part of `total` bytes to `part` + `at`; return the new `at`.

    Invariant: `state` has taken in every block that is whole and has something after it. So a piece that starts on a
    block's edge goes through registers; the others are copied up to the next edge, and the block is hashed where it
    now lies, in the nearest cache.
    """
    followed = (total - 1) // BLOCK_BYTES * BLOCK_BYTES  # where the last block starts, which xxh3_finish takes
    end = at + nbytes
    while at < end:
        inside = at % BLOCK_BYTES
        blocks = (min(end, followed) - at) // BLOCK_BYTES
        if inside == 0 and blocks > 0:
            _put_blocks(state, part + at, src, blocks, end - at, after)
            at += blocks * BLOCK_BYTES
            src += blocks * BLOCK_BYTES
            continue
        piece = min(end - at, BLOCK_BYTES - inside)
        memcpy(part + at, src, piece)
        at += piece
        src += piece
        if inside + piece == BLOCK_BYTES and at <= followed:
            whole = part + at - BLOCK_BYTES
            _hash_blocks(state, 0, whole, 1, BLOCK_BYTES, src)
    return at


@entry("v(I, I, I)")
def copy_batch(dst_addrs: Any, src_addrs: Any, nbytes: Any) -> None:
    """Copy N ranges. dst_addrs, src_addrs, nbytes: int64[N]."""
    n = len(nbytes)
    stream = sum_of(nbytes, 0, len(nbytes)) >= STREAM_BYTES
    for i in range(n):
        copy_out(dst_addrs[i], src_addrs[i], nbytes[i], src_addrs[min(i + 1, n - 1)], stream)


@entry("v(I, I, I, I)")
def copy_hash_batch(dst_addrs: Any, src_addrs: Any, nbytes: Any, out_hash: Any) -> None:
    """Copy N ranges and put the XXH3 of each into out_hash. All int64[N]."""
    n = len(nbytes)
    for i in range(n):
        out_hash[i] = _copy_hash(dst_addrs[i], src_addrs[i], nbytes[i], src_addrs[min(i + 1, n - 1)])


@entry("v(I, I, I)")
def hash_batch(addrs: Any, nbytes: Any, out_hash: Any) -> None:
    """XXH3 of N ranges where they lie. All int64[N]."""
    for i in range(len(nbytes)):
        out_hash[i] = xxh3_64(addrs[i], nbytes[i])


@entry("v(I, I, I, I, I, I)")
def gather_runs(block_ids: Any, dst_addrs: Any, run_base: Any, run_stride: Any, run_nbytes: Any, out_hash: Any) -> None:
    """An engine's blocks to slots: part i becomes R runs, one after another without gaps.

    Run r of block b lies at run_base[r] + b * run_stride[r] and has run_nbytes[r] bytes (a layer's K, say).
    block_ids, dst_addrs: int64[N]; run_base, run_stride, run_nbytes: int64[R]; out_hash: int64[N], the XXH3 of each
    whole part.
    """
    state = lanes_on_stack()
    total = sum_of(run_nbytes, 0, len(run_nbytes))
    n, runs = len(block_ids), len(run_base)
    for i in range(n):
        xxh3_start(state)
        at = 0
        for r in range(runs):
            src = run_base[r] + block_ids[i] * run_stride[r]
            if r + 1 < runs:
                after = run_base[r + 1] + block_ids[i] * run_stride[r + 1]
            else:
                after = run_base[0] + block_ids[min(i + 1, n - 1)] * run_stride[0]
            at = _append(state, dst_addrs[i], at, total, src, run_nbytes[r], after)
        stream_fence()
        out_hash[i] = xxh3_finish(state, dst_addrs[i], total)


@entry("v(I, I, I, I, I)")
def scatter_runs(block_ids: Any, src_addrs: Any, run_base: Any, run_stride: Any, run_nbytes: Any) -> None:
    """Slots to an engine's blocks, the way back of :func:`gather_runs`; src_addrs: int64[N], the parts."""
    n = len(block_ids)
    total = sum_of(run_nbytes, 0, len(run_nbytes))
    stream = n * total >= STREAM_BYTES
    for i in range(n):
        src = src_addrs[i]
        end = src + total
        for r in range(len(run_base)):
            after = src + run_nbytes[r]
            if after == end:
                after = src_addrs[min(i + 1, n - 1)]
            copy_out(run_base[r] + block_ids[i] * run_stride[r], src, run_nbytes[r], after, stream)
            src += run_nbytes[r]


@entry("v(I, I, I, I, I)")
def gather_multi(offsets: Any, frag_addrs: Any, frag_nbytes: Any, dst_addrs: Any, out_hash: Any) -> None:
    """Scattered fragments to parts: part i becomes fragments offsets[i] … offsets[i+1]-1, one after another.

    offsets: int64[N+1], ascending; frag_addrs, frag_nbytes: int64[M], lengths may be 0; dst_addrs: int64[N];
    out_hash: int64[N], the XXH3 of each whole part.
    """
    state = lanes_on_stack()
    last = len(frag_addrs) - 1
    for i in range(len(dst_addrs)):
        total = sum_of(frag_nbytes, offsets[i], offsets[i + 1])
        xxh3_start(state)
        at = 0
        for f in range(offsets[i], offsets[i + 1]):
            after = frag_addrs[min(f + 1, last)]
            at = _append(state, dst_addrs[i], at, total, frag_addrs[f], frag_nbytes[f], after)
        stream_fence()
        out_hash[i] = xxh3_finish(state, dst_addrs[i], total)
