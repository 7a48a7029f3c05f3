"""SGLang's device page pools: which buffers a model's pages lie in. Like ``compat.py``, this knows SGLang's insides.

Plain pools are read here, each by its exact type: a subclass may keep its bytes in another way. For the others
SGLang's own list for linkers is taken (it covers DeepSeek's sparse attention and hybrid recurrent models), where it is
as plain as kvplug needs it. Everything else is refused with one line.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvplug.adapters.common.hooks import put_around
from kvplug.adapters.sglang.devicepools import KV, MAMBA, SOURCES, SWA, DevicePools, LayerBuffer, lay_out
from kvplug.errors import UnsupportedEngineError

_COMPONENT_SOURCES = {"FULL": KV, "SWA": SWA, "MAMBA": MAMBA}
Buffers = dict[str, list[LayerBuffer]]


def device_pools(params: Any, components: Iterable[Any]) -> DevicePools:
    """The page pools behind a prefix cache.

    Args:
        params: what SGLang builds its prefix cache from (``CacheInitParams``).
        components: kinds of state that the cache keeps per node (``ComponentType``).

    Raises:
        UnsupportedEngineError: not every byte of a page is accounted for.
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
    from sglang.srt.runtime_context import get_parallel

    components = set(components)
    kvcache = params.token_to_kv_pool_allocator.get_kvcache()
    page = int(params.page_size)
    if int(params.pp_size) > 1:  # SGLang does not make the stages agree on what they found
        raise UnsupportedEngineError("linker mode with pipeline parallelism: use --kvplug-mode hicache")
    if int(get_parallel().attn_dcp_size) > 1:
        raise UnsupportedEngineError(
            "decode context parallelism splits a page over ranks in a way kvplug does not know"
        )
    drafts = [name for name in ("mtp_draft_device_pools", "sidecar_draft_device_pools") if getattr(params, name, ())]
    kind = type(kvcache)
    if kind is MHATokenToKVPool or kind is MLATokenToKVPool:
        _without_drafts(drafts)
        layers = {layer: layer for layer in range(kvcache.layer_num)}
        pools = lay_out(
            {KV: _plain(kvcache, layers, page)}, {KV: page}, kvcache.layer_num, replicated=kind is MLATokenToKVPool
        )
    elif kind is SWAKVPool:
        _without_drafts(drafts)
        pools = _sliding_window(kvcache, page)
    else:
        pools = _as_sglang_lists(kvcache, params, page, components)
    expected = {_COMPONENT_SOURCES.get(component.name, component.name) for component in components}
    if set(pools.sources) != expected:
        raise UnsupportedEngineError(
            f"this prefix cache keeps {', '.join(sorted(expected))}, its page pools {', '.join(sorted(pools.sources))}"
        )
    return pools


