"""A plugin of SGLang's: HiCache's copies between the device's pools and the host's, where the device is the CPU.

SGLang has them as CUDA kernels only. These are the ones of the "direct" back-end, for the layouts ``layer_first`` and
``page_first_direct``; indices are of tokens, whole pages in order.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

HOST_POOLS = ("mha", "mla", "mamba", "dsa", "unified")


def install() -> None:
    """Called by SGLang in each of its processes, before a pool is made."""
    from sglang.srt.mem_cache.pool_host import base, common

    common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0  # 10 GB, which a machine for tests need not have
    for name in HOST_POOLS:
        try:
            module = importlib.import_module(f"sglang.srt.mem_cache.pool_host.{name}")
        except ModuleNotFoundError:  # not in this release
            continue
        for copy in (
            transfer_kv_direct,
            transfer_kv_all_layer_direct_lf_pf,
            transfer_kv_per_layer_direct_pf_lf,
        ):
            setattr(module, copy.__name__, copy)
    torch.cpu.Stream.synchronize = lambda self: None  # type: ignore[method-assign, attr-defined]


def _allocate(dims: Any, dtype: Any, device: Any, pin_memory: bool, allocator: Any, *_: Any, **__: Any) -> Any:
    return allocator.allocate(dims, dtype=dtype, device=device)


def _pages(indices: torch.Tensor, page_size: int) -> torch.Tensor:
    return indices.view(-1, page_size)[:, 0].div(page_size, rounding_mode="floor")


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Tokens of each layer to tokens of the same layer."""
    for src, dst in zip(src_layers, dst_layers, strict=True):
        rows = src[src_indices]
        dst[dst_indices] = rows.reshape(len(rows), *dst.shape[1:])


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Device to host. ``src_ptrs``: per buffer of the host (K, then V; or one), its layers [tokens, ...]; ``dst_ptrs``:
    [pages, layers, page_size, ...]."""
    pages = _pages(dst_indices, page_size)
    layers = len(src_ptrs) // len(dst_ptrs)
    for i, dst in enumerate(dst_ptrs):
        for layer in range(layers):
            rows = src_ptrs[i * layers + layer][src_indices]
            dst[pages, layer] = rows.reshape(len(pages), page_size, *dst.shape[3:])


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Host to device, one layer of each of the host's buffers."""
    pages = _pages(src_indices, page_size)
    for src, dst in zip(src_ptrs, dst_ptrs, strict=True):
        dst[dst_indices] = src[pages, layer_id].reshape(len(dst_indices), *dst.shape[1:])
