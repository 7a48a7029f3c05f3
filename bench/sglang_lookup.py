"""The linker's lookup, in a process that has SGLang: 512 pages a call, as the scheduler thread makes it.

Run as ``python -m bench.sglang_lookup POOL``; prints one line of JSON, milliseconds per call by kind of question.
Device pool, linker and pool are real, the engine around them is made by hand (``tests/sglang/host_pools.py``).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.runtime_context import get_parallel

from kvplug.adapters.sglang.linker import KvplugLinker
from tests.sglang import host_pools
from tests.sglang.device_pool_checks import hashes, linker, mha

PAGES = 512
PROMPTS = 24
ROUNDS = 96
SIZE = "1gib"


def timed(call: Callable[[], list[int]], expected: int) -> float:
    began = time.perf_counter()
    answer = call()
    took = time.perf_counter() - began
    assert len(answer) == expected, (len(answer), expected)
    return took * 1e3


def measure(made: KvplugLinker) -> dict[str, list[float]]:
    """By kind of question, every call's time: a hit of other pages each time, the same again, and a miss."""
    store, pool = made.engine.store, made.pools[PoolName.KV]
    block = np.ones((PAGES, pool.block_nbytes), np.uint8)
    prompts = [hashes(f"prompt {i}", PAGES) for i in range(PROMPTS)]
    for names in prompts:
        assert not store.put(made.engine.keys("kv", names), block).any()
    misses = [hashes(f"unseen {i}", PAGES) for i in range(PROMPTS)]
    out: dict[str, list[float]] = {"hit": [], "again": [], "miss": []}
    for i in range(ROUNDS):
        for names, kinds in ((prompts[i % PROMPTS], ("hit", "again")), (misses[i % PROMPTS], ("miss",))):
            for kind in kinds:
                asked = [PoolTransfer(name=PoolName.KV, keys=list(names))]
                found = 0 if kind == "miss" else PAGES
                out[kind].append(timed(lambda: made.lookup("r", asked), found))  # noqa: B023
        made.release_request("r")
    return out


def main() -> None:
    host_pools.POOL = sys.argv[1]
    with get_parallel().override(attn_dcp_size=1):
        made = linker(mha(), size=SIZE, verify="never", prefault=False)
    assert made.is_on, made.engine.off_reason
    times = measure(made)
    made.close()
    print(json.dumps({kind: sorted(some) for kind, some in times.items()}))


if __name__ == "__main__":
    main()
