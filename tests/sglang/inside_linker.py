"""What tests of the linker mode do inside a living scheduler: ``server.ask("tests.sglang.inside_linker:...")``."""

from __future__ import annotations

from typing import Any

from kvplug.adapters.sglang.devicepools import KV
from tests.sglang.inside_hicache import page_hashes


def _linker(scheduler: Any) -> Any:
    return scheduler.tree_cache.linker.cache_linker


def _keys(scheduler: Any, tokens: list[int], source: str) -> Any:
    linker = _linker(scheduler)
    hashes = page_hashes(tokens, scheduler.tree_cache.page_size)
    return linker.engine.keys(source, hashes, linker._works.replicated)


def sources(scheduler: Any) -> list[str]:
    """The kinds of pages that are moved; empty where the linker is off."""
    return [str(name.value) for name in _linker(scheduler).pools]


def there(scheduler: Any, tokens: list[int], source: str = KV) -> list[bool]:
    """For each whole page whether this rank's part of it is in the pool."""
    keys = _keys(scheduler, tokens, source)
    return [] if keys is None else _linker(scheduler).engine.store.exists(keys).tolist()


def hold(scheduler: Any, tokens: list[int]) -> list[int]:
    """Pins this rank's parts of all pages; the slots, for :func:`let_go`."""
    return _linker(scheduler).engine.store.pin_batch(_keys(scheduler, tokens, KV)).slots.tolist()


def let_go(scheduler: Any, slots: list[int]) -> None:
    """Releases what was held."""
    import numpy as np

    _linker(scheduler).engine.store.unpin(np.array(slots, np.int64))


def remove(scheduler: Any, tokens: list[int], pages: list[int], source: str = KV) -> list[int]:
    """Takes this rank's parts of these pages out of the pool, and the others' unless they are held."""
    return _linker(scheduler).engine.store.remove(_keys(scheduler, tokens, source)[pages]).tolist()


def zero(scheduler: Any, tokens: list[int], pages: list[int], source: str = KV) -> int:
    """Overwrites this rank's parts of these pages with zeros, behind everybody's back; how many there were."""
    store = _linker(scheduler).engine.store
    found = store.pin_batch(_keys(scheduler, tokens, source)[pages])
    for offset, nbytes in zip(found.offsets[found.codes == 0], found.nbytes[found.codes == 0], strict=True):
        store.mapping[int(offset) : int(offset + nbytes)] = 0
    store.unpin(found.slots)
    return int((found.codes == 0).sum())


def counts(scheduler: Any) -> dict[str, Any]:
    """kvplug's counters on this rank, and why it is off, if it is."""
    engine = _linker(scheduler).engine
    return {**engine.counts, **({"off": engine.off_reason} if engine.off_reason else {})}


def promises(scheduler: Any) -> tuple[int, int, int]:
    """Requests with promised pages, SGLang's hits, and slots of the pool that anybody has pinned."""
    linker = _linker(scheduler)
    return (
        len(linker._works.pins),
        len(scheduler.tree_cache.linker.hit_markers),
        linker.engine.store.stats().pinned_slots,
    )


def running(scheduler: Any) -> int:
    """Requests in the running batch."""
    return len(scheduler.running_batch.reqs)
