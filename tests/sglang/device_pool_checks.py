"""KvplugLinker with SGLang's own device pages, in a process that has SGLang: offloaded by one, loaded by another.

An engine of one rank is made by hand; device pools, counters, linkers and pool are real. Each check prints one line.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
from sglang.srt.environ import envs
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.hybrid_cache import linker_pool_assembler
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MHATokenToKVPool,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.runtime_context import get_parallel

from kvplug.adapters.sglang import engine as engines
from kvplug.adapters.sglang.linker import KvplugLinker
from tests.sglang import host_pools
from tests.sglang.host_pools import ALONE, HandMade, Shard

PAGE = 16
PAGES = 20
LAYERS = 4
ANSWER_S = 20.0
BASE = {"page_size": PAGE, "dtype": torch.bfloat16, "device": "cpu", "enable_memory_saver": False}
HEADS = {"head_num": 2, "head_dim": 24}


class Model:
    """The page pools of one engine, with what its prefix cache keeps per node and SGLang's parameters for it."""

    def __init__(self, kvcache: Any, *more: ComponentType, req_to_token_pool: Any = None, **params: Any) -> None:
        self.kvcache = kvcache
        self.page_tokens = int(getattr(kvcache, "page_size", PAGE))
        self.components = {ComponentType.FULL, *more}
        self.states = req_to_token_pool
        self.params = SimpleNamespace(
            page_size=self.page_tokens,
            pp_size=1,
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: kvcache),
            req_to_token_pool=req_to_token_pool,
            mtp_draft_device_pools=(),
            sidecar_draft_device_pools=(),
        )
        for name, value in params.items():
            setattr(self.params, name, value)

    def tensors(self, source: str) -> list[tuple[Any, int]]:
        """(tensor, rows per page) of everything that a source's pages are made of, found by hand."""
        if source == "mamba":
            cache = self.states.mamba_pool.mamba_cache
            states = [cache.temporal, *cache.conv]
            return [(state[layer], 1) for state in states for layer in range(state.shape[0])]
        pool = self.kvcache
        if source == "swa":
            pool = pool.swa_kv_pool
        elif hasattr(pool, "full_kv_pool"):
            pool = pool.full_kv_pool
        if isinstance(pool, MLATokenToKVPool):
            return [(tensor, self.page_tokens) for tensor in pool.kv_buffer]
        rows = 1 if pool.kv_cache_layout == "hnd" else self.page_tokens
        return [(tensor, rows) for tensor in (*pool.k_buffer, *pool.v_buffer)]

    def sources(self) -> list[str]:
        names = {ComponentType.FULL: "kv", ComponentType.SWA: "swa", ComponentType.MAMBA: "mamba"}
        return [names[component] for component in sorted(self.components)]

    def fill(self, seed: int) -> None:
        """Random bytes everywhere."""
        generator = torch.Generator().manual_seed(seed)
        for source in self.sources():
            for tensor, _ in self.tensors(source):
                tensor.copy_(torch.rand(tensor.shape, generator=generator))

    def page(self, source: str, page: int) -> list[Any]:
        return [t[page * rows : (page + 1) * rows].clone() for t, rows in self.tensors(source)]


def mha(**more: Any) -> Model:
    return Model(MHATokenToKVPool(PAGES * PAGE, **BASE, **HEADS, layer_num=LAYERS, **more))


def one_token_a_page(kind: type, **sizes: Any) -> Model:
    """SGLang's default on most platforms."""
    return Model(kind(PAGES, **{**BASE, "page_size": 1}, **sizes, layer_num=LAYERS))


def hnd() -> Model:
    with envs.SGLANG_USE_HND_KVCACHE.override(True):
        model = mha()
    assert model.kvcache.kv_cache_layout == "hnd"
    return model


def mla(**more: Any) -> Model:
    sizes = {"kv_lora_rank": 40, "qk_rope_head_dim": 8, "layer_num": LAYERS}
    return Model(MLATokenToKVPool(PAGES * PAGE, **BASE, **sizes), **more)


def swa() -> Model:
    layers = {"swa_attention_layer_ids": [0, 2, 3], "full_attention_layer_ids": [1, 4]}
    return Model(SWAKVPool(PAGES * PAGE, PAGES * PAGE, **BASE, **HEADS, **layers), ComponentType.SWA)


