"""SGLang's storage interface of its host cache (HiCache), in front of the pool.

SGLang keeps pages in host pools of its own and calls this from its threads: one asks what is there, one reads into host
pages, one stores from them, at most a few hundred pages a call. Every call is one batch at the pool, straight between
host pages and slots. What is not there, not yet allowed or goes wrong is a miss or "not stored", never an exception.

A block is one page of one host pool on one rank. Models with several host pools (window, recurrent state, indexer,
draft) have a block for each, under keys of their own.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName, PoolTransferResult

from kvplug.adapters.sglang import compat, engine, hostpages
from kvplug.adapters.sglang.hostpages import KV, Bools, HostPages, Int64s, plain_name
from kvplug.adapters.sglang.pagekeys import Keys
from kvplug.adapters.sglang.wants import Part, wanted
from kvplug.errors import Code, UnsupportedEngineError
from kvplug.remote.request import Fetch, Outcome

T = TypeVar("T")

FLAT = " flat"
"""In the name of pages that SGLang hands over as one tensor each: their bytes can be in another order."""
MAX_STATS = 1024
"""Transfers of which SGLang has not asked the figures are forgotten beyond so many."""
MAX_WAITED_FOR = 64
"""Fetches that wait to be read by SGLang; beyond it the oldest one's pins are released."""
_GB = 1e9


