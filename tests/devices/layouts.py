"""How engines lay out a block in device memory: the same shapes and strides that they use, over a plain arena of bytes.

A layout is built over any arena of its size, on any device, so the same one can be built over a copy on the host: what
a copy must do to the arena is worked out there with torch's own indexing, without the byte runs that are on trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvplug.adapters.devices.base import ByteRuns
from kvplug.adapters.sglang.devicepools import KV, MAMBA, SWA, LayerBuffer, SourcePool, lay_out
from kvplug.adapters.vllm.layout import group_bytes

GUARD_BYTES = 192
"""Left before, between and behind the tensors of an arena."""


@dataclass(frozen=True)
class Built:
    """A layout over one arena."""

    runs: ByteRuns
    views: Sequence[Any]
    """Tensors whose first dimension is the block; together, in this order, they hold a block's bytes."""
    pool: SourcePool | None = None
    """SGLang's: what is loaded layer by layer."""

    def get(self, block: int) -> np.ndarray:
        """A block's bytes in the order of a slot part; the arena must be on the host."""
        return np.concatenate([_in_memory_order(view[block]).numpy() for view in self.views])

    def put(self, block: int, content: np.ndarray) -> None:
        """Overwrites a block, whose arena must be on the host."""
        at = 0
        for view in self.views:
            one = view[block]
            order = _strides_down(one)
            nbytes = one.numel() * one.element_size()
            shape = [one.shape[axis] for axis in order]
            given = torch.from_numpy(content[at : at + nbytes].copy()).view(one.dtype).reshape(shape)
            one.permute(order).copy_(given)
            at += nbytes


@dataclass(frozen=True)
class Layout:
    """Named, with the bytes that its arena must have."""

    name: str
    nbytes: int
    num_blocks: int
    build: Callable[[Any], Built]


def _strides_down(tensor: Any) -> list[int]:
    return sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))


def _in_memory_order(tensor: Any) -> Any:
    return tensor.permute(_strides_down(tensor)).contiguous().reshape(-1).view(torch.uint8)