def states(layer_ids: list[int]) -> Any:
    shape = Mamba2StateShape.create(
        tp_world_size=1, intermediate_size=64, n_groups=1, num_heads=4, head_dim=16, state_size=8, conv_kernel=4
    )
    return HybridReqToTokenPool(
        size=4,
        mamba_size=PAGES,
        mamba_spec_state_size=4,
        max_context_len=64,
        device="cpu",
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(shape=shape, layers=layer_ids),
        mamba_layer_ids=layer_ids,
        enable_mamba_extra_buffer=False,
    )


def mla_with_states(*more: ComponentType) -> Model:
    recurrent = states([0, 1, 3])
    pool = HybridLinearKVPool(
        PAGES * PAGE,
        **BASE,
        head_num=1,
        head_dim=48,
        full_attention_layer_ids=[2, 4],
        mamba_pool=recurrent.mamba_pool,
        use_mla=True,
        kv_lora_rank=40,
        qk_rope_head_dim=8,
    )
    return Model(pool, ComponentType.MAMBA, *more, req_to_token_pool=recurrent)


MODELS: dict[str, Callable[[], Model]] = {
    "mha": mha,
    "mha, values of another width": lambda: mha(v_head_dim=16),
    "mha, heads before tokens": hnd,
    "mha, bytes": lambda: Model(
        MHATokenToKVPool(PAGES * PAGE, **{**BASE, "dtype": torch.float8_e4m3fn}, **HEADS, layer_num=LAYERS)
    ),
    "mha, second stage": lambda: mha(start_layer=8),
    "mha, a token a page": lambda: one_token_a_page(MHATokenToKVPool, **HEADS),
    "mla, a token a page": lambda: one_token_a_page(MLATokenToKVPool, kv_lora_rank=40, qk_rope_head_dim=8),
    "mla": mla,
    "sliding window": swa,
    "mla with states": mla_with_states,
}


def linker(model: Model, shard: Shard = ALONE, **settings: Any) -> KvplugLinker:
    """A linker as SGLang makes one, around a hand-made engine."""

    def start(mode: str, extra: Any) -> Any:
        made = HandMade(shard, **settings)
        made.facts = SimpleNamespace(tp=(shard.index, shard.count))
        return made

    engines.start = start
    made = KvplugLinker(SimpleNamespace(), model.params, components=model.components, extra_config={})
    model.kvcache.register_layer_transfer_counter(made.layer_done_counter)
    return made


def hashes(seed: str, count: int) -> list[str]:
    out, last = [], seed.encode()
    for _ in range(count):
        last = hashlib.sha256(last).digest()
        out.append(last.hex())
    return out


def transfer(
    source: str, names: Sequence[str], pages: Sequence[int] | None = None, page_tokens: int = PAGE
) -> PoolTransfer:
    indices = None
    if pages is not None:
        span = 1 if source == "mamba" else page_tokens
        indices = (torch.tensor(pages)[:, None] * span + torch.arange(span)).reshape(-1)
    policy = PoolHitPolicy.ALL_PAGES if source == "kv" else PoolHitPolicy.TRAILING_PAGES
    return PoolTransfer(name=PoolName(source), keys=list(names), device_indices=indices, hit_policy=policy)


def answers(made: KvplugLinker, count: int) -> list[bool]:
    deadline = time.monotonic() + ANSWER_S
    while made.num_completed_offloads() < count:
        assert time.monotonic() < deadline, "no answer to an offload"
        time.sleep(0.002)
    return [made.pop_completed_offload() for _ in range(count)]


def tail(source: str, names: Sequence[str]) -> Sequence[str]:
    """The pages that a source needs of a stretch: all, the last window of two, the last state."""
    return {"kv": names, "swa": names[-2:], "mamba": names[-1:]}[source]


def lookup(made: KvplugLinker, model: Model, rid: str, names: Sequence[str]) -> list[int]:
    return made.lookup(rid, [transfer(source, tail(source, names)) for source in model.sources()])


