"""Moving bytes, and taking their checksum on the way: compiled kernels over raw addresses.

All of them run without the GIL, raise nothing and allocate nothing. An address is an int64, a length an int64 of
bytes; every array is C-contiguous int64. Source and destination must not overlap, and the caller answers for both
ranges being mapped: a wrong address ends the process.

The checksum is XXH3 (see :mod:`kvplug.shm.xxh3`) of **what was stored**: of the registers on their way into the
destination or of the destination itself, never of a second read of the source. A source that somebody still writes
gives a block of mixed bytes, but not one whose checksum lies.
"""

# ruff: noqa: ARG001, PLR0917 -- numba fixes an intrinsic's arguments, and kernels take theirs by position

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kvplug.shm.atomics import memcpy
from kvplug.shm.xxh3 import (
    BLOCK_BYTES,
    STRIPE_BYTES,
    emit_block,
    lanes_on_stack,
    vector_at,
    xxh3_64,
    xxh3_blocks,
    xxh3_finish,
    xxh3_start,
)

__all__ = [
    "copy",
    "copy_batch",
    "copy_hash",
    "copy_hash_batch",
    "gather_multi",
    "gather_runs",
    "hash_batch",
    "scatter_multi",
    "scatter_runs",
    "xxh3_64",
]

_I64 = ir.IntType(64)
_STRIPES = BLOCK_BYTES // STRIPE_BYTES


