"""Stores, on the scheduler's side: which blocks are full after a step, and who holds them while they are copied.

A store never waits for anything. What can't be reserved or held at once is not stored, and counted. Source blocks are
held in the engine's block pool, so that neither preemption nor the end of their request lets them be overwritten; a
store that must make way at once (the engine empties its cache) is cancelled: its slots are quarantined, so that a copy
which still runs fills only what nobody can seal, and its blocks go back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvplug.adapters.devices.base import Int64s
from kvplug.adapters.vllm import compat
from kvplug.adapters.vllm.hits import Bools
from kvplug.adapters.vllm.jobs import GroupBlocks, Job, as_ids
from kvplug.adapters.vllm.requests import LoraIdentities, Record
from kvplug.adapters.vllm.state import EngineState, Pending
from kvplug.errors import Code
from kvplug.identity.keys import KeyArray, block_keys

MAX_BLOCKS_PER_STEP = 2048
"""Bounds the scheduler's own time: what is beyond is stored after one of the next steps."""
_REASONS = {
    Code.FULL: "full", Code.BUDGET: "budget", Code.TIMEOUT: "timeout", Code.IN_PROGRESS: "in_progress",
    Code.RETIRED: "retired",
}  # fmt: skip


@dataclass
class _Due:
    """Blocks of one group of one request that are full and not stored yet, from block ``first`` on."""

    record: Record
    group: int
    first: int
    blocks: list[Any]
    keys: KeyArray
    ends: Int64s
    """int64[N]: tokens of the request up to the end of each block."""
    wanted: Bools
    """bool[N]: to be stored. Not the null block, which stands for what lies before a window."""
    present: Bools
    """bool[N]: known to be in the pool."""


