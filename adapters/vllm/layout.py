"""Where the bytes of a block lie in this worker's memory, from the cache tensors that the engine registers.

A block is opaque: whole blocks are copied, never slices by token, since backends pack bytes inside a block as they
like. What is worked out here is only which byte ranges belong to block b of a group: for each layer of the group the
dense runs of its page. A layout that does not come out as a few dense runs is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvplug.adapters.devices.base import ByteRuns
from kvplug.errors import UnsupportedEngineError

MAX_RUNS_PER_LAYER = 64
Run = tuple[int, int, int]


@dataclass(frozen=True)
class LayerPage:
    """What another process must know of a layer's share of a block; it goes into the namespace."""

    layer: str
    nbytes: int
    shape: str
    """Element type, and shape and strides inside a block: whoever reads the bytes must see them alike."""


@dataclass(frozen=True)
class GroupBytes:
    """One cache group in this worker."""

    runs: ByteRuns
    pages: tuple[LayerPage, ...]

    @property
    def part_nbytes(self) -> int:
        """Bytes of this worker's part of one block; 0 where it has no layer of the group."""
        return self.runs.part_nbytes


def group_bytes(layers: Sequence[str], caches: Mapping[str, Any]) -> GroupBytes:
    """The byte runs of a group.

    Args:
        layers: the group's layer names in this worker, in the engine's order.
        caches: per layer a tensor whose first dimension is the scheduler's blocks.
    """
    runs: list[Run] = []
    pages = []
    for layer in layers:
        cache = caches.get(layer)
        if cache is None or not hasattr(cache, "data_ptr"):
            raise UnsupportedEngineError(f"layer {layer} has no cache tensor of its own")
        own = [run for run in tensor_runs(cache) if run not in runs]  # layers that share a cache count once
        if not own:
            continue
        runs += own
        inner = tuple(cache.shape[1:]), tuple(cache.stride()[1:])
        pages.append(LayerPage(layer, sum(run[2] for run in own), f"{cache.dtype} {inner[0]} {inner[1]}"))
    return GroupBytes(ByteRuns.of(merge(runs)), tuple(pages))


def tensor_runs(cache: Any) -> list[Run]:
    """(address, stride between blocks, length) of each dense run of a block, all in bytes."""
    item = cache.element_size()
    dims = sorted(
        ((stride, size) for size, stride in zip(cache.shape[1:], cache.stride()[1:], strict=True) if size > 1)
    )
    length, outer = 1, list[tuple[int, int]]()
    for stride, size in dims:
        if stride <= 0:
            raise UnsupportedEngineError("a cache tensor repeats its own bytes")
        if stride == length and not outer:
            length *= size
        else:
            outer.append((stride, size))
    count = 1
    for _, size in outer:
        count *= size
    if count > MAX_RUNS_PER_LAYER:
        raise UnsupportedEngineError(f"a block of one layer lies in {count} pieces of {length * item} bytes")
    steps = [[stride * i for i in range(size)] for stride, size in reversed(outer)]
    offsets = sorted(sum(choice) for choice in itertools.product(*steps))
    base, between = cache.data_ptr(), cache.stride(0) * item
    return [(base + offset * item, between, length * item) for offset in offsets]


def merge(runs: Sequence[Run]) -> list[Run]:
    """Joins runs that follow each other in memory as well: fewer, longer copies of the same bytes in the same order."""
    out: list[Run] = []
    for base, stride, nbytes in runs:
        if out and out[-1][1] == stride and out[-1][0] + out[-1][2] == base:
            out[-1] = (out[-1][0], stride, out[-1][2] + nbytes)
        else:
            out.append((base, stride, nbytes))
    return out
