"""Stores, on the scheduler's side: which blocks are full after a step, and who holds them while they are copied.

A store never waits for anything. What can't be reserved or held at once is not stored, and counted. Source blocks are
held in the engine's block pool, so that neither preemption nor the end of their request lets them be overwritten; a
store that must make way at once (the engine empties its cache) is cancelled: its slots are quarantined, so that a copy
which still runs fills only what nobody can seal, and its blocks go back.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvplug.adapters.vllm import compat
from kvplug.adapters.vllm.jobs import GroupBlocks, Job, as_ids
from kvplug.adapters.vllm.requests import Record
from kvplug.adapters.vllm.state import EngineState, Pending
from kvplug.errors import Code
from kvplug.keys import block_keys

MAX_BLOCKS_PER_STEP = 2048
"""Bounds the scheduler's own time: what is beyond is stored after one of the next steps."""
_REASONS = {
    Code.FULL: "full", Code.BUDGET: "budget", Code.TIMEOUT: "timeout", Code.IN_PROGRESS: "in_progress",
    Code.RETIRED: "retired",
}  # fmt: skip


class _Batch:
    """Blocks of one group, of any number of requests, that are to be reserved together."""

    def __init__(self) -> None:
        self.blocks: list[Any] = []
        self.keys: list[Any] = []


class Stores:
    """Store jobs and holds of one engine."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self.held = 0

    def full_after(self, record: Record, computed: int) -> bool:
        """Whether some block of the request is full once ``computed`` tokens are. A handful of nanoseconds."""
        return computed >= record.next_at

    def plan(self, due: list[tuple[Record, int]]) -> Job | None:
        """The store job for a step, given requests and how many of their tokens the step leaves computed."""
        state = self._state
        limit = int(compat.num_blocks(state.block_pool) * state.config.store_hold_share)
        room = min(limit - self.held, MAX_BLOCKS_PER_STEP)
        if room <= 0:
            state.counts["steps_without_room"] += 1
            return None
        batches = [_Batch() for _ in state.rules]
        for record, computed in due:
            room -= self._collect(record, computed, batches, room)
            if room <= 0:
                break
        groups, held = [], []
        for group, batch in enumerate(batches):
            if batch.blocks:
                reserved = self._reserve(group, batch)
                if reserved is not None:
                    groups.append(reserved[0])
                    held += reserved[1]
        if not groups:
            return None
        job = Job(job_id=state.next_job_id(), epoch=state.worker_changes, groups=tuple(groups))
        compat.hold(state.block_pool, held)
        self.held += len(held)
        return state.submit(Pending(job, state.world, held=held))

    def _collect(self, record: Record, computed: int, batches: list[_Batch], room: int) -> int:
        """Adds a request's full blocks to the batches, at most ``room`` of them; returns how many."""
        state = self._state
        valid = min(computed, len(record.tokens))  # what is beyond is drafted or not known yet
        steps = record.step_keys(valid)
        blocks = compat.request_blocks(state.manager, record.request.request_id)
        taken, next_at = 0, []
        for group, (rule, batch) in enumerate(zip(state.rules, batches, strict=True)):
            first = record.stored[group]
            last = min(valid // rule.span, len(blocks[group]), first + room - taken)
            if last > first:
                keys = block_keys(
                    steps[: last * rule.span // state.step_tokens], rule.span // state.step_tokens, group, 0, first
                )
                real = [i for i in range(first, last) if not blocks[group][i].is_null]
                batch.blocks += [blocks[group][i] for i in real]
                batch.keys.append(keys if len(real) == last - first else keys[as_ids(real) - first])
                record.stored[group] = last
                taken += len(real)
            next_at.append((record.stored[group] + 1) * rule.span)
        record.next_at = min(next_at)
        return taken

    def _reserve(self, group: int, batch: _Batch) -> tuple[GroupBlocks, list[Any]] | None:
        state = self._state
        slots = state.store.reserve_batch(np.concatenate(batch.keys), state.part_nbytes[group])
        codes, counts = np.unique(slots.codes, return_counts=True)
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            if code == Code.EXISTS:
                state.counts["blocks_present"] += count
            elif code != Code.OK:
                state.counts[f"not_stored:{_REASONS.get(code, 'other')}"] += count
        mine = np.flatnonzero(slots.codes == Code.OK)
        if not len(mine):
            return None
        blocks = [batch.blocks[i] for i in mine.tolist()]
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

    def _holding(self) -> list[Pending]:
        return [pending for pending in self._state.pending.values() if pending.held]

    def let_go(self, pending: Pending) -> None:
        """Gives the engine's blocks back that were held for this job. Idempotent."""
        held, pending.held = pending.held, []
        if held:
            self.held -= len(held)
            compat.release(self._state.block_pool, held)
