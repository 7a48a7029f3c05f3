"""KvplugStorage with SGLang's own host pools, in a process that has SGLang, and no engine around them.

An engine of one rank is made by hand; host pools, storage backend and pool are real.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.device_pool_info import (
    KVBufferLayout,
    KVBuffers,
    MambaStateBufferInfo,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4PagedHostPool
from sglang.srt.mem_cache.pool_host import base
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost, MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

from kvplug import config as configuration
from kvplug.adapters.sglang import engine as engines
from kvplug.adapters.sglang.engine import RankEngine, Shard
from kvplug.adapters.sglang.metrics import Publisher
from kvplug.adapters.sglang.storage import KvplugStorage
from kvplug.identity.namespace import ByteRun, GroupLayout, Namespace, WeightsIdentity, digest_of
from kvplug.store import KvStore

base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0  # 10 GB, which a machine for tests need not have

PAGE = 16
LAYERS = 3
HEADS = 2
TOKENS = 32 * PAGE
POISON = 0xEE
ALONE = Shard(0, 1)
POOL = ""


class HandMade(RankEngine):
    """A rank's engine without an SGLang engine around it."""

    def __init__(self, shard: Shard, **settings: Any) -> None:
        self._wanted, self._settings = shard, settings
        super().__init__("hicache", {})

    def _start(self, extra: Any, before: RankEngine | None) -> None:
        self.config = configuration.load(**{"pool": POOL, "size": "64mib", "verify": "always", **self._settings})
        self.shard, self.replicated_shard = self._wanted, Shard(0, 1)
        self._secret = bytes(32)
        self.store = KvStore(config=self.config)
        self._publisher = Publisher(self.counts, {})

    def begin(self, layout: Any) -> None:
        self.layout = dict(layout)
        self._loaded = Namespace(
            weights=WeightsIdentity("user", bytes(32)),
            config_digest=digest_of({"layers": LAYERS}),
            quantization=None,
            kv_dtype="bfloat16",
            kv_scales=None,
            draft=None,
            eagle=False,
            engine="sglang",
            engine_version="0",
            device="cpu",
            attention_backend="none",
            cpu_isa=None,
            kv_layout=self.layout,
            groups=(GroupLayout(kind="full", span_tokens=PAGE, shards=((ByteRun("kv", 0),),)),),
            tp=self.shard.count,
            pp=1,
            cp=1,
        )
        self._rename()


def storage(
    kv: Any, *sides: tuple[Any, Any], shard: Shard = ALONE, v1: bool = True, mla: bool = False, **settings: Any
) -> KvplugStorage:
    """A storage backend as SGLang makes one, with these host pools."""
    config = HiCacheStorageConfig(
        tp_rank=shard.index,
        tp_size=shard.count,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=mla,
        enable_storage_metrics=True,
        is_page_first_layout=False,
        model_name="m",
        extra_config={"interface_v1": int(v1)},
        **{name: settings.pop(name) for name in ("tp_lcm_size", "should_split_heads") if name in settings},
    )
    engines.start = lambda mode, extra: HandMade(shard, **settings)
    made = KvplugStorage(config, {})
    made.register_mem_pool_host(kv)
    for name, pool in sides:
        made.register_mem_host_pool_v2(pool, name)
    made.on_host_pools_registered()
    return made


def _pointers(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.uint64)


