"""The kernel for small runs: it reads and writes pinned host memory itself, without a copy engine.

A copy engine needs a descriptor for each run and about a microsecond for each descriptor, which a run of a few KiB
does not fill. The kernel gets one table per layout, which stays on the device, and per batch a block id and a slot
address for each block; it works all addresses out by itself. Few programs go over all pieces by turns: a bus is full
with a dozen of them, and the rest of the device belongs to the engine.

Triton's interpreter runs it as well (TRITON_INTERPRET=1), over memory of the host; that is how it is tested where
there is no GPU. This module imports Triton and must only be imported where that is wanted.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import triton
import triton.language as tl

from kvplug.adapters.devices.base import Int64s
from kvplug.adapters.devices.planning import Layout, alignment, cut, word_bytes

PIECE_BYTES = 8192
PROGRAMS = 16
"""Programs of one copy, that is: about so many multiprocessors are kept busy by it."""
WARPS = 4
MIN_LANES = 32
_TYPES = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit(do_not_specialize=["first", "count", "total", "pieces"])
def _move(  # type: ignore[no-untyped-def]
    jobs,
    table,
    first,
    count,
    total,
    pieces,
    TYPE: tl.constexpr,
    LANES: tl.constexpr,
    TO_SLOTS: tl.constexpr,
):
    """Blocks first … first + count of a batch. jobs: block ids, int64[total], and behind them slots, int64[total]."""
    lanes = tl.arange(0, LANES)
    for item in range(tl.program_id(0), count * pieces, tl.num_programs(0)):
        job = first + item // pieces
        piece = item % pieces
        stride = tl.load(table + pieces + piece)
        block = tl.load(table + piece) + tl.load(jobs + job) * stride
        slot = tl.load(jobs + total + job) + tl.load(table + 2 * pieces + piece)
        inside = lanes < tl.load(table + 3 * pieces + piece)
        near = block.to(tl.pointer_type(TYPE)) + lanes
        far = slot.to(tl.pointer_type(TYPE)) + lanes
        if TO_SLOTS:
            tl.store(far, tl.load(near, mask=inside), mask=inside)
        else:
            tl.store(near, tl.load(far, mask=inside), mask=inside)


class KernelCopies:
    """Launches the kernel, and keeps the tables of the layouts that were copied. Thread-safe."""

    def __init__(self, device: Any, *, programs: int = PROGRAMS, piece_bytes: int = PIECE_BYTES) -> None:
        """``device``: of the tables, and of ``jobs``."""
        self._device = device
        self._programs = programs
        self._piece_bytes = piece_bytes
        self._lock = threading.Lock()
        self._tables: dict[tuple[int, int], tuple[Layout, Any, int, int]] = {}

    def copy(self, layout: Layout, jobs: Any, total: int, some: slice, slots: Int64s, *, to_slots: bool) -> None:
        """Moves some blocks of a batch, on the current stream.

        Args:
            layout: the runs to move; it must be the same object every time, since its table is kept by it.
            jobs: int64[2 * total] on the device: block ids, then slot addresses.
            total: blocks of the batch.
            some: which of them.
            slots: the slot addresses once more, on the host.
            to_slots: the direction.
        """
        if not len(layout) or some.stop <= some.start:
            return
        table, lanes, word = self._table(layout, min(alignment(layout), word_bytes(slots)))
        pieces = table.shape[1]
        count = some.stop - some.start
        grid = (min(self._programs, count * pieces),)
        _move[grid](
            jobs, table, some.start, count, total, pieces,
            TYPE=_TYPES[word], LANES=lanes, TO_SLOTS=to_slots, num_warps=WARPS,
        )  # fmt: skip

    def _table(self, layout: Layout, word: int) -> tuple[Any, int, int]:
        """(table, lanes, word). None is ever given up: an engine has a few layouts, and a kernel may be reading one."""
        key = (id(layout), word)
        with self._lock:
            kept = self._tables.get(key)
            if kept is None:
                pieces = cut(layout, word, self._piece_bytes)
                table = torch.from_numpy(pieces.table).to(self._device)  # complete on return: from pageable memory
                lanes = max(MIN_LANES, pieces.lanes)
                kept = self._tables[key] = (layout, table, lanes, word)  # with the layout, so that its id stays its own
        return kept[1:]
