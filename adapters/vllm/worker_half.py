"""The connector in a worker's process: around the worker's side, which begins when the caches are registered.

Each call goes on to that side behind the shield. What has come here and what is yet to be told is kept apart from it
(:mod:`kvplug.adapters.vllm.arrivals`), so that every load's end is told whatever became of the side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.logger import init_logger

from kvplug.adapters.vllm import compat, compat_adapters
from kvplug.adapters.vllm.arrivals import Arrivals, LoadEnds
from kvplug.adapters.vllm.jobs import RankLayout, StepMetadata, WorkerReport
from kvplug.adapters.vllm.shield import Shield
from kvplug.errors import UnsupportedEngineError

if TYPE_CHECKING:
    from kvplug.adapters.vllm.worker import LoadResult, WorkerSide

logger = init_logger("vllm.kvplug")

ARRIVAL_TIMEOUT_S = 10.0
"""How long a worker that is told to end its copies waits for a step that was sent before and comes by another way."""
EMPTY_STEP_S = 0.001
"""How long a step that runs no model lasts while requests wait for other hosts: an engine in one's own process does
not pause between steps, and would take the interpreter from the threads that it waits for."""


class WorkerHalf:
    """One worker's. In the scheduler's process there is one too, which is never begun and answers that there is
    nothing.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self.side: WorkerSide | None = None
        """None before the caches are registered, where kvplug can't work, and after the end."""
        self.shield = Shield(logger)
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self._arrivals, self._ends = Arrivals(), LoadEnds()
        self._by_block = False
        self._layout: RankLayout | None = None
        self._told: RankLayout | None = None
        self._invalid: set[int] = set()
        self.weight_losses_seen = 0
        """How often weights were thrown away in this worker, to be loaded anew."""

    # -- begin and end -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """From now on the engine's adapters are watched."""
        self._by_block = self.shield("start", _goes_on_at_any_block, False, self._vllm_config, self._kv_cache_config)
        self.shield("start", self._watch_adapters, None)

    def register(self, caches: dict[str, Any], is_only: bool) -> None:
        """Joins the engine's session and works out where the bytes of a block lie.

        ``is_only``: whether the engine has no other KV connector.
        """
        if not is_only:
            # A load's failure is then dealt with as the others' configuration says, which may be the request's end,
            # and what the workers tell goes to all of them alike.
            if compat.ranks() == (0, 0):
                logger.warning(
                    "kvplug: OFF: KvplugConnector is one of several KV connectors, and works only as the only one"
                )
            return
        if self._layout is not None:  # vLLM has one worker's connector in a process; this one copies another's blocks
            self._told = RankLayout(
                compat.ranks(),
                None,
                "another engine in this process uses kvplug, and an engine needs a process of its own",
            )
            return
        from kvplug.adapters.vllm.boot import worker_start

        self._layout, self.side = worker_start(self._vllm_config, self._kv_cache_config, caches, logger.warning)
        self._arrivals.engine = self._layout.token or ""
        self._told = self._layout

    @property
    def layout(self) -> RankLayout | None:
        """Where this worker's bytes lie, or why they are not told, for the scheduler's side."""
        return self._told

    def close(self) -> None:
        """Leaves the pool."""
        side, self.side = self.side, None
        if side is not None:
            self.shield("the end", side.close, None)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step_begins(self, meta: object) -> None:
        """Its loads begin with it, since what they write to was allocated and is not in use."""
        self._arrivals.begins(meta.engine if isinstance(meta, StepMetadata) else None)
        if self._arrivals.foreign or not isinstance(meta, StepMetadata) or not meta.loads:
            return
        if self.side is None or not self.shield("a load", self._begin_loads, False, self.side, meta):
            self._ends.lost(meta.loads)
        self._arrivals.loads(meta.loads)

    def _begin_loads(self, side: WorkerSide, meta: StepMetadata) -> bool:
        side.submit_loads(meta.loads, meta.plan)
        self._ends.begun(meta.loads)
        return True

    def step_written(self, meta: object) -> None:
        """The step's blocks are written, or the device has been told to: their stores begin. Does not wait."""
        if self.side is None or not isinstance(meta, StepMetadata) or not self._arrivals.ends(meta.step):
            return
        if meta.stores:
            self.shield("a store", self.side.submit_stores, None, meta.stores, meta.plan)
            self._arrivals.stores(meta.stores)

    def results(self, meta: object, finished_requests: set[str]) -> KVConnectorTransferResults:
        """Loads that ended. One that failed is also reported as failed, and its tokens are computed."""
        if self._arrivals.foreign:
            return KVConnectorTransferResults(finished_recving=set(), failed_recving=set())
        runs_model = meta.runs_model if isinstance(meta, StepMetadata) else True
        if not runs_model:
            self.step_written(meta)
        side = self.side
        loaded: list[LoadResult] | None = []
        if side is not None:
            loaded = self.shield("a load's end", self._take_loaded, None, side, not runs_model)
            if not runs_model and not loaded and isinstance(meta, StepMetadata) and meta.waits:
                time.sleep(EMPTY_STEP_S)
            if loaded is None:
                self.shield("a load's end", self._give_up_loads, None, side)
            for result in loaded or ():
                if not self.shield("a load's end", self._look_again, False, side, result):
                    result.ok, result.failed_blocks = False, set()  # whether it was spoilt can't be told
        ended = self._ends.tell(loaded or (), self._by_block)
        self._invalid = ended.invalid
        if side is not None and side.adapters is not None:
            # vLLM throws away what such requests have computed in this step, and begins again
            self._invalid |= side.adapters.contradicted()
            side.adapters.finished(finished_requests)
        return KVConnectorTransferResults(finished_recving=ended.finished, failed_recving=ended.failed)

    def _take_loaded(self, side: WorkerSide, wait: bool) -> list[LoadResult]:
        return self._ends.take(side.take_loaded(wait))

    def _look_again(self, side: WorkerSide, result: LoadResult) -> bool:
        side.look_again(result)
        return True

    def _give_up_loads(self, side: WorkerSide) -> None:
        """Results can't be had; once no copy runs any more the requests may go on without their loads."""
        if self._ends.loading and side.drain():
            self._ends.give_up()

    def take_invalid(self) -> set[int]:
        """Blocks of single-group models that do not hold what they should."""
        if self._arrivals.foreign:
            return set()
        invalid, self._invalid = self._invalid, set()
        return invalid

    def report(self, meta: object) -> WorkerReport | None:
        """What the scheduler's side has to know."""
        if self._arrivals.foreign:
            return None
        report = self.shield("a report", self.side.take_report, None) if self.side is not None else None
        unreported = self._ends.take_unreported_jobs()
        if unreported:
            report = report or WorkerReport()
            report.done.update(unreported)
            report.failed |= unreported
        if self.shield.counts:
            report = report or WorkerReport()
            report.counts.update(self.shield.take_counts())
        if isinstance(meta, StepMetadata) and meta.timed:
            report = report or WorkerReport()
            report.ran = meta.step
        return report

    # -- what the engine is told to do ---------------------------------------------------------------------------------

    def quiesce(self, newest_load: int, newest_store: int) -> bool:
        """Copies that have not begun are given up, and the others waited for, within a bound; whether all is quiet.

        Args:
            newest_load: the last load's job that the scheduler has sent; it may be on its way here still.
            newest_store: the last store's.
        """
        if self.side is None:
            return True
        deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
        while not self._arrivals.have(newest_load, newest_store):
            if time.monotonic() > deadline:
                return False
            time.sleep(EMPTY_STEP_S)
        return self.shield("a cache reset", self.side.quiesce, False)

    @property
    def weight_changes_seen(self) -> int:
        """How many changes of weights there were in this worker."""
        return self.side.changes_seen if self.side is not None else 0

    def on_weights(self, why: str, loses: bool) -> None:
        """Weights are about to change here, or have just changed; ``loses``: they will have to be loaded anew."""
        self.weight_losses_seen += loses
        if self.side is not None:
            self.shield("a change of weights", self.side.weights_change, None, why)

    # -- adapters ------------------------------------------------------------------------------------------------------

    def _watch_adapters(self) -> None:
        if self._vllm_config.lora_config is not None:
            compat_adapters.on_adapters(
                self._vllm_config, self._on_adapter_read, self._on_adapter_not_read, self.on_adapter_copied
            )

    def _on_adapter_read(self, number: int, path: str | None, listed: Callable[[], Iterable[int]]) -> None:
        if self.side is not None and self.side.adapters is not None:
            self.shield("an adapter's load", self.side.adapters.reads, None, number, path, listed)

    def _on_adapter_not_read(self, number: int) -> None:
        if self.side is not None and self.side.adapters is not None:
            self.shield("an adapter's load", self.side.adapters.not_read, None, number)

    def on_adapter_copied(self, number: int) -> None:
        """The engine has copied an adapter to where the model reads it."""
        if self.side is not None and self.side.adapters is not None:
            self.shield("an adapter's load", self.side.adapters.copied, None, number)

    def adapters_report(self) -> WorkerReport | None:
        """What the scheduler's side does not know yet of this worker's adapters."""
        if self.side is None or self.side.adapters is None:
            return None
        return self.shield("a report", self.side.adapters.add_to, None, None)


def _goes_on_at_any_block(vllm_config: Any, kv_cache_config: Any) -> bool:
    """Whether a request can be computed from any of its blocks on, so that vLLM may be told which could not be loaded.

    Behind a window it can't: of a hit only the last window is loaded, and vLLM would go on in front of that. Nor where
    steps overlap: until vLLM hears of the blocks, its cache may have been reset, and they may be others' that run.
    """
    if kv_cache_config is None or compat.steps_overlap(vllm_config):
        return False
    try:
        rules = compat.group_rules(kv_cache_config)
    except UnsupportedEngineError:  # then nothing is ever loaded
        return False
    return len(rules) == 1 and rules[0].whole_prefix