def mha(layout: str, v_dim: int = 8, cls: type = MHATokenToKVPoolHost) -> Any:
    keys = tuple(torch.zeros(TOKENS // 2, HEADS, 8, dtype=torch.bfloat16) for _ in range(LAYERS))
    values = tuple(torch.zeros(TOKENS // 2, HEADS, v_dim, dtype=torch.bfloat16) for _ in range(LAYERS))
    info = MHABufferInfo(
        buffers=KVBuffers(
            k=keys, v=values, k_data_ptrs=_pointers(keys), v_data_ptrs=_pointers(values), layout=KVBufferLayout.NHD
        ),
        page_size=PAGE,
        head_num=HEADS,
        head_dim=8,
        v_head_dim=v_dim,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return cls(
        info, 2.0, 0, PAGE, layout, pin_memory=False, device_capacity_tokens=TOKENS // 2, start_layer=0,
        end_layer=LAYERS,
    )  # fmt: skip


def mla(layout: str) -> Any:
    rows = tuple(torch.zeros(TOKENS // 2, 1, 24, dtype=torch.bfloat16) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=rows, data_ptrs=_pointers(rows), layer_indices=tuple(range(LAYERS)), device_layer_num=LAYERS,
        page_size=PAGE, kv_lora_rank=16, qk_rope_head_dim=8, kv_cache_dim=24, dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )  # fmt: skip
    return MLATokenToKVPoolHost(
        info, 2.0, 0, PAGE, layout, pin_memory=False, device_capacity_tokens=TOKENS // 2, start_layer=0,
        end_layer=LAYERS, target_layer_num=LAYERS,
    )  # fmt: skip


def mamba(layout: str) -> Any:
    info = MambaStateBufferInfo(
        temporal=torch.zeros(2, 16, 4, 8, dtype=torch.float32),
        conv=(torch.zeros(2, 16, 6, 3, dtype=torch.bfloat16),),
    )
    return MambaPoolHost(info, 2.0, 0, device_capacity=16, pin_memory=False, layout=layout)


def paged(layout: str) -> Any:
    buffers = [torch.zeros(16, 96, dtype=torch.uint8) for _ in range(LAYERS)]
    return DeepSeekV4PagedHostPool("c4", buffers, 96, 32, PAGE, layout=layout, pin_memory=False)


POOLS: dict[str, tuple[Callable[[], Any], bool]] = {
    **{f"mha {name}": (lambda name=name: mha(name), False)
       for name in ("layer_first", "page_first", "page_first_direct", "page_head")},
    **{f"wide values {name}": (lambda name=name: mha(name, 12, AsymmetricMHATokenToKVPoolHost), False)
       for name in ("page_first", "page_first_direct")},
    **{f"mla {name}": (lambda name=name: mla(name), True)
       for name in ("layer_first", "page_first", "page_first_direct")},
    **{f"mamba {name}": (lambda name=name: mamba(name), False) for name in ("page_first", "page_first_direct")},
    **{f"paged {name}": (lambda name=name: paged(name), True)
       for name in ("layer_first", "page_first", "page_first_direct")},
}  # fmt: skip
"""Host pools of SGLang that say where their pages lie, and whether they are a model's whose ranks hold the same."""


def buffers(pool: Any) -> list[torch.Tensor]:
    """All memory of a host pool, as bytes."""
    if hasattr(pool, "get_hybrid_pool_buffer"):
        found = pool.get_hybrid_pool_buffer()
    else:
        found = pool.kv_buffer if isinstance(pool.kv_buffer, (list, tuple)) else [pool.kv_buffer]
    return [b.view(torch.uint8) if b.is_contiguous() else b for b in found]


def fill(pool: Any, seed: int | None) -> None:
    """Random bytes everywhere, or poison."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for buffer in buffers(pool):
        if generator is None:
            buffer.fill_(POISON)
        else:
            buffer.copy_(torch.randint(0, 256, buffer.shape, dtype=torch.uint8, generator=generator))


def indices(pool: Any, pages: list[int]) -> torch.Tensor:
    """Host indices of these pages, page by page."""
    size = pool.page_size
    return torch.cat([torch.arange(p * size, (p + 1) * size) for p in pages])


def flat(pool: Any, page: int) -> bytes:
    """One page's bytes as SGLang itself takes them out, or where it does not, as they lie in its K and V buffers."""
    if isinstance(pool, AsymmetricMHATokenToKVPoolHost):
        rows = slice(page, page + 1) if pool.layout == "page_first_direct" else slice(page * PAGE, (page + 1) * PAGE)
        return b"".join(
            b[rows].contiguous().view(torch.uint8).numpy().tobytes() for b in (pool.k_buffer, pool.v_buffer)
        )
    data = pool.get_data_page(page * pool.page_size, flat=True)
    return bytes(data.contiguous().view(torch.uint8).numpy().tobytes())


def hashes(word: str, count: int) -> list[str]:
    return [hashlib.sha256(f"{word} {i}".encode()).hexdigest() for i in range(count)]
