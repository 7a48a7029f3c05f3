"""What tests of the linker mode do inside a living scheduler: ``server.ask("tests.sglang.inside_linker:...")``."""

from __future__ import annotations

import threading
import time
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


def idle(scheduler: Any) -> bool:
    """Whether SGLang has nothing to do."""
    return bool(scheduler.is_fully_idle())


def running(scheduler: Any) -> int:
    """Requests in the running batch."""
    return len(scheduler.running_batch.reqs)


_held: list[Any] = []
"""Undoes what :func:`hold_copies` did."""
_gate = threading.Event()
_begun = threading.Event()


def hold_copies(scheduler: Any, kind: str) -> None:
    """Copies out of the pool ("load") wait for :func:`let_copies_go`, those into it ("store") until they are given up
    or let go; a minute at most."""
    linker = _linker(scheduler)
    device, ledger = linker._works.device, linker._ledger
    plain = getattr(device, kind)
    _gate.clear()
    _begun.clear()

    def held(*args: Any) -> Any:
        _begun.set()
        deadline = time.monotonic() + 60
        while not _gate.wait(0.01) and time.monotonic() < deadline:
            if kind == "store" and all(offload.given_up for offload in list(ledger._open)):
                break
        return plain(*args)

    setattr(device, kind, held)
    _held.append(lambda: delattr(device, kind))


def a_copy_is_held(scheduler: Any) -> bool:
    """Whether one has come that far."""
    return _begun.is_set()


def let_copies_go(scheduler: Any) -> None:
    """Ends it."""
    _gate.set()
    while _held:
        _held.pop()()


_in_flight: list[bool] = []


def watch_release(scheduler: Any) -> None:
    """From now on it is noted whether an offload reads the device's pages when SGLang releases their memory."""
    adapter, offloads = scheduler.weight_updater.memory_saver_adapter, _linker(scheduler)._works.offloads
    plain = adapter.pause

    def pause(tag: str) -> Any:
        _in_flight.append(bool(offloads._busy or offloads._todo))
        return plain(tag)

    adapter.pause = pause


def in_flight_at_release(scheduler: Any) -> list[bool]:
    """What was noted."""
    return _in_flight
