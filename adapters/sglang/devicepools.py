"""Where the bytes of a page lie on the device, for every page pool of a model, as the linker moves them.

SGLang numbers pages apart for full attention, for sliding windows and for recurrent states: three *sources*. All
device buffers that one source's page numbers index make up one block of kvplug: for each layer, in order, the bytes
of every buffer of that layer (K, then V, say). So what one layer needs is one contiguous range of the block, and a
load can go layer by layer, ahead of the forward pass that consumes it.

Which buffers a model has is found out in ``compat_pools.py``; here they are only checked and laid out. A buffer that
is not dense is refused, not guessed at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvplug.adapters.devices import device_of
from kvplug.adapters.devices.base import ByteRuns, Int64s
from kvplug.errors import EngineContractError, UnsupportedEngineError
from kvplug.identity.canonical import Value

KV, SWA, MAMBA = "kv", "swa", "mamba"
SOURCES = (KV, SWA, MAMBA)
"""In SGLang's own names (PoolName). A page of the last is one state, which is the sequence's at the page's end."""


@dataclass(frozen=True)
class LayerBuffer:
    """One tensor that holds something of one layer, for every page of a source.

    The first dimension counts rows; a page is ``rows_per_page`` rows that follow each other, page 0 first.
    """

    layer: int
    """As the layer counter counts: from 0 on this rank."""
    tensor: Any
    rows_per_page: int


@dataclass(frozen=True)
class LayerRuns:
    """One layer's share of a block."""

    runs: ByteRuns
    offset: int
    """Where it begins in the block, in bytes."""


@dataclass(frozen=True)
class SourcePool:
    """All that one source's page numbers index."""

    name: str
    page_tokens: int
    """Entries of SGLang's index tensors per page: tokens, or 1 for states."""
    num_pages: int
    runs: ByteRuns
    layers: tuple[LayerRuns | None, ...]
    """Per layer; None where the layer keeps nothing under this source."""
    description: tuple[Value, ...]

    @property
    def block_nbytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.runs.part_nbytes

    def block_ids(self, indices: Any) -> Int64s:
        """Page numbers, int64[N], from SGLang's index tensor of N·page_tokens entries on any device.

        EngineContractError unless they are whole pages, aligned and inside the pool: what else they could be is
        unknown, and a copy to or from them could touch another request's pages.
        """
        slots = np.asarray(indices.detach().to("cpu").numpy(), dtype=np.int64).reshape(-1)
        span = self.page_tokens
        if len(slots) % span:
            raise EngineContractError(f"pool {self.name!r}: {len(slots)} indices are no pages of {span}")
        pages = slots.reshape(-1, span)
        ids = pages[:, 0] // span
        if not np.array_equal(pages, ids[:, None] * span + np.arange(span)):
            at = int(np.flatnonzero((pages != ids[:, None] * span + np.arange(span)).any(axis=1))[0])
            raise EngineContractError(
                f"pool {self.name!r}: the indices of page {at} of {len(ids)}, from {int(pages[at, 0])} on, "
                f"are not an aligned page of {span}"
            )
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.num_pages):
            raise EngineContractError(
                f"pool {self.name!r}: pages {int(ids.min())} to {int(ids.max())} of a pool with {self.num_pages}"
            )
        return np.ascontiguousarray(ids)


@dataclass(frozen=True)
class DevicePools:
    """A model's page pools on this rank."""

    sources: dict[str, SourcePool]
    num_layers: int
    replicated: bool
    """Every rank of the attention's group holds the same bytes."""
    device: str
    """Of all their buffers, as torch writes it."""

    @property
    def layouts(self) -> list[ByteRuns]:
        """All byte runs that are copied: whole pages out of the device, single layers back."""
        pools = self.sources.values()
        return [pool.runs for pool in pools] + [part.runs for pool in pools for part in pool.layers if part is not None]

    def describe(self) -> dict[str, Value]:
        """What another engine's blocks must agree on to be interchangeable; for the namespace."""
        return {
            "form": "linker 1",
            "layers": self.num_layers,
            "sources": {name: list(pool.description) for name, pool in self.sources.items()},
        }


def lay_out(
    buffers: Mapping[str, Sequence[LayerBuffer]], page_tokens: dict[str, int], num_layers: int, *, replicated: bool
) -> DevicePools:
    """Checks a model's buffers and lays them out.

    Args:
        buffers: per source, its buffers in any order of layers; within a layer in the order of the block.
        page_tokens: per source, see :attr:`SourcePool.page_tokens`.
        num_layers: how many the layer counter counts.
        replicated: see :attr:`DevicePools.replicated`.

    Raises:
        UnsupportedEngineError: a buffer that is not dense, or nothing to store.
    """
    sources = {
        name: _source(name, sorted(some, key=lambda buffer: buffer.layer), page_tokens[name], num_layers)
        for name, some in buffers.items()
    }
    if KV not in sources:
        raise UnsupportedEngineError("this model keeps no pages for full attention")
    device = device_of(buffer.tensor for some in buffers.values() for buffer in some)
    return DevicePools(sources, num_layers, replicated, device)


def _source(name: str, buffers: Sequence[LayerBuffer], page_tokens: int, num_layers: int) -> SourcePool:
    if not buffers:
        raise UnsupportedEngineError(f"pool {name!r} has no buffers")
    if not 0 <= buffers[0].layer <= buffers[-1].layer < num_layers:
        raise UnsupportedEngineError(
            f"pool {name!r} has layers {buffers[0].layer} to {buffers[-1].layer} of {num_layers}"
        )
    runs = ByteRuns.of([_run(name, buffer) for buffer in buffers])
    starts = np.concatenate(([0], np.cumsum(runs.nbytes)))
    of_layer = np.array([buffer.layer for buffer in buffers])
    layers: list[LayerRuns | None] = []
    for layer in range(num_layers):
        first, last = (int(at) for at in np.searchsorted(of_layer, [layer, layer + 1]))
        part = ByteRuns(*(np.ascontiguousarray(a[first:last]) for a in (runs.base, runs.stride, runs.nbytes)))
        layers.append(LayerRuns(part, int(starts[first])) if last > first else None)
    return SourcePool(
        name=name,
        page_tokens=page_tokens,
        num_pages=min(buffer.tensor.shape[0] // buffer.rows_per_page for buffer in buffers),
        runs=runs,
        layers=tuple(layers),
        description=(page_tokens, *_described(buffers)),
    )


def _described(buffers: Iterable[LayerBuffer]) -> Iterable[Value]:
    for buffer in buffers:
        tensor = buffer.tensor
        yield [buffer.layer, str(tensor.dtype), [int(size) for size in tensor.shape[1:]], buffer.rows_per_page]


def _run(name: str, buffer: LayerBuffer) -> tuple[int, int, int]:
    """(address of page 0, bytes from page to page, bytes of a page)."""
    tensor, rows = buffer.tensor, buffer.rows_per_page
    inner = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size > 1 and stride != inner:
            raise UnsupportedEngineError(f"pool {name!r}: a row of layer {buffer.layer} is not dense")
        inner *= size
    step = tensor.stride(0)
    if inner == 0 or step < inner or (rows > 1 and step != inner):
        raise UnsupportedEngineError(f"pool {name!r}: the rows of a page of layer {buffer.layer} do not lie together")
    item = tensor.element_size()
    return tensor.data_ptr(), rows * step * item, ((rows - 1) * step + inner) * item
