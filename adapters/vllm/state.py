"""What the scheduler's side of the connector knows: the pool, the model's groups, the namespace that is in force.

**Namespace in force.** ``root`` is the 32 bytes that chains of keys start from, or None while nothing may be looked up
or stored. It is None until the weights are identified, which happens in the background, and after a change of weights
until the engine has emptied its own prefix cache: until then requests may build on blocks that the old weights made.
After that the engine has a private namespace of its own, until its weights are known by content again. ``epoch`` counts
these changes; a request that was opened in another epoch is never stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvplug.adapters.devices.base import Int64s
from kvplug.adapters.vllm import compat
from kvplug.adapters.vllm.groups import GroupRule
from kvplug.adapters.vllm.hits import common_span
from kvplug.adapters.vllm.jobs import Job, Plan
from kvplug.adapters.vllm.requests import Record
from kvplug.config import Config
from kvplug.identity.keys import step_for_spans
from kvplug.identity.namespace import Namespace, WeightsIdentity
from kvplug.store import KvStore


@dataclass
class Pending:
    """A job that was given to the workers and not yet reported by all of them."""

    job: Job
    ranks_left: int
    keys: tuple[npt.NDArray[np.uint8], ...] = ()
    """Of a load: per group of the job (N, 32) uint8."""
    record: Record | None = None
    """Of a load."""
    pins: list[tuple[Int64s, Int64s]] = field(default_factory=list)
    """Of a load: (slots, generations) to unpin when every rank has reported."""
    held: list[Any] = field(default_factory=list)
    """Of a store: the engine's blocks that are held for it."""
    cancelled: bool = False
    """Of a store: its slots were given up and are acknowledged when every rank has reported."""
    failed: bool = False
    bad: set[tuple[int, int]] = field(default_factory=set)
    """Of a load: (position of the group in the job, position of the block) whose bytes were not what was stored."""


