"""What tests of the hicache mode do inside a living scheduler: ``server.ask("tests.sglang.inside_hicache:...")``."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

from kvplug.adapters.sglang import engine as engines
from kvplug.adapters.sglang.hostpages import KV


def page_hashes(tokens: list[int], page_size: int) -> list[str]:
    """SGLang's names of a plain request's whole pages: each the SHA-256 of the name before and the page's tokens."""
    out, last = [], b""
    for at in range(0, len(tokens) // page_size * page_size, page_size):
        last = hashlib.sha256(last + struct.pack(f"<{page_size}I", *tokens[at : at + page_size])).digest()
        out.append(last.hex())
    return out


def _keys(scheduler: Any, tokens: list[int], name: str = KV) -> Any:
    backend = scheduler.tree_cache.cache_controller.storage_backend
    backend = getattr(backend, "_backend", backend)  # behind SGLang's own failure injector
    rank, pages = backend._engine, backend._pools[name]
    return rank, rank.keys(pages.identity, page_hashes(tokens, rank.facts.page_size), pages.replicated)


def there(scheduler: Any, tokens: list[int], pool: str = KV) -> list[bool]:
    """For each whole page whether this rank's part of it is in the pool."""
    rank, keys = _keys(scheduler, tokens, pool)
    return [] if keys is None else rank.store.exists(keys).tolist()


def remove(scheduler: Any, tokens: list[int], pages: list[int]) -> list[int]:
    """Takes this rank's parts of these pages out of the pool."""
    rank, keys = _keys(scheduler, tokens)
    return rank.store.remove(keys[pages]).tolist()


_pinned: list[Any] = []


def pin(scheduler: Any, tokens: list[int], pages: list[int]) -> int:
    """Holds this rank's parts of these pages in the pool; how many there are."""
    rank, keys = _keys(scheduler, tokens)
    _pinned.append(rank.store.pin_batch(keys[pages]))
    return int((_pinned[-1].codes == 0).sum())


def unpin(scheduler: Any) -> int:
    """Lets go of all that is held; how many pages that was."""
    rank = engines.engines()[-1]
    let_go = 0
    while _pinned:
        held = _pinned.pop()
        rank.store.unpin(held.slots)
        let_go += int((held.codes == 0).sum())
    return let_go


def zero(scheduler: Any, tokens: list[int], pages: list[int]) -> int:
    """Overwrites this rank's parts of these pages with zeros, behind everybody's back; how many there were."""
    rank, keys = _keys(scheduler, tokens)
    found = rank.store.pin_batch(keys[pages])
    for offset, nbytes in zip(found.offsets[found.codes == 0], found.nbytes[found.codes == 0], strict=True):
        rank.store.mapping[int(offset) : int(offset + nbytes)] = 0
    rank.store.unpin(found.slots)
    return int((found.codes == 0).sum())


def counts(scheduler: Any) -> dict[str, int]:
    """kvplug's counters on this rank, and why it is off, if it is."""
    rank = engines.engines()[-1]
    return {**rank.counts, **({"off": rank.off_reason} if rank.off_reason else {})}


def living_engines(scheduler: Any) -> int:
    """How many engines of kvplug's are at the pool in this process."""
    return sum(rank.store is not None for rank in engines.engines())