class KvplugStorage(HiCacheStorage):
    """What SGLang calls its storage backend; one object in each rank's process."""

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        self._config = storage_config
        self._pools: dict[str, HostPages] = {}
        self._pages: dict[str, deque[int]] = {}
        self._rates: dict[str, deque[float]] = {}
        for kind in ("get", "set"):
            self._pages[kind], self._rates[kind] = deque(maxlen=MAX_STATS), deque(maxlen=MAX_STATS)
        extra = dict(getattr(storage_config, "extra_config", None) or {})
        self._flat = not extra.get("interface_v1")
        self._measured = bool(getattr(storage_config, "enable_storage_metrics", False))
        self._waited_for: OrderedDict[bytes, Fetch] = OrderedDict()
        self._engine = engine.start("hicache", extra)
        self._shielded("start", self._check, None)

    # -- what SGLang tells once --------------------------------------------------------------------------------------

    def _check(self) -> None:
        config = self._config
        if getattr(config, "should_split_heads", False):
            self._engine.off(
                f"tp_lcm_size {config.tp_lcm_size} splits pages by heads, which is not supported: leave it out"
            )
        elif int(getattr(config, "dcp_size", 1) or 1) > 1:
            self._engine.off(f"decode context parallelism (dcp_size {config.dcp_size}) is not supported")

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """SGLang's host pool of the KV itself; the weights begin to be identified here."""
        super().register_mem_pool_host(mem_pool_host)
        self._shielded("register", self._register_kv, None, mem_pool_host)

    def _register_kv(self, pool: Any) -> None:
        try:
            self._pools[KV] = pages = self._host_pages(KV, pool)
        except UnsupportedEngineError as error:
            self._engine.off(str(error))
            return
        self._engine.begin({"mode": "hicache", "pages": pages.identity})

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A host pool by name: side pools, and the KV's once more."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._shielded("register", self._register_side, None, host_pool, plain_name(host_pool_name))

    def _register_side(self, pool: Any, name: str) -> None:
        if name == KV and KV in self._pools:
            return
        try:
            self._pools[name] = pages = self._host_pages(name, pool)
        except UnsupportedEngineError as error:
            self._engine.say(f"kvplug: pages that need {name} are never found: {error}")
            return
        if self._config.is_mla_model and not pages.replicated and name != hostpages.MAMBA and self._config.tp_size > 1:
            self._engine.say(
                f"kvplug: SGLang stores {name} from one rank although each has another part of it, so with "
                f"{self._config.tp_size} ranks pages that need it are not found"
            )

    def _host_pages(self, name: str, pool: Any) -> HostPages:
        sharded = name == hostpages.MAMBA or compat.holds_own_heads(pool)
        return hostpages.host_pages(name, pool, replicated=bool(self._config.is_mla_model) and not sharded)

    def on_host_pools_registered(self) -> None:
        """Nothing waits for it."""

    # -- what is there -----------------------------------------------------------------------------------------------

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many pages from the first on are there."""
        return self._shielded("lookup", self._leading_pages, 0, keys)

    def _leading_pages(self, hashes: list[str]) -> int:
        pages = self._pools.get(KV)
        if pages is None or pages.logical:
            return 0
        keys = self._keys(pages, hashes, FLAT if self._flat else "")
        store = self._engine.store
        if keys is None or store is None:
            return 0
        hits = store.match_prefix(keys)
        if self._fetched([Part(keys, pages.page_nbytes)], hits, pages.page_size):
            hits = store.match_prefix(keys)
        self._count_lookup(hits)
        return hits

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[Any] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        """Which prefixes of these pages could be restored from all pools together.

        ``kv_hit_pages`` is the longest of them, ``restorable_prefix_pages`` has all, ``extra_pool_hit_pages`` how far
        each pool would go by itself.
        """
        nothing = PoolTransferResult(0, {}, [])
        return self._shielded("lookup", self._restorable, nothing, keys, pool_transfers or [])

    def _restorable(self, hashes: list[str], transfers: list[Any]) -> PoolTransferResult:
        pages = self._pools.get(KV)
        if pages is None:
            return PoolTransferResult(0, {}, [])
        out = self._restorable_now(pages, hashes, transfers)
        parts = self._parts(pages, hashes, transfers) if self._engine.fetcher is not None else []
        if parts and self._fetched(parts, out.kv_hit_pages, pages.page_size):
            out = self._restorable_now(pages, hashes, transfers)
        self._count_lookup(out.kv_hit_pages)
        return out

    def _restorable_now(self, pages: HostPages, hashes: list[str], transfers: list[Any]) -> PoolTransferResult:
        if not pages.logical:
            found = self._found(pages, hashes)
            kv = 0 if found is None else hostpages.leading(found)
        else:  # the side pools hold everything; without one that has to be there, nothing could be restored
            kv = len(hashes) if transfers else 0
        hits = {PoolName.KV: kv} if kv else {}
        restorable = np.ones(kv, np.bool_)
        for transfer in transfers:
            if not restorable.any():
                break
            side = self._pools.get(plain_name(transfer.name))
            found = None if side is None else self._found(side, hashes[:kv])
            said = hostpages.verdict(found=np.zeros(kv, np.bool_) if found is None else found, **_policy(transfer))
            if said.covered:
                hits[transfer.name] = said.covered
            if said.restorable is not None:
                restorable &= said.restorable
        ends = (np.flatnonzero(restorable) + 1).tolist()
        return PoolTransferResult(ends[-1] if ends else 0, hits, ends)

    def _parts(self, pages: HostPages, hashes: list[str], transfers: list[Any]) -> list[Part]:
        """What would have to be there for all pages; empty where that can't be named."""
        parts = []
        for side, transfer in [(pages, None), *((self._pools.get(plain_name(t.name)), t) for t in transfers)]:
            if side is None or side.logical:
                if side is None:
                    return []
                continue
            keys = self._keys(side, hashes)
            if keys is None:
                return []
            parts.append(Part(keys, side.page_nbytes, **({} if transfer is None else _policy(transfer))))
        return parts

    def _fetched(self, parts: list[Part], hits: int, page_tokens: int) -> bool:
        """Asks other hosts for what is missing beyond ``hits`` pages and waits for it; whether anything has come.

        This is SGLang's prefetch thread: the scheduler goes on, and gives the request up to be computed when it likes.
        """
        fetcher = self._engine.fetcher
        if fetcher is None or hits >= len(parts[0].keys):
            return False
        fetch = fetcher.start(wanted(parts, hits, page_tokens), tokens_per_s=self._engine.speed.tokens_per_s)
        fetch.wait(self._engine.config.fetch_timeout_s)
        if fetch.outcome is None:  # goes on, for whoever asks next
            return fetch.tokens > 0
        if fetch.tokens or fetch.outcome is Outcome.PRESENT:
            self._waited_for[parts[0].keys[0].tobytes()] = fetch  # pinned until it is read, or a moment has passed
            while len(self._waited_for) > MAX_WAITED_FOR:
                self._waited_for.popitem(last=False)[1].release()
            return True
        fetch.release()
        return False

    def _found(self, pages: HostPages, hashes: list[str]) -> Bools | None:
        keys = self._keys(pages, hashes)
        store = self._engine.store
        return None if keys is None or store is None else store.exists(keys)

    def _count_lookup(self, hits: int) -> None:
        counts = self._engine.counts
        counts["lookups"] += 1
        counts["hit_pages"] += hits

    # -- from and to host pages --------------------------------------------------------------------------------------

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """KV pages into the host pool: for each whether its bytes are there now."""
        return self._shielded("load", self._get, [False] * len(keys), KV, keys, host_indices)

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """KV pages from the host pool: for each whether the pool has it now."""
        return self._shielded("store", self._set, [False] * len(keys), KV, keys, host_indices)

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """The same as :meth:`batch_get_v1` for pools by name: name to answers."""
        return {
            t.name: self._shielded(
                "load", self._get, [False] * len(t.keys or ()), plain_name(t.name), t.keys or [], t.host_indices
            )
            for t in transfers
        }

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """The same as :meth:`batch_set_v1` for pools by name: name to answers."""
        return {
            t.name: self._shielded(
                "store", self._set, [False] * len(t.keys or ()), plain_name(t.name), t.keys or [], t.host_indices
            )
            for t in transfers
        }

    def _get(self, name: str, hashes: list[str], indices: Any) -> list[bool]:
        pages, epoch = self._pools.get(name), self._engine.epoch
        keys = None if pages is None or not hashes else self._keys(pages, hashes)
        if pages is None or keys is None:
            return [False] * len(hashes)
        if pages.logical:
            return [True] * len(hashes)
        done: list[bool] = self._get_fragments(keys, *pages.fragments(indices, len(hashes)), epoch).tolist()
        if (fetch := self._waited_for.pop(keys[0].tobytes(), None)) is not None:
            fetch.release()
        return done

    def _set(self, name: str, hashes: list[str], indices: Any) -> list[bool]:
        pages, epoch = self._pools.get(name), self._engine.epoch
        keys = None if pages is None or not hashes else self._keys(pages, hashes)
        if pages is None or keys is None:
            return [False] * len(hashes)
        if pages.logical:
            return [True] * len(hashes)
        fragments = pages.fragments(indices, len(hashes))
        done: Bools = self._put_fragments(keys, *fragments, self._engine.siblings(pages.replicated), epoch)
        stored: list[bool] = done.tolist()
        return stored

    def _get_fragments(self, keys: Keys, addrs: Int64s, nbytes: Int64s, epoch: int) -> Bools:
        """What was read while the namespace changed counts as not read."""
        store, counts = self._engine.store, self._engine.counts
        if store is None:
            return np.zeros(len(keys), np.bool_)
        began = time.perf_counter()
        codes = store.get_fragments(keys, addrs, nbytes)
        taken = time.perf_counter() - began
        done: Bools = codes == Code.OK
        total = int(nbytes[done].sum())
        counts["loaded_pages"] += int(done.sum())
        counts["loaded_bytes"] += total
        counts["load_ns"] += int(taken * 1e9)
        counts["load_failures"] += int((~done).sum())
        counts["corrupt_pages"] += int((codes == Code.CORRUPT).sum())
        self._measure("get", len(keys), total, taken)
        if self._engine.epoch != epoch:
            counts["dropped_by_change"] += int(done.sum())
            done[:] = False
        return done

    def _put_fragments(self, keys: Keys, addrs: Int64s, nbytes: Int64s, siblings: tuple[int, int], epoch: int) -> Bools:
        """What was stored while the namespace changed is taken out again."""
        store, counts = self._engine.store, self._engine.counts
        if store is None:
            return np.zeros(len(keys), np.bool_)
        began = time.perf_counter()
        codes = store.put_fragments(keys, addrs, nbytes, siblings=siblings)
        taken = time.perf_counter() - began
        new = codes == Code.OK
        # What another engine is writing just now will be there, or will be a miss as anything that was evicted is.
        done: Bools = new | (codes == Code.EXISTS) | (codes == Code.IN_PROGRESS)
        total = int(nbytes[new].sum())
        counts["stored_pages"] += int(new.sum())
        counts["stored_bytes"] += total
        counts["store_ns"] += int(taken * 1e9)
        counts["already_stored_pages"] += int((codes == Code.EXISTS).sum())
        for code, number in zip(*np.unique(codes[~done], return_counts=True), strict=True):
            counts[f"not_stored:{Code(int(code)).name.lower()}"] += int(number)
        self._measure("set", len(keys), total, taken)
        if self._engine.epoch != epoch:
            counts["dropped_by_change"] += int(new.sum())
            store.remove(keys[new])
            done[:] = False
        return done

    # -- pages as tensors, which SGLang uses where the backend's settings lack interface_v1 ------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """One KV page into a flat tensor: the tensor, or None."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """KV pages into flat CPU tensors: for each the tensor, or None."""
        nothing: list[Any] = [None] * len(keys)
        return self._shielded("load", self._get_flat, nothing, keys, list(target_locations or ()))

    def _get_flat(self, hashes: list[str], tensors: list[Any]) -> list[Any]:
        pages, epoch = self._pools.get(KV), self._engine.epoch
        keys = None if pages is None or not hashes else self._keys(pages, hashes, FLAT)
        if keys is None or len(tensors) != len(hashes):
            return [None] * len(hashes)
        done: list[bool] = self._get_fragments(keys, *hostpages.flat_addresses(tensors), epoch).tolist()
        return [tensor if ok else None for tensor, ok in zip(tensors, done, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """One KV page from a tensor: whether the pool has it now."""
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """KV pages from CPU tensors: whether the pool has all of them now."""
        return self._shielded("store", self._set_flat, False, keys, list(values or ()))

    def _set_flat(self, hashes: list[str], tensors: list[Any]) -> bool:
        pages, epoch = self._pools.get(KV), self._engine.epoch
        keys = None if pages is None or not hashes else self._keys(pages, hashes, FLAT)
        if pages is None or keys is None or len(tensors) != len(hashes):
            return False
        whole = [tensor.contiguous() for tensor in tensors]
        siblings = self._engine.siblings(pages.replicated)
        return bool(self._put_fragments(keys, *hostpages.flat_addresses(whole), siblings, epoch).all())

    def exists(self, key: str) -> bool:
        """Whether the KV page is there."""
        return self.batch_exists([key]) == 1

    # -- the rest ----------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Hides this engine's pages so far from it; they stay for others, and are evicted in their turn."""
        self._shielded("clear", self._engine.rotate, None, "SGLang cleared its storage backend")

    def get_stats(self) -> Any:
        """Pages and GB/s of the transfers since the last call, for SGLang's own metrics; None without them."""
        if not self._measured:
            return None
        return self._shielded("metrics", self._stats, None)

    def _stats(self) -> Any:
        return compat.storage_metrics(
            prefetch_pgs=_drain(self._pages["get"]),
            prefetch_bandwidth=_drain(self._rates["get"]),
            backup_pgs=_drain(self._pages["set"]),
            backup_bandwidth=_drain(self._rates["set"]),
        )

    def _measure(self, kind: str, pages: int, nbytes: int, seconds: float) -> None:
        if self._measured:
            self._pages[kind].append(pages)
            self._rates[kind].append(nbytes / _GB / max(seconds, 1e-9))

    def close(self) -> None:
        """SGLang detached its storage, or ends: this rank leaves the pool."""
        self._shielded("close", self._engine.leave, None)

    def _keys(self, pages: HostPages, hashes: Sequence[str], kind: str = "") -> Keys | None:
        return self._engine.keys(pages.identity + kind, hashes, pages.replicated)

    def _shielded(self, where: str, call: Callable[..., T], otherwise: T, *args: Any) -> T:
        try:
            return call(*args)
        except Exception as error:  # noqa: BLE001 - SGLang's threads must not end by it
            self._engine.caught(where, error)
            return otherwise


def _policy(transfer: Any) -> dict[str, Any]:
    """What a side pool must have for a prefix, as :func:`~kvplug.adapters.sglang.hostpages.verdict` takes it."""
    return {
        "policy": plain_name(transfer.hit_policy),
        "trailing": len(transfer.keys or ()),
        "block_pages": int(getattr(transfer, "block_pages", 0)),
        "group_pages": int(getattr(transfer, "group_pages", 0)),
    }


def _drain(values: deque[Any]) -> list[Any]:
    """Takes out what is there now; another thread may go on adding."""
    return [values.popleft() for _ in range(len(values))]