def _block_copier(nontemporal: bool) -> Any:
    @intrinsic
    def copy_blocks(typingctx: Any, state: Any, dst: Any, src: Any, blocks: Any) -> Any:
        """copy_blocks(state, dst, src, blocks): copies whole blocks and takes them into the hash, in one pass."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            state, dst, src, blocks = args
            lanes_at = cgutils.alloca_once_value(builder, builder.load(vector_at(builder, state), align=8))
            mark = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
            with cgutils.for_range(builder, blocks) as loop:
                offset = builder.mul(loop.index, ir.Constant(_I64, BLOCK_BYTES))
                read, write = builder.add(src, offset), builder.add(dst, offset)
                stripes = []
                for i in range(_STRIPES):
                    stripes.append(builder.load(vector_at(builder, read, STRIPE_BYTES * i), align=1))
                    store = builder.store(
                        stripes[-1], vector_at(builder, write, STRIPE_BYTES * i), align=64 if nontemporal else 1
                    )
                    if nontemporal:
                        store.set_metadata("nontemporal", mark)
                builder.store(emit_block(builder, builder.load(lanes_at), stripes), lanes_at)
            builder.store(builder.load(lanes_at), vector_at(builder, state), align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), codegen

    return copy_blocks


_copy_blocks = _block_copier(nontemporal=False)


@njit(nogil=True, cache=True)
def copy(dst: int, src: int, nbytes: int) -> None:
    """memcpy."""
    memcpy(dst, src, nbytes)


@njit(nogil=True, cache=True)
def copy_hash(dst: int, src: int, nbytes: int) -> int:
    """Copy and return the XXH3 of the bytes that are at `dst` now (bits as int64)."""
    state = lanes_on_stack()
    xxh3_start(state)
    done = 0
    if nbytes > BLOCK_BYTES:
        blocks = (nbytes - 1) // BLOCK_BYTES
        _copy_blocks(state, dst, src, blocks)
        done = blocks * BLOCK_BYTES
    memcpy(dst + done, src + done, nbytes - done)
    return xxh3_finish(state, dst, nbytes)


@njit(nogil=True, cache=True)
def _append(state: int, part: int, at: int, total: int, src: int, nbytes: int) -> int:
    """Copy the next `nbytes` of a part of `total` bytes to `part` + `at`; return the new `at`.

    Invariant: `state` has taken in every block that is whole and has something after it. So a piece that starts on a
    block's edge goes through registers; the others are copied up to the next edge, and the block is hashed where it
    now lies, in the nearest cache.
    """
    followed = (total - 1) // BLOCK_BYTES * BLOCK_BYTES  # where the last block starts, which xxh3_finish takes
    end = at + nbytes
    while at < end:
        inside = at % BLOCK_BYTES
        if inside == 0 and at < followed:
            blocks = (min(end, followed) - at) // BLOCK_BYTES
            if blocks > 0:
                _copy_blocks(state, part + at, src, blocks)
                at += blocks * BLOCK_BYTES
                src += blocks * BLOCK_BYTES
                continue
        piece = min(end - at, BLOCK_BYTES - inside)
        memcpy(part + at, src, piece)
        at += piece
        src += piece
        if at % BLOCK_BYTES == 0 and at <= followed:
            xxh3_blocks(state, part + at - BLOCK_BYTES, 1)
    return at


@njit(nogil=True, cache=True)
def copy_batch(dst_addrs: Any, src_addrs: Any, nbytes: Any) -> None:
    """Copy N ranges. dst_addrs, src_addrs, nbytes: int64[N]."""
    for i in range(len(nbytes)):
        memcpy(dst_addrs[i], src_addrs[i], nbytes[i])


@njit(nogil=True, cache=True)
def copy_hash_batch(dst_addrs: Any, src_addrs: Any, nbytes: Any, out_hash: Any) -> None:
    """Copy N ranges and put the XXH3 of each into out_hash. All int64[N]."""
    for i in range(len(nbytes)):
        out_hash[i] = copy_hash(dst_addrs[i], src_addrs[i], nbytes[i])


@njit(nogil=True, cache=True)
def hash_batch(addrs: Any, nbytes: Any, out_hash: Any) -> None:
    """XXH3 of N ranges where they lie. All int64[N]."""
    for i in range(len(nbytes)):
        out_hash[i] = xxh3_64(addrs[i], nbytes[i])


@njit(nogil=True, cache=True)
def gather_runs(block_ids: Any, dst_addrs: Any, run_base: Any, run_stride: Any, run_nbytes: Any, out_hash: Any) -> None:
    """An engine's blocks to slots: part i becomes R runs, one after another without gaps.

    Run r of block b lies at run_base[r] + b * run_stride[r] and has run_nbytes[r] bytes (a layer's K, say).
    block_ids, dst_addrs: int64[N]; run_base, run_stride, run_nbytes: int64[R]; out_hash: int64[N], the XXH3 of each
    whole part.
    """
    state = lanes_on_stack()
    total = run_nbytes.sum()
    for i in range(len(block_ids)):
        xxh3_start(state)
        at = 0
        for r in range(len(run_base)):
            src = run_base[r] + block_ids[i] * run_stride[r]
            at = _append(state, dst_addrs[i], at, total, src, run_nbytes[r])
        out_hash[i] = xxh3_finish(state, dst_addrs[i], total)


@njit(nogil=True, cache=True)
def scatter_runs(block_ids: Any, src_addrs: Any, run_base: Any, run_stride: Any, run_nbytes: Any) -> None:
    """Slots to an engine's blocks, the way back of :func:`gather_runs`; src_addrs: int64[N], the parts."""
    for i in range(len(block_ids)):
        src = src_addrs[i]
        for r in range(len(run_base)):
            memcpy(run_base[r] + block_ids[i] * run_stride[r], src, run_nbytes[r])
            src += run_nbytes[r]


@njit(nogil=True, cache=True)
def gather_multi(offsets: Any, frag_addrs: Any, frag_nbytes: Any, dst_addrs: Any, out_hash: Any) -> None:
    """Scattered fragments to parts: part i becomes fragments offsets[i] … offsets[i+1]-1, one after another.

    offsets: int64[N+1], ascending; frag_addrs, frag_nbytes: int64[M], lengths may be 0; dst_addrs: int64[N];
    out_hash: int64[N], the XXH3 of each whole part.
    """
    state = lanes_on_stack()
    for i in range(len(dst_addrs)):
        total = frag_nbytes[offsets[i] : offsets[i + 1]].sum()
        xxh3_start(state)
        at = 0
        for f in range(offsets[i], offsets[i + 1]):
            at = _append(state, dst_addrs[i], at, total, frag_addrs[f], frag_nbytes[f])
        out_hash[i] = xxh3_finish(state, dst_addrs[i], total)


@njit(nogil=True, cache=True)
def scatter_multi(offsets: Any, frag_addrs: Any, frag_nbytes: Any, src_addrs: Any) -> None:
    """Parts to scattered fragments, the way back of :func:`gather_multi`; src_addrs: int64[N], the parts."""
    for i in range(len(src_addrs)):
        src = src_addrs[i]
        for f in range(offsets[i], offsets[i + 1]):
            memcpy(frag_addrs[f], src, frag_nbytes[f])
            src += frag_nbytes[f]
