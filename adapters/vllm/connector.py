"""vLLM's connector interface, handed on to kvplug's half in this process: the scheduler's or a worker's.

Nothing is decided here. The halves shield the engine: whatever goes wrong in kvplug, it runs on without it, with one
loud line. They also keep what the engine was promised: a load is always reported, since its request waits for it.

vLLM imports this module wherever it looks at the configuration, before the device is set up and in processes that never
copy a byte. So what brings in compiled kernels is imported when a side begins its work.
"""

from __future__ import annotations

import atexit
import weakref
from typing import TYPE_CHECKING, Any

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
from kvplug.adapters.vllm.jobs import Rank, RankLayout, WorkerReport
from kvplug.adapters.vllm.metrics import KvplugPromMetrics, KvplugStats
from kvplug.adapters.vllm.scheduler_half import SchedulerHalf
from kvplug.adapters.vllm.worker_half import WorkerHalf

if TYPE_CHECKING:
    from kvplug.adapters.vllm.fingerprint import LookAtWeights
    from kvplug.adapters.vllm.reloads import Arguments

logger = init_logger("vllm.kvplug")


class KvplugConnector(KVConnectorBase_V1, SupportsHMA):
    """kvplug's KV connector; one object in the scheduler's process and one in each worker's."""

    _cache_hit_source = compat.host_hit_source()

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler = SchedulerHalf(kv_cache_config)
        self._worker = WorkerHalf(vllm_config, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            half = self._scheduler
            half.begin(vllm_config)
            half.shield("start", compat.watch_engine, None, self)
            half.shield("start", compat_adapters.after_add_lora, None, self, half.adapters_loaded)
        else:
            self._worker.shield("start", compat.on_worker_weights, None, self.on_worker_weights)
            self._worker.begin()
        atexit.register(_close, weakref.ref(self))

    @property
    def requires_kv_delivery(self) -> bool:
        """A store that is dropped is a later miss, nothing more."""
        return False

    # -- the scheduler's process: lookups and loads --------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Keeps the cache manager, whose blocks are held while they are copied."""
        self._kv_cache_manager = kv_cache_manager
        self._scheduler.manager(kv_cache_manager)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[Rank, Any]) -> None:
        """All workers have told where their bytes lie."""
        self._scheduler.layouts(metadata)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond the engine's own that the pool can give; loaded while other requests go on. None: ask again."""
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Blocks were allocated; a load of ``num_external_tokens`` tokens is now owed to the request."""
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The step's jobs."""
        return self._scheduler.build(scheduler_output.num_scheduled_tokens)

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers have to say."""
        self._scheduler.output(connector_output)

    def on_new_request(self, request: Any) -> None:
        """A request was added."""
        self._scheduler.new_request()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request is over. Its blocks may go at once: those that are being copied are held."""
        self._scheduler.finished(request)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """As :meth:`request_finished`."""
        return self.request_finished(request, [])

    def reset_cache(self) -> bool | None:
        """This engine's namespace becomes another; other engines keep what is in the pool."""
        self._scheduler.reset()
        return True

    # -- the scheduler's process: compat.EngineReactions ---------------------------------------------------------------

    def on_cache_reset(self, reset: compat.CacheReset | None) -> None:
        """The engine is about to empty its own prefix cache, by a call that it got; None: that is over."""
        self._scheduler.on_cache_reset(reset)

    def on_weights(self, why: str, seen: int | None) -> None:
        """The engine got a call that has changed weights, or may have."""
        self._scheduler.on_weights(why, seen)

    def on_weights_begin(self, why: str, seen: int | None, reload: Arguments | None) -> None:
        """The engine got a call that changes weights."""
        self._scheduler.on_weights_begin(why, seen, reload)

    def on_weights_over(self, seen: int | None, whole: bool) -> None:
        """The call that changes weights is over."""
        self._scheduler.on_weights_over(seen, whole)

    def on_pause(self, emptying: bool) -> None:
        """The engine begins, or ends, to empty its caches for a pause or a sleep."""
        self._scheduler.on_pause(emptying)

    def on_resumption(self) -> None:
        """The engine is about to go on after a pause or a sleep."""
        self._scheduler.on_resumption()

    def before_weights(self, look: LookAtWeights) -> None:
        """From now on weights may become others."""
        self._scheduler.before_weights(look)

    def after_weights(self, look: LookAtWeights) -> None:
        """Weights may be what they were."""
        self._scheduler.after_weights(look)

    # -- the worker's process ------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Joins the engine's session and works out where the bytes of a block lie."""
        self._worker.register(kv_caches, compat.is_only_connector(self))

    def get_handshake_metadata(self) -> RankLayout | None:
        """Where this worker's bytes lie, for the scheduler's side."""
        return self._worker.layout

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins, and its loads with it."""
        super().bind_connector_metadata(connector_metadata)
        self._worker.step_begins(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads began when the step's metadata came."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No forward pass uses blocks that are being loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole blocks are stored after the step."""

    def wait_for_save(self) -> None:
        """The step's blocks are written, or the device has been told to: their stores begin. Does not wait."""
        self._worker.step_written(self._connector_metadata)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Loads that ended. One that failed is also reported as failed, and its tokens are computed."""
        return self._worker.results(self._connector_metadata, finished_req_ids)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of single-group models that do not hold what they should."""
        return self._worker.take_invalid()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What the scheduler's side has to know."""
        return self._worker.report(self._connector_metadata)

    # -- the worker's process: what compat asks and says ---------------------------------------------------------------

    def quiesce(self, newest_load: int, newest_store: int) -> bool:
        """Copies that have not begun are given up, and the others waited for, within a bound; whether all is quiet."""
        return self._worker.quiesce(newest_load, newest_store)

    def weight_changes_seen(self) -> int:
        """How many changes of weights there were in this worker."""
        return self._worker.weight_changes_seen

    def adapters_report(self) -> WorkerReport | None:
        """What the scheduler's side does not know yet of this worker's adapters."""
        return self._worker.adapters_report()

    def weight_losses_seen(self) -> int:
        """How often weights were thrown away in this worker, to be loaded anew."""
        return self._worker.weight_losses_seen

    def on_worker_weights(self, why: str, loses: bool) -> None:
        """Weights are about to change in this worker, or have just changed."""
        self._worker.on_weights(why, loses)

    # -- figures, end --------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KvplugStats | None:
        """Counts since the last call; only the scheduler's side has any, workers send theirs there."""
        if self.role != KVConnectorRole.SCHEDULER:
            return None
        counts = self._scheduler.take_counts()
        return KvplugStats(data=dict(counts)) if counts else None

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
        compat.forget(self, self.on_worker_weights)
        compat_adapters.forget_adapters(self, self._worker.on_adapter_copied)
        self._worker.close()
        self._scheduler.close()


def _close(connector: weakref.ref[KvplugConnector]) -> None:
    """Ends the copy threads before the interpreter's memory goes."""
    living = connector()
    if living is not None:
        living.shutdown()
