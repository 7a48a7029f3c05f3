"""vLLM's connector interface, handed on to the two sides of kvplug.

Nothing is decided here. What is done here is the shield: whatever goes wrong in kvplug, the engine runs on without it,
with one loud line. A load that was promised to the engine is always reported, since the request waits for it.

vLLM imports this module wherever it looks at the configuration, before the device is set up and in processes that never
copy a byte. So what brings in compiled kernels is imported when a side begins its work.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger

from kvplug.adapters.vllm import compat, compat_adapters
from kvplug.adapters.vllm.jobs import Job, Rank, RankLayout, StepMetadata, WorkerReport
from kvplug.adapters.vllm.metrics import KvplugPromMetrics, KvplugStats
from kvplug.errors import KvplugError, UnsupportedEngineError

if TYPE_CHECKING:
    from kvplug.adapters.vllm.boot import SchedulerStart
    from kvplug.adapters.vllm.reloads import Arguments
    from kvplug.adapters.vllm.scheduler import SchedulerSide
    from kvplug.adapters.vllm.worker import LoadResult, WorkerSide

logger = init_logger("vllm.kvplug")
T = TypeVar("T")
U = TypeVar("U")

ARRIVAL_TIMEOUT_S = 10.0
"""How long a worker that is told to end its copies waits for a step that was sent before and comes by another way."""
EMPTY_STEP_S = 0.001
"""How long a step that runs no model lasts while requests wait for other hosts: an engine in one's own process does
not pause between steps, and would take the interpreter from the threads that it waits for."""


class KvplugConnector(KVConnectorBase_V1, SupportsHMA):
    """kvplug's KV connector; one object in the scheduler's process and one in each worker's."""

    _cache_hit_source = compat.host_hit_source()

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._layout: RankLayout | None = None
        self._errors = 0
        self._step_errors: Counter[str] = Counter()
        self._owed: dict[str, None] = {}
        self._awaited: set[str] = set()
        self._given_up: set[str] = set()
        self._reset: compat.CacheReset | None = None
        self._pausing = False
        self._layouts: dict[Rank, Any] = {}
        self._orphans: set[str] = set()
        self._orphan_jobs: set[int] = set()
        self._loading: set[str] = set()
        self._submitted_step = 0
        self._newest_load = self._newest_store = 0
        self._told: RankLayout | None = None
        self._of_another = False
        self._failed: tuple[set[str], set[int]] = set(), set()
        self._by_block = self._shielded("start", _goes_on_at_any_block, False, vllm_config, kv_cache_config)
        self._start: SchedulerStart | None = None
        self._pool: Any = None
        if role == KVConnectorRole.SCHEDULER:
            if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
                logger.warning(
                    "kvplug: a load that fails is computed again; kv_load_failure_policy is set to recompute"
                )
                vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
            self._start = self._shielded("start", _scheduler_start, None, vllm_config)
            self._shielded("start", compat.watch_engine, None, self)
            self._shielded("start", compat_adapters.after_add_lora, None, self, self._on_add_lora)
        else:
            self._shielded("start", compat.on_worker_weights, None, self._on_worker_weights)
            self._shielded("start", self._watch_adapters, None)
        atexit.register(_close, weakref.ref(self))

    # -- the shield --------------------------------------------------------------------------------------------------

    def _shielded(self, what: str, call: Callable[..., T], otherwise: U, *args: Any) -> T | U:
        try:
            return call(*args)
        except Exception as error:
            self._errors += 1
            if self._errors == 1 and isinstance(error, KvplugError):
                logger.warning("kvplug: OFF: %s", error)
            elif self._errors == 1:
                logger.exception("kvplug: OFF, an error in %s; the engine runs on without kvplug", what)
            self._step_errors["hook_errors"] += 1
            if self._scheduler is not None:
                self._scheduler.switch_off()
            return otherwise

    @property
    def requires_kv_delivery(self) -> bool:
        """A store that is dropped is a later miss, nothing more."""
        return False

    # -- the scheduler's process: lookups and loads --------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Keeps the cache manager, whose blocks are held while they are copied."""
        self._kv_cache_manager = kv_cache_manager
        self._pool = kv_cache_manager.block_pool
        self._shielded("start", compat.before_cache_reset, None, kv_cache_manager, self._before_cache_reset)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[Rank, Any]) -> None:
        """All workers have told where their bytes lie: the engine begins to use kvplug, or says why it does not."""

        if not all(isinstance(layout, RankLayout) for layout in metadata.values()):
            return  # it is another connector's, beside which kvplug does not work

        if self._layouts == metadata or self._start is None:  # the engine may tell the same again
            return
        before, self._layouts = self._scheduler, dict(metadata)
        if before is not None:
            if before.loading:
                logger.warning("kvplug: OFF: the workers' layouts changed while blocks were being loaded")
                before.switch_off()
                return
            self._shielded("other layouts", before.close, None)
        self._scheduler = self._shielded("start", self._begin, None, self._start, before)

    def _begin(self, start: SchedulerStart, before: SchedulerSide | None) -> SchedulerSide | None:
        side = start.begin(self._kv_cache_config, self._layouts, logger.warning)
        if side is not None:
            side.state.block_pool, side.state.manager = self._pool, self._kv_cache_manager
            if before is not None:
                side.go_on_from(before)
        return side

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond the engine's own that the pool can give; loaded while other requests go on. None: ask again."""
        side = self._scheduler
        if side is None or side.off or request.request_id in self._given_up:
            return 0, False
        count = self._shielded("a lookup", side.matched_tokens, 0, request, num_computed_tokens)
        return count, bool(count)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Blocks were allocated; a load of ``num_external_tokens`` tokens is now owed to the request."""
        side = self._scheduler
        if side is None:
            return
        if num_external_tokens > 0:
            self._owed[request.request_id] = None
            self._awaited.add(request.request_id)
        elif side.off:
            return
        self._shielded("an allocation", side.allocated, None, request, blocks.blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The step's jobs."""
        scheduled = scheduler_output.num_scheduled_tokens
        side = self._scheduler
        meta = StepMetadata(step=0, engine=side.engine if side is not None else "", runs_model=bool(scheduled))
        if side is not None:
            meta = self._shielded("a step", side.build, meta, {} if side.off else scheduled)
        if self._owed:
            for job in meta.loads:
                self._owed.pop(job.request_id or "", None)
            if self._owed:  # an error lost the job; the request must not wait for ever
                lost = tuple(self._lost_job(request_id) for request_id in self._owed)
                self._owed.clear()
                if side is not None:
                    side.loads.queued.clear()  # what is left there would come a second time
                meta = replace(meta, loads=meta.loads + lost)
        return meta

    def _lost_job(self, request_id: str) -> Job:
        for pending in self._scheduler.state.pending.values() if self._scheduler is not None else ():
            if pending.job.request_id == request_id:
                return replace(pending.job, hopeless=True)
        return Job(0, -1, (), request_id, hopeless=True)

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers have to say."""
        if connector_output.finished_recving and (self._scheduler is not None or self._awaited or self._given_up):
            self._only_awaited(connector_output)
        if self._scheduler is None:
            return
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._shielded("a report", self._scheduler.reported, None, report)

    def _only_awaited(self, connector_output: Any) -> None:
        """A load's end that the engine does not wait for, or has heard of before, would be the engine's own end."""
        finished = connector_output.finished_recving
        if not finished <= self._awaited:
            connector_output.finished_recving = finished & self._awaited
            self._step_errors["hook_errors"] += len(finished - self._awaited - self._given_up)
        self._awaited -= finished
        self._given_up -= finished

    def on_new_request(self, request: Any) -> None:
        """A request was added."""
        if self._scheduler is not None:
            self._shielded("a new request", self._scheduler.new_request, None)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request is over. Its blocks may go at once: those that are being copied are held."""
        if self._scheduler is not None:
            self._shielded("a request's end", self._scheduler.finished, None, request)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """As :meth:`request_finished`."""
        return self.request_finished(request, [])

    def reset_cache(self) -> bool | None:
        """This engine's namespace becomes another; other engines keep what is in the pool."""
        if self._scheduler is not None:
            self._shielded("a cache reset", self._scheduler.reset, None, self._pausing)
        return True

    def on_cache_reset(self, reset: compat.CacheReset | None) -> None:
        """The engine is about to empty its own prefix cache, by a call that it got; None: that is over."""
        self._reset = reset

    def _before_cache_reset(self) -> None:
        self._shielded("a cache reset", self._make_way, None)

    def _make_way(self) -> None:
        """Whatever would not be there without kvplug keeps the engine from emptying its prefix cache no longer."""
        reset, side = self._reset, self._scheduler
        if reset is not None and reset.hopeless:
            return  # the engine says that it could not; until it can, loads and stores go on
        if side is not None:
            side.before_reset()
        if reset is None:
            return
        if reset.loads(self._awaited) or (side is not None and side.stores.held):
            newest = (side.loads.newest, side.stores.newest) if side is not None else (0, 0)
            if not reset.quiesce(*newest):
                logger.warning("kvplug: copies do not end; the engine's prefix cache can't be emptied yet")
                return
            reset.give_up_loads(self._awaited)
            self._given_up |= self._awaited
            self._awaited.clear()
            if side is not None:
                side.quiesced()
        reset.free_deferred()

    def on_weights(self, why: str, seen: int | None) -> None:
        """The engine got a call that has changed weights, or may have."""
        if self._scheduler is not None:
            self._shielded("a change of weights", self._scheduler.weights_changed, None, why, seen)

    def on_weights_begin(self, why: str, seen: int | None, reload: Arguments | None) -> None:
        """The engine got a call that changes weights."""
        if self._scheduler is not None:
            self._shielded("a change of weights", self._scheduler.weights_begin, None, why, seen, reload)

    def on_weights_over(self, seen: int | None, whole: bool) -> None:
        """The call that changes weights is over."""
        if self._scheduler is not None:
            self._shielded("a change of weights", self._scheduler.weights_over, None, seen, whole)

    def on_pause(self, emptying: bool) -> None:
        """The engine begins, or ends, to empty its caches for a pause or a sleep."""
        self._pausing = emptying

    def _on_add_lora(self, reports: list[WorkerReport | None]) -> None:
        if self._scheduler is not None:
            for report in reports:
                if report is not None:
                    self._shielded("an adapter's load", self._scheduler.adapters_reported, None, report)

    # -- the worker's process ------------------------------------------------------------------------------------------

    def _watch_adapters(self) -> None:
        if self._vllm_config.lora_config is not None:
            compat_adapters.on_adapters(
                self._vllm_config, self._on_adapter_read, self._on_adapter_not_read, self._on_adapter_copied
            )

    def _on_adapter_read(self, number: int, path: str | None, listed: Callable[[], Iterable[int]]) -> None:
        if self._worker is not None and self._worker.adapters is not None:
            self._shielded("an adapter's load", self._worker.adapters.reads, None, number, path, listed)

    def _on_adapter_not_read(self, number: int) -> None:
        if self._worker is not None and self._worker.adapters is not None:
            self._shielded("an adapter's load", self._worker.adapters.not_read, None, number)

    def _on_adapter_copied(self, number: int) -> None:
        if self._worker is not None and self._worker.adapters is not None:
            self._shielded("an adapter's load", self._worker.adapters.copied, None, number)

    def adapters_report(self) -> WorkerReport | None:
        """What the scheduler's side does not know yet of this worker's adapters; asked by
        :mod:`kvplug.adapters.vllm.compat_adapters`."""
        if self._worker is None or self._worker.adapters is None:
            return None
        return self._shielded("a report", self._worker.adapters.add_to, None, None)

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Joins the engine's session and works out where the bytes of a block lie."""
        if not compat.is_only_connector(self):
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

        self._layout, self._worker = worker_start(self._vllm_config, self._kv_cache_config, kv_caches, logger.warning)
        self._told = self._layout

    def get_handshake_metadata(self) -> RankLayout | None:
        """Where this worker's bytes lie, for the scheduler's side."""
        return self._told

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins; its loads begin with it, since what they write to was allocated and is not in use."""
        super().bind_connector_metadata(connector_metadata)
        meta = connector_metadata
        mine = self._layout.token if self._layout is not None else None
        self._of_another = isinstance(meta, StepMetadata) and meta.engine != (mine or "")
        if self._of_another or not isinstance(meta, StepMetadata) or not meta.loads:
            return
        if self._worker is None or not self._shielded("a load", self._submit_loads, False, meta):
            self._orphans |= {job.request_id for job in meta.loads if job.request_id}
            self._orphan_jobs |= {job.job_id for job in meta.loads}
        self._newest_load = max(self._newest_load, *(job.job_id for job in meta.loads))

    def _submit_loads(self, meta: StepMetadata) -> bool:
        assert self._worker is not None
        self._worker.submit_loads(meta.loads, meta.plan)
        self._loading |= {job.request_id for job in meta.loads if job.request_id}
        return True

    def _take_loaded(self, wait: bool) -> list[LoadResult]:
        assert self._worker is not None
        # One that was given up after an error was reported then: a second time it would stand for another rank's.
        loaded = [one for one in self._worker.take_loaded(wait) if one.job.request_id in self._loading]
        self._loading -= {result.job.request_id for result in loaded}
        for result in loaded:
            self._worker.look_again(result)
        return loaded

    def _give_up_loads(self) -> None:
        """Results can't be had; once no copy runs any more the requests may go on without their loads."""
        if self._worker is not None and self._loading and self._worker.drain():
            self._orphans |= self._loading
            self._loading = set()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads began when the step's metadata came."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No forward pass uses blocks that are being loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole blocks are stored after the step."""

    def wait_for_save(self) -> None:
        """The step's blocks are written, or the device has been told to: their stores begin. Does not wait."""
        meta = self._connector_metadata
        if self._worker is None or self._of_another or not isinstance(meta, StepMetadata):
            return
        if meta.step <= self._submitted_step:
            return
        self._submitted_step = meta.step
        if meta.stores:
            self._shielded("a store", self._worker.submit_stores, None, meta.stores, meta.plan)
            self._newest_store = max(job.job_id for job in meta.stores)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Loads that ended. One that failed is also reported as failed, and its tokens are computed."""
        if self._of_another:
            return KVConnectorTransferResults(finished_recving=set(), failed_recving=set())
        meta = self._connector_metadata
        runs_model = meta.runs_model if isinstance(meta, StepMetadata) else True
        if not runs_model:
            self.wait_for_save()
        loaded: list[LoadResult] | None = []
        if self._worker is not None:
            loaded = self._shielded("a load's end", self._take_loaded, None, not runs_model)
            if not runs_model and not loaded and isinstance(meta, StepMetadata) and meta.waits:
                time.sleep(EMPTY_STEP_S)
            if loaded is None:
                self._shielded("a load's end", self._give_up_loads, None)
        finished, self._orphans = self._orphans, set()
        failed = set(finished)
        invalid: set[int] = set()
        for result in loaded or ():
            request_id = result.job.request_id or ""
            finished.add(request_id)
            if not result.ok:
                if self._by_block and result.failed_blocks:
                    invalid |= result.failed_blocks
                else:
                    failed.add(request_id)
        adapters = self._worker.adapters if self._worker is not None else None
        if adapters is not None:  # vLLM throws away what such requests have computed in this step, and begins again
            invalid |= adapters.contradicted()
            adapters.finished(finished_req_ids)
        self._failed = failed, invalid
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of single-group models that do not hold what they should."""
        if self._of_another:
            return set()
        invalid = self._failed[1]
        self._failed = set(), set()
        return invalid

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What the scheduler's side has to know."""
        if self._of_another:
            return None
        report = self._shielded("a report", self._worker.take_report, None) if self._worker is not None else None
        if self._orphan_jobs:
            report = report or WorkerReport()
            report.done.update(self._orphan_jobs)
            report.failed |= self._orphan_jobs
            self._orphan_jobs = set()
        meta = self._connector_metadata
        if isinstance(meta, StepMetadata) and meta.timed:
            report = report or WorkerReport()
            report.ran = meta.step
        return report

    def quiesce(self, newest_load: int, newest_store: int) -> bool:
        """Copies that have not begun are given up, and the others waited for, within a bound; whether all is quiet.

        Args:
            newest_load: the last load's job that the scheduler has sent; it may be on its way here still.
            newest_store: the last store's.
        """
        if self._worker is None:
            return True
        deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
        while self._newest_load < newest_load or self._newest_store < newest_store:
            if time.monotonic() > deadline:
                return False
            time.sleep(EMPTY_STEP_S)
        return self._shielded("a cache reset", self._worker.quiesce, False)

    def weight_changes_seen(self) -> int:
        """How many changes of weights there were in this worker; asked by :mod:`kvplug.adapters.vllm.compat`."""
        return self._worker.changes_seen if self._worker is not None else 0

    def _on_worker_weights(self, why: str) -> None:
        if self._worker is not None:
            self._shielded("a change of weights", self._worker.weights_change, None, why)

    # -- figures, end --------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KvplugStats | None:
        """Counts since the last call; only the scheduler's side has any, workers send theirs there."""
        side = self._scheduler
        if side is not None and side.fetches is not None:
            self._shielded("a report", side.fetches.gather_counts, None)
        if self.role != KVConnectorRole.SCHEDULER or not (
            self._step_errors or (side is not None and side.state.counts)
        ):
            return None
        counts, self._step_errors = self._step_errors, Counter()
        if side is not None:
            counts.update(side.state.counts)
            side.state.counts.clear()
        return KvplugStats(data=dict(counts))

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvplugStats | None:
        """The counts as vLLM's loggers want them."""
        return KvplugStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KvplugPromMetrics | None:
        """kvplug's counters for /metrics; None if they can't be registered, which is no reason for an engine to end."""
        try:
            return KvplugPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        except Exception:
            logger.exception("kvplug: an error in its counters; there are none of kvplug's on /metrics")
            return None

    def shutdown(self) -> None:
        """Leaves the pool."""
        compat.forget(self, self._on_worker_weights)
        compat_adapters.forget_adapters(self, self._on_adapter_copied)
        worker, self._worker = self._worker, None
        scheduler, self._scheduler = self._scheduler, None
        if worker is not None:
            self._shielded("the end", worker.close, None)
        if scheduler is not None:
            self._shielded("the end", scheduler.close, None)


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


def _scheduler_start(vllm_config: Any) -> SchedulerStart:
    from kvplug.adapters.vllm.boot import SchedulerStart

    return SchedulerStart(vllm_config)


def _close(connector: weakref.ref[KvplugConnector]) -> None:
    """Ends the copy threads before the interpreter's memory goes."""
    living = connector()
    if living is not None:
        living.shutdown()