class Stores:
    """Store jobs and holds of one engine."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self.held = 0
        self.newest = 0
        """The last store's job."""
        self.adapters: LoraIdentities | None = None
        """The engine's LoRA adapters."""

    def plan(self, due: list[tuple[Record, int]]) -> Job | None:
        """The store job for a step, given requests and how many of their tokens the step leaves computed.

        Where there is no room for all, the requests' prefixes are stored as far as it reaches, every group's blocks of
        a span before those of the next one: a hit takes all groups. The rest stays due, for the request's next steps.
        """
        state = self._state
        limit = int(compat.num_blocks(state.block_pool) * state.config.store_hold_share)
        room = min(limit - self.held, MAX_BLOCKS_PER_STEP)
        for record, computed in due:
            record.due = min(computed, len(record.tokens))  # what is beyond is drafted or not known yet
        if room <= 0:
            state.counts["steps_without_room"] += 1
            return None
        found = self._collect([record for record, _ in due])
        if sum(int(part.wanted.sum()) for part in found) > room:
            self._share(found, room)
        groups, held = [], []
        for group in range(len(state.rules)):
            parts = [part for part in found if part.group == group and part.wanted.any()]
            reserved = self._reserve(group, parts) if parts else None
            if reserved is not None:
                groups.append(reserved[0])
                held += reserved[1]
        if not groups:
            return None
        has_adapter = self.adapters is not None and any(record.adapter is not None for record, _ in due)
        job = Job(
            job_id=state.next_job_id(),
            epoch=state.worker_changes,
            groups=tuple(groups),
            adapter_changes=dict(self.adapters.changes) if self.adapters is not None and has_adapter else None,
        )
        self.newest = job.job_id
        compat.hold(state.block_pool, held)
        self.held += len(held)
        return state.submit(Pending(job, state.world, held=held))

    def _collect(self, records: list[Record]) -> list[_Due]:
        """The requests' full blocks, some :data:`MAX_BLOCKS_PER_STEP` of them. From now on they count as stored."""
        state = self._state
        found: list[_Due] = []
        left = MAX_BLOCKS_PER_STEP
        for record in records:
            steps = record.step_keys(record.due)
            blocks = compat.request_blocks(state.manager, record.request.request_id)
            most = max(1, left // len(state.rules))
            for group, rule in enumerate(state.rules):
                first = record.stored[group]
                last = min(record.due // rule.span, len(blocks[group]), first + most)
                if last <= first:
                    continue
                per_block = rule.span // state.step_tokens
                some = list(blocks[group][first:last])
                found.append(
                    _Due(
                        record,
                        group,
                        first,
                        some,
                        keys=block_keys(steps[: last * per_block], per_block, group, 0, first),
                        ends=np.arange(first + 1, last + 1, dtype=np.int64) * rule.span,
                        wanted=np.array([not block.is_null for block in some]),
                        present=np.zeros(len(some), np.bool_),
                    )
                )
                left -= last - first
                self._stored(record, group, last)
            if left <= 0:
                break
        return found

    def _stored(self, record: Record, group: int, blocks: int) -> None:
        record.stored[group] = blocks
        record.next_at = min((n + 1) * rule.span for n, rule in zip(record.stored, self._state.rules, strict=True))

    def _share(self, found: list[_Due], room: int) -> None:
        """Gives ``room`` blocks to the earliest spans, request by request. What has none is due again."""
        keys = np.concatenate([part.keys[part.wanted] for part in found])
        there = np.array(self._state.store.exists(keys), dtype=np.bool_)
        for part, present in zip(
            found, np.split(there, np.cumsum([part.wanted.sum() for part in found])[:-1]), strict=True
        ):
            part.present[part.wanted] = present  # it needs no room
            part.wanted &= ~part.present
        for record in {id(part.record): part.record for part in found}.values():
            parts = [part for part in found if part.record is record]
            ends = np.concatenate([part.ends[part.wanted] for part in parts])
            owner = np.repeat(np.arange(len(parts)), [int(part.wanted.sum()) for part in parts])
            taken = np.bincount(owner[np.argsort(ends, kind="stable")[:room]], minlength=len(parts)).tolist()
            for part, count in zip(parts, taken, strict=True):
                wanted = np.flatnonzero(part.wanted)
                cut = int(wanted[count]) if count < len(wanted) else len(part.blocks)
                part.wanted[cut:] = False
                self._stored(record, part.group, part.first + cut)
                self._state.counts["blocks_present"] += int(part.present[:cut].sum())
            room -= sum(taken)

    def without_room(self, record: Record) -> int:
        """Full blocks of a request that is over which no step had room to store."""
        state = self._state
        blocks = compat.request_blocks(state.manager, record.request.request_id) if record.due else ()
        return sum(
            not block.is_null
            for group, (rule, some) in enumerate(zip(state.rules, blocks, strict=False))
            for block in some[record.stored[group] : record.due // rule.span]
        )

    def _reserve(self, group: int, parts: list[_Due]) -> tuple[GroupBlocks, list[Any]] | None:
        state = self._state
        keys = np.concatenate([part.keys[part.wanted] for part in parts])
        blocks = [part.blocks[i] for part in parts for i in np.flatnonzero(part.wanted).tolist()]
        slots = state.store.reserve_batch(keys, state.part_nbytes[group])
        codes, counts = np.unique(slots.codes, return_counts=True)
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            if code == Code.EXISTS:
                state.counts["blocks_present"] += count
            elif code != Code.OK:
                state.counts[f"not_stored:{_REASONS.get(code, 'other')}"] += count
        mine = np.flatnonzero(slots.codes == Code.OK)
        if not len(mine):
            return None
        blocks = [blocks[i] for i in mine.tolist()]
        ids = as_ids([block.block_id for block in blocks])
        return GroupBlocks(group, ids, slots.slots[mine], slots.gens[mine], slots.offsets[mine]), blocks

    # -- letting go --------------------------------------------------------------------------------------------------

    def finished(self, pending: Pending) -> None:
        """Every rank is through with a store; its blocks are let go of next."""
        store = self._state.store
        for group in pending.job.groups:
            if pending.cancelled:
                store.acknowledge(group.slots, group.gens)
            elif pending.failed:
                store.abort_batch(group.slots, group.gens, writers_done=True)
                self._state.counts["not_stored:given_up"] += len(group.slots)

    def poll(self) -> None:
        """Lets go of blocks whose slots are sealed. An idle engine has no steps in which the workers could say so."""
        store = self._state.store
        for pending in self._holding():
            if not any(store.still_writing(group.slots, group.gens).any() for group in pending.job.groups):
                self.let_go(pending)

    def cancel_all(self) -> None:
        """Lets go of every block that is held. Slots that are not sealed by now never will be."""
        store = self._state.store
        for pending in self._holding():
            writing = False
            for group in pending.job.groups:
                if store.still_writing(group.slots, group.gens).any():
                    pending.cancelled = True
                    store.abort_batch(group.slots, group.gens, writers_done=False)
                    writing |= bool(store.still_writing(group.slots, group.gens).any())
            if writing:  # the abort is queued behind a busy lock, and until it is done these could still be sealed
                continue
            self.let_go(pending)

    def let_all_go(self) -> None:
        """Lets go of every block that is held; only where no worker copies from them any more."""
        for pending in self._holding():
            self.let_go(pending)

    def _holding(self) -> list[Pending]:
        return [pending for pending in self._state.pending.values() if pending.held]

    def let_go(self, pending: Pending) -> None:
        """Gives the engine's blocks back that were held for this job. Idempotent."""
        held, pending.held = pending.held, []
        if held:
            self.held -= len(held)
            compat.release(self._state.block_pool, held)