class EngineState:
    """Shared by lookups, loads and stores; owned by :class:`kvplug.adapters.vllm.scheduler.SchedulerSide`."""

    def __init__(self, store: KvStore, config: Config, rules: list[GroupRule], plan: Plan, world: int) -> None:
        self.store = store
        self.config = config
        self.rules = rules
        self.plan = plan
        self.world = world
        self.part_nbytes = [part_sizes(parts) for parts in plan]
        self.span = common_span(rules)
        self.step_tokens = step_for_spans(rule.span for rule in rules)
        self.counts: Counter[str] = Counter()
        self.records: dict[str, Record] = {}
        self.pending: dict[int, Pending] = {}
        self.block_pool: Any = None
        self.manager: Any = None
        self.namespace: Namespace | None = None
        self.root: bytes | None = None
        self.epoch = 0
        self.worker_changes = 0
        self.on_namespace: Callable[[Namespace], None] = lambda _: None
        self._paused = False
        self._told: Namespace | None = None
        """The namespace that ``on_namespace`` was told last."""
        self._stale_cache: object | None = None
        self._changed = self._rotated = False
        """Whether weights may have changed since they were identified; whether a user's reset has hidden old blocks."""
        self._jobs = 0

    # -- namespace -------------------------------------------------------------------------------------------------

    def enter(self, namespace: Namespace) -> None:
        """Puts a namespace into force."""
        self.namespace = namespace
        self.root = namespace.digest()
        self._tell()

    def _tell(self) -> None:
        """In a pause nothing is told: after it the namespace may be the one before it."""
        if not self._paused and self.root is not None and self.namespace is not None and self.namespace != self._told:
            self._told = self.namespace
            self.on_namespace(self.namespace)

    def identified(self, namespace: Namespace) -> None:
        """Which weights the engine has loaded at its start is known."""
        namespace = namespace.rotated() if self._rotated else namespace
        self.namespace = namespace.private() if self._changed else namespace
        if self._stale_cache is None:
            self.enter(self.namespace)

    def weights_changed(self) -> None:
        """From now on nothing is looked up or stored until the engine's own prefix cache has been emptied."""
        self.epoch += 1
        self.root = None
        self._changed = True
        self._stale_cache = compat.cache_identity(self.block_pool) if self.block_pool is not None else object()

    def go_on_if_empty(self) -> None:
        """After a change of weights: nothing needs to be emptied where nothing is cached and no request has computed
        anything.
        """
        if self.block_pool is not None and compat.nothing_is_cached(self.block_pool) and not self._holds_computed():
            self._go_on()

    def _holds_computed(self) -> bool:
        """Whether a request has KV that the weights so far have made, or is getting some."""
        loading = any(pending.job.request_id is not None for pending in self.pending.values())
        return loading or any(record.request.num_computed_tokens for record in self.records.values())

    @property
    def weights_known(self) -> bool:
        """Whether the weights in memory are those that the namespace names, or will when they are identified."""
        return not self._changed

    def same_again(self) -> None:
        """The weights in memory are those that the namespace has named all the time, byte for byte."""
        if self.namespace is None:
            self._changed = False
        else:
            self.known_again(self.namespace.weights)

    def known_again(self, weights: WeightsIdentity) -> None:
        """The weights that are in memory are known by content once more."""
        if self.namespace is None:
            return
        self._changed = False
        self.namespace = self.namespace.identified(weights)
        if self._stale_cache is None:
            self.epoch += 1
            self.enter(self.namespace)
        self.counts["weights_known_again"] += 1

    def paused(self) -> None:
        """The engine has emptied its prefix cache for a pause or a sleep, in which weights may change unseen."""
        self._paused = True
        self.weights_changed()
        if self._stale_cache is not None and self.block_pool is not None and compat.nothing_is_cached(self.block_pool):
            self._go_on()  # requests that it keeps have lost their blocks, and are computed again

    def resumed(self) -> None:
        """The engine is about to go on after a pause or a sleep."""
        self._paused = False
        self._tell()

    def _go_on(self) -> None:
        """Nothing of other weights is left in the engine's own cache."""
        self._stale_cache = None
        if self.namespace is not None:
            self.enter(self.namespace.private() if self._changed else self.namespace)

    def go_on_from(self, before: EngineState) -> None:
        """Counts jobs and changes of weights on; what had left the shared namespace does not come back to it."""
        self._jobs, self.worker_changes = before._jobs, before.worker_changes
        if before._rotated:
            self.rotate()
        if before.epoch:
            self.weights_changed()

    def rotate(self) -> None:
        """This engine's blocks so far are hidden from it; they stay there for others."""
        self.epoch += 1
        self._rotated = True
        if self.namespace is not None:
            self.namespace = self.namespace.rotated()
            if self.root is not None:
                self.enter(self.namespace)
        self.counts["rotations"] += 1

    def current_root(self) -> bytes | None:
        """The root in force, after having looked whether a change of weights has been dealt with."""
        if (
            self._stale_cache is not None
            and self.namespace is not None
            and compat.cache_identity(self.block_pool) is not self._stale_cache
        ):
            self.epoch += 1
            self._go_on()
        return self.root

    @property
    def weights_in_doubt(self) -> bool:
        """Whether weights were changed and the engine's own cache was not emptied since."""
        return self._stale_cache is not None

    # -- jobs ------------------------------------------------------------------------------------------------------

    def next_job_id(self) -> int:
        """A number that no job of this engine has had."""
        self._jobs += 1
        return self._jobs

    def submit(self, pending: Pending) -> Job:
        """Notes a job as given to the workers."""
        self.pending[pending.job.job_id] = pending
        return pending.job


def part_sizes(parts: dict[Any, Any]) -> list[int]:
    """Bytes of each part of a slot, in the order of their indices."""
    sizes = {part.index: part.nbytes for part in parts.values()}
    return [sizes[index] for index in range(len(sizes))]