def carried(kind: str) -> None:
    """From pages of one engine to other pages of another, bit for bit; no other page changes; layers are waited for."""
    one, other = MODELS[kind](), MODELS[kind]()
    one.fill(1)
    other.fill(2)
    writer, reader = linker(one), linker(other)
    assert writer.is_on, writer.engine.off_reason
    names = hashes(kind, 5)
    source_pages = [7, 1, 18, 4, 2]
    tokens = one.page_tokens
    assert writer.offload([transfer(source, names, source_pages, tokens) for source in one.sources()])
    assert answers(writer, 1) == [True]
    assert lookup(reader, other, "r", names) == [1, 2, 3, 4, 5]
    before = {source: [other.page(source, page) for page in range(PAGES)] for source in other.sources()}
    target = [3, 11, 5, 19, 8]
    assert reader.load(
        "r", [transfer(s, tail(s, names), target[-len(tail(s, names)) :], tokens) for s in other.sources()]
    )
    index = reader.start_layer_wise_loading()
    assert index >= 0
    reader.layer_done_counter.set_consumer(index)
    pool, first = other.kvcache, other.kvcache.start_layer
    mapping = getattr(pool, "full_attention_layer_id_mapping", None)
    for layer in mapping or range(first, first + pool.layer_num):
        pool.get_key_buffer(layer)  # waits, as the attention does
    if other.states is not None:
        other.states.mamba2_layer_cache(0)
    assert reader.finish_layer_wise_loading(index)
    for source in other.sources():
        count = len(tail(source, names))
        came_from = dict(zip(target[-count:], source_pages[-count:], strict=True))
        for page in range(PAGES):
            right = one.page(source, came_from[page]) if page in came_from else before[source][page]
            for got, want in zip(other.page(source, page), right, strict=True):
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), f"{source} page {page}"
    assert reader.engine.store.stats().pinned_slots == 0
    for made in (writer, reader):
        assert made.engine.counts["errors"] == 0
        made.close()


def all_kinds_keep_apart() -> None:
    """What one kind of pool stored, no other kind finds, though the page hashes are the same."""
    names = hashes("apart", 2)
    kinds = {kind: make for kind, make in MODELS.items() if kind != "mha, second stage"}  # told apart by its layers
    made = {kind: (model := make(), linker(model)) for kind, make in kinds.items()}
    for model, one in made.values():
        assert lookup(one, model, "r", names) == []
        assert one.offload([transfer(source, names, [1, 2], model.page_tokens) for source in model.sources()])
        assert answers(one, 1) == [True]
        assert one.engine.counts["already_stored_pages"] == 0
    for _, one in made.values():
        one.close()


def replicated_pages_have_one_writer() -> None:
    """MLA: rank 0 stores, the other answers at once, and both read the same."""
    models = [mla(), mla()]
    models[0].fill(3)
    ranks = [linker(model, Shard(rank, 2)) for rank, model in enumerate(models)]
    names = hashes("replicated", 3)
    for one in ranks:
        assert one.offload([transfer("kv", names, [1, 2, 3])])
    assert [answers(one, 1) for one in ranks] == [[True], [True]]
    assert [one.engine.counts["stored_pages"] for one in ranks] == [3, 0]
    assert [lookup(one, model, "r", names) for one, model in zip(ranks, models, strict=True)] == [[1, 2, 3]] * 2
    for one in ranks:
        one.close()


def each_rank_has_its_own_pages() -> None:
    models = [mha(), mha()]
    ranks = [linker(model, Shard(rank, 2)) for rank, model in enumerate(models)]
    names = hashes("own", 3)
    assert ranks[0].offload([transfer("kv", names, [1, 2, 3])])
    assert answers(ranks[0], 1) == [True]
    assert lookup(ranks[1], models[1], "r", names) == []
    for one in ranks:
        one.close()


