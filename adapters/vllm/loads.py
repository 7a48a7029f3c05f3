"""Lookups and loads, on the scheduler's side: what is offered is pinned first, and stays pinned until it was read.

Every wish of the engine has exactly one end. A hit that was offered is either given back (the request was not admitted
in time, was admitted without it, or is gone) or becomes a load job; a load job is reported by every rank, whatever
happened to it and to the request, and only then are its slots unpinned.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

import numpy as np

from kvplug.adapters.vllm.hits import longest_hit, most_tokens, needed
from kvplug.adapters.vllm.jobs import GroupBlocks, Job, as_ids
from kvplug.adapters.vllm.requests import GroupPins, LoraIdentities, Offer, Record
from kvplug.adapters.vllm.state import EngineState, Pending
from kvplug.errors import Code
from kvplug.identity.keys import KeyArray, block_keys

OFFER_LIFE_S = 10.0
"""A hit that the engine does not take up for so long is given back; it asks again before it admits a request."""
MISS_LIFE_S = 0.05
"""The head of a waiting queue is asked about at every step; a miss is not looked up again for so long."""
SEARCH_ATTEMPTS = 3
"""Blocks may be evicted between looking and pinning; then the search goes on below, so often."""


class Loads:
    """Offers and load jobs of one engine."""

    def __init__(self, state: EngineState, *, takes_back: bool = False) -> None:
        """``takes_back``: whether the engine can throw away what a step has computed before another step builds on
        it."""
        self._state = state
        self._offers: OrderedDict[str, Record] = OrderedDict()
        self.queued: list[Job] = []
        self.newest = 0
        """The last load's job."""
        self.adapters: LoraIdentities | None = None
        """The engine's LoRA adapters."""
        self.forecasts = takes_back and len(state.rules) == 1 and state.rules[0].whole_prefix
        """Whether the engine can take back what it has computed for a request with blocks of another adapter."""

    # -- lookup ------------------------------------------------------------------------------------------------------

    def lookup(self, record: Record, local: int) -> int:
        """How many tokens beyond the engine's own ``local`` ones the pool can give; they are pinned on return."""
        num_tokens = len(record.tokens)
        offer = record.offer
        if offer is not None:
            if (offer.local, offer.num_tokens) == (local, num_tokens):
                return offer.tokens - local
            self.give_back(record)
        now = time.monotonic()
        if record.miss is not None and record.miss[:2] == (local, num_tokens) and now < record.miss[2]:
            return 0
        limit = most_tokens(num_tokens, self._state.span)
        found = None
        if limit > local and local % self._state.span == 0:
            found = self._search(record, local, limit)
            self._state.counts["lookups"] += 1
            self._state.counts["lookup_tokens"] += limit - local
        if found is None:
            record.miss = (local, num_tokens, now + MISS_LIFE_S)
            return 0
        hit, pins = found
        record.offer = Offer(local, hit, num_tokens, pins, now + OFFER_LIFE_S)
        self._offers[record.request.request_id] = record
        return hit - local

    def keys(self, record: Record, local: int, limit: int) -> list[KeyArray]:
        """Per group the keys of the blocks from token ``local`` to token ``limit``, (N, 32) uint8."""
        state = self._state
        steps = record.step_keys(limit)
        return [
            block_keys(steps, rule.span // state.step_tokens, group, 0, local // rule.span)
            for group, rule in enumerate(state.rules)
        ]

    def _search(self, record: Record, local: int, limit: int) -> tuple[int, list[GroupPins]] | None:
        """The longest hit and its pins; nothing stays pinned if there is none."""
        rules, store = self._state.rules, self._state.store
        keys = self.keys(record, local, limit)
        pins: dict[int, Any] = {}
        present: list[Any] = [None] * len(rules)
        bound = limit
        for group, rule in enumerate(rules):
            if rule.whole_prefix and bound > local:
                wanted = keys[group][: bound // rule.span - local // rule.span]
                pins[group] = store.pin_batch(wanted, prefix=True)
                present[group] = pins[group].codes == Code.OK
                leading = len(wanted) if present[group].all() else int(np.argmin(present[group]))
                bound = min(bound, (local // rule.span + leading) * rule.span)
        for group, rule in enumerate(rules):
            if not rule.whole_prefix and bound > local:
                present[group] = np.array(store.exists(keys[group][: bound // rule.span - local // rule.span]))
        hit = local
        for _ in range(SEARCH_ATTEMPTS):
            if bound <= local:
                break
            hit = longest_hit(rules, present, local, bound)
            if hit == local or self._pin_windows(keys, present, pins, hit, local):
                break
            hit = local
        return self._settle(pins, hit, local)

    def _pin_windows(
        self, keys: list[KeyArray], present: list[Any], pins: dict[int, Any], hit: int, local: int
    ) -> bool:
        """Pins what windowed groups need for ``hit``; False, with none of it pinned, if some of it went meanwhile."""
        mine: dict[int, Any] = {}
        for group, rule in enumerate(self._state.rules):
            if rule.whole_prefix:
                continue
            base = local // rule.span
            blocks = needed(rule, hit, local)
            batch = self._state.store.pin_batch(keys[group][blocks.start - base : blocks.stop - base])
            mine[group] = batch
            missing = batch.codes != Code.OK
            if missing.any():
                present[group][blocks.start - base : blocks.stop - base][missing] = False
                for one in mine.values():
                    self._unpin(one, one.codes == Code.OK)
                return False
        pins.update(mine)
        return True

    def _settle(self, pins: dict[int, Any], hit: int, local: int) -> tuple[int, list[GroupPins]] | None:
        """Keeps the pins that a hit needs and gives the others back."""
        kept = []
        for group, rule in enumerate(self._state.rules):
            if group not in pins:
                continue
            batch = pins[group]
            count = len(needed(rule, hit, local)) if hit > local else 0
            surplus = batch.codes == Code.OK
            surplus[:count] = False
            self._unpin(batch, surplus)
            first = needed(rule, hit, local).start
            kept.append(GroupPins(first, batch.slots[:count], batch.gens[:count], batch.offsets[:count]))
        return (hit, kept) if hit > local else None

    def _unpin(self, batch: Any, which: Any) -> None:
        if which.any():
            self._state.store.unpin(batch.slots[which], batch.gens[which])

    # -- offers ------------------------------------------------------------------------------------------------------

    def give_back(self, record: Record) -> None:
        """The engine does not use what it was offered."""
        offer, record.offer = record.offer, None
        self._offers.pop(record.request.request_id, None)
        if offer is not None:
            for pins in offer.pins:
                if len(pins.slots):
                    self._state.store.unpin(pins.slots, pins.gens)

    def sweep(self, now: float) -> None:
        """Gives back what was offered too long ago. Offers are in the order of their deadlines."""
        while self._offers:
            record = next(iter(self._offers.values()))
            if record.offer is not None and record.offer.deadline > now:
                return
            self._state.counts["offers_expired"] += 1
            self.give_back(record)

    @property
    def offered(self) -> int:
        """Hits that are pinned and not yet taken up."""
        return len(self._offers)

    # -- loads -------------------------------------------------------------------------------------------------------

    def take_up(self, record: Record, blocks: tuple[Any, ...], num_tokens: int) -> None:
        """The engine has allocated blocks for ``num_tokens`` of what was offered, and waits until they are loaded."""
        state, offer = self._state, record.offer
        record.offer = None
        self._offers.pop(record.request.request_id, None)
        groups: list[GroupBlocks] = []
        keys: list[KeyArray] = []
        hopeless = offer is None or offer.local + num_tokens != offer.tokens
        if offer is not None and not hopeless:
            all_keys = self.keys(record, offer.local, offer.tokens)
            for group, (rule, pins) in enumerate(zip(state.rules, offer.pins, strict=True)):
                wanted = range(offer.local // rule.span, offer.tokens // rule.span)
                real = [i for i in wanted if i < len(blocks[group]) and not blocks[group][i].is_null]
                at = as_ids(real) - pins.first
                if len(at) and (at[0] < 0 or at[-1] >= len(pins.slots)):
                    hopeless = True
                    break
                ids = as_ids([blocks[group][i].block_id for i in real])
                groups.append(GroupBlocks(group, ids, pins.slots[at], pins.gens[at], pins.offsets[at]))
                keys.append(all_keys[group][as_ids(real) - wanted.start])
        job = Job(
            job_id=state.next_job_id(),
            epoch=state.worker_changes,
            groups=() if hopeless else tuple(groups),
            request_id=record.request.request_id,
            hopeless=hopeless or state.weights_in_doubt,
            **self._adapter_of(record),
        )
        pins_held = [(p.slots, p.gens) for p in offer.pins if len(p.slots)] if offer is not None else []
        self.queued.append(state.submit(Pending(job, state.world, keys=tuple(keys), record=record, pins=pins_held)))
        self.newest = job.job_id
        record.loads += 1
        state.counts["hit_tokens"] += num_tokens

    def _adapter_of(self, record: Record) -> dict[str, Any]:
        """What a worker has to know of a request's adapter."""
        adapter = record.adapter
        if adapter is None or self.adapters is None:
            return {}
        self.adapters.brought(adapter)
        return {
            "adapter_changes": dict(self.adapters.changes),
            "adapter": (adapter.number, adapter.content, self.forecasts),
        }

    def unpin(self, pending: Pending) -> None:
        """Nobody reads what this job has pinned any more."""
        pins, pending.pins = pending.pins, []
        for slots, gens in pins:
            self._state.store.unpin(slots, gens)

    def finished(self, pending: Pending) -> None:
        """Every rank is through with a load, which is unpinned."""
        store, record = self._state.store, pending.record
        if not pending.failed:
            return
        self._state.counts["load_failures"] += 1
        if record is not None:
            record.load_failed = True
        for group, keys in enumerate(pending.keys):
            bad = [block for at, block in pending.bad if at == group]
            if bad:
                store.remove(keys[bad])
                self._state.counts["corrupt_blocks"] += len(bad)