class _Carver:
    """Cuts tensors out of an arena, or, without one, only counts what they need."""

    def __init__(self, arena: Any = None) -> None:
        self.arena = arena
        self.at = GUARD_BYTES

    def cut(self, dtype: Any, *shape: int) -> Any:
        """A dense tensor of this shape."""
        item = torch.empty(0, dtype=dtype).element_size()
        start = -(-self.at // 64) * 64
        nbytes = math.prod(shape) * item
        self.at = start + nbytes + GUARD_BYTES
        if self.arena is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self.arena[start : start + nbytes].view(dtype).reshape(shape)


def _layout(name: str, num_blocks: int, make: Callable[[_Carver], Any], finish: Callable[[Any], Built]) -> Layout:
    counter = _Carver()
    make(counter)
    return Layout(name, counter.at, num_blocks, lambda arena: finish(make(_Carver(arena))))


def _vllm(caches: Sequence[Any]) -> Built:
    named = {f"layer.{i}": cache for i, cache in enumerate(caches)}
    return Built(group_bytes(list(named), named).runs, caches)


@dataclass(frozen=True)
class Shape:
    """A model's numbers, small or as large as real ones are."""

    blocks: int
    layers: int
    tokens: int
    heads: int
    width: int
    dtype: Any


def vllm_layouts(s: Shape) -> list[Layout]:
    """vLLM's: tensors per layer as its backends shape them, cut out of larger ones where it does so."""
    n, inner = s.blocks, (s.tokens, s.heads, s.width)
    layers = range(s.layers)

    def each(*shape: int) -> Callable[[_Carver], Any]:
        return lambda carver: [carver.cut(s.dtype, *shape) for _ in layers]

    dense = s.tokens * s.heads * s.width * 2
    packed = math.prod(inner) + math.prod(inner) // 2
    return [
        _layout("vllm: keys and values of a block together", n, each(n, 2, *inner), _vllm),
        _layout("vllm: keys apart from values", n, each(2, n, *inner), lambda t: _vllm([c.transpose(0, 1) for c in t])),
        _layout("vllm: heads before tokens", n, each(n, 2, *inner), lambda t: _vllm([c.transpose(2, 3) for c in t])),
        _layout(
            "vllm: tokens of every head apart",
            n,
            each(n, 2, s.heads, s.tokens, s.width),
            lambda t: _vllm([c.permute(0, 1, 3, 2, 4) for c in t]),
        ),
        _layout("vllm: keys and values in one row", n, each(n, s.tokens, s.heads, 2 * s.width), _vllm),
        _layout(
            "vllm: pages padded to another group's",
            n,
            each(n, dense + 16),
            lambda t: _vllm([c[:, :dense].unflatten(1, (2, *inner)) for c in t]),
        ),
        _layout(
            "vllm: all layers in one block",
            n,
            lambda carver: carver.cut(s.dtype, n, s.layers, 2, *inner),
            lambda t: _vllm([t[:, layer] for layer in layers]),
        ),
        _layout(
            "vllm: layers share a block, one is left out",
            n,
            lambda carver: carver.cut(s.dtype, n, s.layers + 1, 2, *inner),
            lambda t: _vllm([t[:, layer] for layer in layers if layer != 1]),
        ),
        _layout("vllm: packed bytes, scales behind", n, each(n, packed), _vllm),
        _layout("vllm: latent attention", n, each(n, s.tokens, s.heads * s.width + 8), _vllm),
        _layout(
            "vllm: a block is several of the kernel's",
            n,
            each(n * 2, 2, s.tokens, s.heads, s.width),
            lambda t: _vllm([c.unflatten(0, (n, 2)) for c in t]),
        ),
    ]


def _sglang(source: str, rows: int, of_layer: Sequence[tuple[int, Any]], num_layers: int) -> Built:
    buffers = {source: [LayerBuffer(layer, tensor, rows) for layer, tensor in of_layer]}
    if source != KV:  # a model always has pages for full attention
        buffers[KV] = [LayerBuffer(0, torch.empty((rows, 8), device=of_layer[0][1].device), rows)]
    pools = lay_out(buffers, dict.fromkeys(buffers, rows), num_layers, replicated=False)
    pool = pools.sources[source]
    return Built(pool.runs, [tensor.unflatten(0, (-1, rows)) for _, tensor in of_layer], pool)


def sglang_layouts(s: Shape) -> list[Layout]:
    """SGLang's: K and V pools token by token, layer first or page first, latent, and states."""
    n, rows = s.blocks, s.tokens

    def pairs(k: Any, v: Any) -> list[tuple[int, Any]]:
        return [(layer, pool[layer]) for layer in range(s.layers) for pool in (k, v)]

    def two(*shapes: tuple[int, ...]) -> Callable[[_Carver], Any]:
        return lambda carver: [[carver.cut(s.dtype, *shape) for _ in range(s.layers)] for shape in shapes]

    inner = (s.heads, s.width)
    return [
        _layout(
            "sglang: layer first",
            n,
            two((n * rows, *inner), (n * rows, *inner)),
            lambda t: _sglang(KV, rows, pairs(*t), s.layers),
        ),
        _layout(
            "sglang: values of another width",
            n,
            two((n * rows, *inner), (n * rows, s.heads, s.width // 2 + 4)),
            lambda t: _sglang(KV, rows, pairs(*t), s.layers),
        ),
        _layout(
            "sglang: heads before tokens",
            n,
            two((n, s.heads, rows, s.width), (n, s.heads, rows, s.width)),
            lambda t: _sglang(KV, 1, pairs(*t), s.layers),
        ),
        _layout(
            "sglang: page first",
            n,
            lambda carver: [carver.cut(s.dtype, n, s.layers, rows, *inner) for _ in range(2)],
            lambda t: _sglang(KV, 1, pairs(*([pool[:, layer] for layer in range(s.layers)] for pool in t)), s.layers),
        ),
        _layout(
            "sglang: latent attention",
            n,
            two((n * rows, 1, s.width + 8)),
            lambda t: _sglang(KV, rows, list(enumerate(t[0])), s.layers),
        ),
        _layout(
            "sglang: sliding windows on some layers",
            n,
            two((n * rows, *inner), (n * rows, *inner)),
            lambda t: _sglang(SWA, rows, pairs(*t)[::2], s.layers),
        ),
        _layout(
            "sglang: states and convolutions",
            n,
            two((n, 3, s.width), (n, s.width + 1)),
            lambda t: _sglang(MAMBA, 1, pairs(*t), s.layers),
        ),
    ]


def odd_layout(rng: np.random.Generator, most_bytes: int = 5000) -> Layout:
    """Runs of any length at any address: nothing that an engine does today, and nothing in the interface forbids it."""
    lengths = rng.choice([1, 2, 3, 7, 8, 13, 63, 64, 65, 127, 240, 1000, 1023, most_bytes | 1], rng.integers(1, 7))
    gaps = rng.integers(0, 40, len(lengths))
    blocks = int(rng.integers(3, 20))
    starts = GUARD_BYTES + np.cumsum([0, *((lengths + gaps) * blocks + rng.integers(0, 64, len(lengths)))[:-1]])
    end = int(starts[-1] + (lengths[-1] + gaps[-1]) * blocks) + GUARD_BYTES

    def build(arena: Any) -> Built:
        views = [
            arena[start : start + (length + gap) * blocks].view(blocks, length + gap)[:, :length]
            for start, length, gap in zip(starts.tolist(), lengths.tolist(), gaps.tolist(), strict=True)
        ]
        runs = [(view.data_ptr(), view.stride(0), view.shape[1]) for view in views]
        return Built(ByteRuns.of(runs), views)

    return Layout(f"odd runs {lengths.tolist()}", end, blocks, build)


DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
"""One element type for every size that there is."""


def narrow(itemsize: int) -> Shape:
    """A few hundred bytes a run."""
    return Shape(blocks=14, layers=3, tokens=4, heads=2, width=8, dtype=DTYPES[itemsize])


def wide(itemsize: int) -> Shape:
    """Runs as real models have them: 8 to 64 KiB, and 256 KiB where all layers share a block."""
    return Shape(blocks=40, layers=4, tokens=16, heads=4, width=128 // itemsize * 2, dtype=DTYPES[itemsize])


NAMES = [layout.name for layout in (*vllm_layouts(narrow(2)), *sglang_layouts(narrow(2)))]


def layout_of(name: str, shape: Shape) -> Layout:
    """One by its name."""
    return next(layout for layout in (*vllm_layouts(shape), *sglang_layouts(shape)) if layout.name == name)