def refusals_do_not_raise() -> None:
    """What is not understood is off, in one line, and answers like the others: nothing found, nothing stored."""
    drafted = mla(mtp_draft_device_pools=(object(),))
    staged = mla(pp_size=2)
    shaped = mha()
    shaped.kvcache.kv_cache_layout = "vectorized_5d"
    windows_only = Model(
        SWAKVPool(
            PAGES * PAGE, PAGES * PAGE, **BASE, **HEADS, swa_attention_layer_ids=[0, 1], full_attention_layer_ids=[]
        ),
        ComponentType.SWA,
    )
    recurrent = states([0])
    mha_with_states = Model(
        HybridLinearKVPool(
            PAGES * PAGE, **BASE, **HEADS, full_attention_layer_ids=[1, 2], mamba_pool=recurrent.mamba_pool
        ),
        ComponentType.MAMBA,
        req_to_token_pool=recurrent,
    )
    scaled = mha()
    scaled.kvcache.k_scale_buffer = [torch.zeros(4)]
    cut = mha()
    cut.kvcache.k_buffer[1] = cut.kvcache.k_buffer[1][:, :, :8]
    unmatched = mha()
    unmatched.components.add(ComponentType.SWA)
    for model, reason in (
        (drafted, "draft model"),
        (staged, "pipeline"),
        (shaped, "vectorized_5d"),
        (Model(type("Other", (MHATokenToKVPool,), {})(PAGES * PAGE, **BASE, **HEADS, layer_num=1)), "Other"),
        (windows_only, "every layer has a sliding window"),
        (mha_with_states, "HybridLinearKVPool"),
        (scaled, "scales"),
        (cut, "a buffer of"),
        (unmatched, "keeps kv, swa"),
        (Model(SimpleNamespace(size=1000)), "SimpleNamespace"),
    ):
        engines.start = lambda mode, extra: HandMade(ALONE)
        made = KvplugLinker(SimpleNamespace(), model.params, components=model.components, extra_config={})
        assert not made.is_on, reason
        assert reason in str(made.engine.off_reason), (reason, made.engine.off_reason)
        names = hashes("off", 2)
        assert made.pools == {}
        assert made.lookup("r", [transfer("kv", names)]) == []
        assert made.load("r", [transfer("kv", names, [1, 2])]) is False
        assert made.start_layer_wise_loading() == -1
        assert made.finish_layer_wise_loading(-1)
        assert made.offload([transfer("kv", names, [1, 2])])
        assert answers(made, 1) == [False]
        made.layer_done_counter.set_consumer(-1)
        made.layer_done_counter.wait_until(3)
        made.reset()
        made.close()


def odd_calls_are_misses() -> None:
    """Wrong pages, unknown sources, hashes of another form: counted, and nothing raised."""
    model = mha()
    made = linker(model, store_hold_share=0.5)
    names = hashes("odd", 3)
    assert made.offload([transfer("kv", names, [1, 2, 3])])
    assert answers(made, 1) == [True]
    assert made.lookup("r", [transfer("kv", ["zz"] * 3)]) == []
    assert made.lookup("r", [transfer("kv", names), transfer("swa", names)]) == []
    assert made.lookup("r", []) == []
    assert lookup(made, model, "r", names) == [1, 2, 3]
    shifted = transfer("kv", names, [1, 2, 3])
    shifted.device_indices += 1
    assert made.load("r", [shifted]) is False
    assert made.load("nobody", [transfer("kv", names, [1, 2, 3])]) is False
    assert made.offload([shifted])
    assert made.offload([transfer("kv", names, [1, 2, PAGES + 3])])
    assert answers(made, 2) == [False, False]
    assert made.offload([]) is False
    assert made.engine.counts["errors"] == 4
    assert made.engine.store.stats().pinned_slots == 0
    made.close()
    made.close()


CHECKS: dict[str, Callable[[], None]] = {
    **{f"carried: {kind}": (lambda kind=kind: carried(kind)) for kind in MODELS},
    **{
        check.__name__: check
        for check in (
            all_kinds_keep_apart,
            replicated_pages_have_one_writer,
            each_rank_has_its_own_pages,
            refusals_do_not_raise,
            odd_calls_are_misses,
        )
    },
}


def main() -> None:
    host_pools.POOL = sys.argv[1]
    linker_pool_assembler.get_memory = lambda: SimpleNamespace(enable_unified_memory=False)
    for name, check in CHECKS.items():
        try:
            with get_parallel().override(attn_dcp_size=1):
                check()
            wrong = None
        except Exception:  # noqa: BLE001 - told to the test
            wrong = traceback.format_exc(limit=-6)
        print(json.dumps({"check": name, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main()
