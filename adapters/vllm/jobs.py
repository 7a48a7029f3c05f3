"""What goes between the scheduler's side of the connector and the workers, with each engine step.

Job ids grow and are never reused. Numbers of blocks travel as numpy arrays, a batch each; a slot is always named with
its generation, so that whoever is late can tell that the slot is no longer his.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvplug.adapters.devices.base import Int64s
from kvplug.adapters.vllm.layout import LayerPage

Rank = tuple[int, int]
"""(pp rank, tp rank)."""


@dataclass(frozen=True)
class RankLayout(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler once its caches are registered."""

    rank: Rank
    token: str | None
    """The session to join; None if this engine goes without kvplug, and then ``refusal`` says why."""
    refusal: str | None
    groups: tuple[tuple[LayerPage, ...], ...] = ()
    device: str = ""
    isa: str | None = None
    backends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A rank's place in the slots of one group."""

    index: int
    offset: int
    nbytes: int
    writer: bool
    """False for ranks that read a part which another one writes (identical KV is stored once)."""


Plan = tuple[dict[Rank, Part], ...]
"""Per group, the part of each rank that has bytes in it."""


@dataclass(frozen=True)
class GroupBlocks:
    """Blocks of one group and their slots, in one order: int64[N] each."""

    group: int
    block_ids: Int64s
    slots: Int64s
    gens: Int64s
    offsets: Int64s
    """Of the slot, from the start of the mapping, in bytes."""


@dataclass(frozen=True)
class AdapterLoad:
    """A worker has read a LoRA adapter, or has copied it anew and it is not what it was."""

    rank: Rank
    number: int
    """The adapter's id in the engine."""
    content: bytes | None
    """Digest of what it holds; None if that can't be told, and then ``why`` says why."""
    why: str
    changes: int
    """How many adapters of this worker have become others under their ids, this one included."""
    order: int = 0
    """Grows with whatever a worker tells of its adapters. What it says when it is asked overtakes what a step's output
    brings along, where steps overlap."""


@dataclass(frozen=True)
class Job:
    """Blocks to copy. Every rank reports it done exactly once, whatever becomes of it."""

    job_id: int
    epoch: int
    """The scheduler's count of weight changes; a worker that has seen others refuses."""
    groups: tuple[GroupBlocks, ...]
    request_id: str | None = None
    """Of a load; None marks a store."""
    hopeless: bool = False
    """A load that must fail, because what was promised can't be kept."""
    adapter_changes: dict[Rank, int] | None = None
    """If blocks depend on adapters: the scheduler's count of changes in each worker; one with another count refuses."""
    adapter: tuple[int, bytes, bool] | None = None
    """Of a load for a request with an adapter: its id, its content, and whether the worker may have yet to read it."""

    @property
    def num_blocks(self) -> int:
        """Blocks over all groups."""
        return sum(len(group.block_ids) for group in self.groups)


@dataclass(frozen=True, kw_only=True)
class StepMetadata(KVConnectorMetadata):
    """One engine step's jobs."""

    step: int
    engine: str = ""
    """The session of the engine whose step it is; "" while it does without kvplug. Engines in one process share what
    vLLM has once for a process, the worker's connector among it."""
    runs_model: bool
    """False for an empty step, which on some versions ends without wait_for_save."""
    timed: bool = False
    """Whether the scheduler wants to know when its results were there."""
    waits: bool = False
    """Whether requests wait for other hosts: an empty step need not be over at once."""
    plan: Plan | None = None
    """Only with jobs."""
    loads: tuple[Job, ...] = ()
    stores: tuple[Job, ...] = ()


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """What one or more ranks have to say after a step."""

    done: Counter[int] = field(default_factory=Counter)
    """Per job, how many ranks are through with it."""
    failed: set[int] = field(default_factory=set)
    """Jobs that at least one rank did not carry out whole."""
    bad: set[tuple[int, int, int]] = field(default_factory=set)
    """(job, position of the group, position of the block): blocks whose bytes were not what was stored."""
    changed: int = 0
    """Weight changes seen, the most of any rank."""
    counts: Counter[str] = field(default_factory=Counter)
    """What to add to kvplug's counters."""
    ran: int = 0
    """The step whose results come with this, if it is timed."""
    adapters: tuple[AdapterLoad, ...] = ()
    """Adapters that were read, in order."""
    held: dict[Rank, tuple[int, frozenset[int]]] = field(default_factory=dict)
    """Order, and ids of the adapters that a worker has; only if they are others than before."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Adds another rank's report to this one."""
        assert isinstance(other, WorkerReport)
        return WorkerReport(
            self.done + other.done,
            self.failed | other.failed,
            self.bad | other.bad,
            max(self.changed, other.changed),
            self.counts + other.counts,
            max(self.ran, other.ran),
            self.adapters + other.adapters,
            self.held | other.held,
        )


def as_ids(values: list[int]) -> Int64s:
    """int64[N] of a list."""
    return np.array(values, dtype=np.int64)