def device_pages(params: Any) -> int:
    """Pages of the device pool for full attention."""
    return max(1, int(params.token_to_kv_pool_allocator.get_kvcache().size) // int(params.page_size))


def watch_hits() -> None:
    """From now on a linker is told where SGLang keeps its hits and how ranks agree (``attached``), and of each match
    (``matched``).

    SGLang tells a linker of what it looks up and of what it loads, not of hits that it drops. To be called before it
    puts its wrapper around the linker. UnsupportedEngineError if that wrapper is not the one that kvplug knows.
    """
    from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper as Wrapper
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache as Tree

    for function, names in (
        (Wrapper.__init__, ("self", "cache", "cache_linker")),
        (Wrapper.match, ("self", "key", "req", "result")),
        (Tree._all_reduce_attn_groups, ("self", "tensor", "op")),
    ):
        found = tuple(inspect.signature(function).parameters)
        if found != names:
            raise UnsupportedEngineError(f"SGLang's {function.__qualname__} takes {found}, not {names}")
    put_around(Wrapper, "__init__", _watched_init)
    put_around(Wrapper, "match", _watched_match)


def _watched_init(made: Any) -> Any:
    @functools.wraps(made)
    def watched_init(self: Any, cache: Any, cache_linker: Any) -> None:
        made(self, cache, cache_linker)
        if hasattr(cache_linker, "attached"):
            cache_linker.attached(self.hit_markers, functools.partial(_agree, cache))

    return watched_init


def _watched_match(match: Any) -> Any:
    @functools.wraps(match)
    def watched_match(self: Any, key: Any, req: Any, result: Any) -> Any:
        # What an earlier match found is void, also where this one asks nobody: SGLang would keep it for ever then.
        self.hit_markers.pop(req.rid, None)
        out = match(self, key, req, result)
        if hasattr(self.cache_linker, "matched"):
            marker = self.hit_markers.get(req.rid)
            self.cache_linker.matched(req.rid, len(marker.tail_hashes) if marker is not None else 0)
        return out

    return watched_match


def _agree(cache: Any, statements: Sequence[bool]) -> list[bool]:
    """For each statement whether it holds on all ranks that schedule alike, which all have to ask at the same time."""
    import torch

    held = torch.tensor([int(each) for each in statements], dtype=torch.int)
    cache._all_reduce_attn_groups(held, torch.distributed.ReduceOp.MIN)
    return [bool(each) for each in held.tolist()]


def _without_drafts(drafts: list[str]) -> None:
    if drafts:
        raise UnsupportedEngineError("linker mode with a draft model on this kind of page pool")


def _plain(pool: Any, layers: Mapping[int, int], page: int) -> list[LayerBuffer]:
    """Buffers of a plain MHA or MLA pool. ``layers``: the layer counter's number to the pool's own."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    if pool.page_size != page:
        raise UnsupportedEngineError(f"a page pool with pages of {pool.page_size} tokens where the cache has {page}")
    scales = ("k_scale_buffer", "v_scale_buffer", "native_k_scale_buffer", "native_v_scale_buffer", "kv_scale_buffer")
    if any(getattr(pool, name, None) is not None for name in scales) or getattr(pool, "layer_shard_enabled", False):
        raise UnsupportedEngineError(f"{type(pool).__name__} with scales or sharded layers")
    if type(pool) is MHATokenToKVPool:
        if pool.is_quantized_kv_cache or pool.kv_cache_layout not in ("nhd", "hnd"):
            raise UnsupportedEngineError(f"an MHA page pool that is quantised or laid out as {pool.kv_cache_layout!r}")
        heads = pool.head_num
        by_heads = pool.kv_cache_layout == "hnd"  # a row is a page then, else a token: of pages of one token, too
        rows, inner = (1, (heads, page)) if by_heads else (page, (heads,))
        expected = [(*inner, pool.head_dim), (*inner, pool.v_head_dim)]
        buffers = [pool.k_buffer, pool.v_buffer]
    elif type(pool) is MLATokenToKVPool:
        if pool.use_dsa:
            raise UnsupportedEngineError("an MLA page pool for sparse attention")
        rows, expected, buffers = page, [(1, pool.kv_cache_dim)], [pool.kv_buffer]
    else:
        raise UnsupportedEngineError(f"a page pool of type {type(pool).__name__}")
    out = []
    for layer, own in layers.items():
        for some, shape in zip(buffers, expected, strict=True):
            tensor = some[own]
            if tuple(tensor.shape[1:]) != shape or tensor.dtype != pool.store_dtype:
                raise UnsupportedEngineError(
                    f"{type(pool).__name__}: a buffer of {tensor.dtype} {tuple(tensor.shape)}, "
                    f"not {pool.store_dtype} (…, {', '.join(map(str, shape))})"
                )
            out.append(LayerBuffer(layer, tensor, rows))
    return out


def _sliding_window(kvcache: Any, page: int) -> DevicePools:
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    if getattr(kvcache, "swa_req_ring_size", None) is not None or getattr(kvcache, "request_window", None) is not None:
        raise UnsupportedEngineError("sliding windows that are kept per request, not in pages")
    layers: dict[bool, dict[int, int]] = {False: {}, True: {}}
    for layer, (own, windowed) in kvcache.layers_mapping.items():
        layers[bool(windowed)][int(layer)] = int(own)
    if not layers[False]:
        raise UnsupportedEngineError("a model in which every layer has a sliding window")
    buffers = {
        KV: _plain(kvcache.full_kv_pool, layers[False], page),
        SWA: _plain(kvcache.swa_kv_pool, layers[True], page),
    }
    kinds = {type(kvcache.full_kv_pool), type(kvcache.swa_kv_pool)}
    return lay_out(buffers, {KV: page, SWA: page}, kvcache.layer_num, replicated=kinds == {MLATokenToKVPool})


def _as_sglang_lists(kvcache: Any, params: Any, page: int, components: set[Any]) -> DevicePools:
    """From SGLang's own list of what a linker has to move, entry by entry in its order."""
    from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import resolve_hybrid_device_pool_group

    try:
        group = resolve_hybrid_device_pool_group(kvcache=kvcache, page_size=page, params=params, components=components)
    except Exception as error:  # whatever stops SGLang there stops us
        raise UnsupportedEngineError(f"no linker for {type(kvcache).__name__}: {error}") from error
    buffers: Buffers = {}
    spans: dict[str, int] = {}
    for entry in group.entries:
        source = str(entry.indices_from_pool.value)
        if source not in SOURCES or entry._index_mapper is not None:
            raise UnsupportedEngineError(
                f"pool {entry.name.value!r} of {type(kvcache).__name__} is indexed in its own way"
            )
        span = int(entry.page_size)
        if spans.setdefault(source, span) != span:
            raise UnsupportedEngineError(f"pools of {type(kvcache).__name__} that share pages of different sizes")
        rows = int(entry._row_span)
        for layer, mapped in entry.layer_mapping.items():
            for component in entry.components:
                for at in [mapped] if isinstance(mapped, int) else mapped:
                    buffers.setdefault(source, []).append(LayerBuffer(int(layer), component[at], rows))
    listed = sum(len(component) for entry in group.entries for component in entry.components)
    if sum(map(len, buffers.values())) != listed:
        raise UnsupportedEngineError(f"{type(kvcache).__name__} has buffers that no layer owns")
    return lay_out(buffers, spans, int(group.num_layers), replicated=bool(group.rank_replicated))
