"""The connector in the scheduler's process: around the scheduler's side, which begins when the workers have told where
their bytes lie, and may begin anew.

Each call goes on to that side behind the shield. What the engine was promised is kept apart from it
(:mod:`kvplug.adapters.vllm.promises`), so that a request goes on whatever became of the side.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from kvplug.adapters.vllm import compat
from kvplug.adapters.vllm.jobs import Job, Rank, RankLayout, StepMetadata, WorkerReport
from kvplug.adapters.vllm.promises import PromisedLoads
from kvplug.adapters.vllm.shield import Shield

if TYPE_CHECKING:
    from kvplug.adapters.vllm.boot import SchedulerStart
    from kvplug.adapters.vllm.fingerprint import LookAtWeights
    from kvplug.adapters.vllm.reloads import Arguments
    from kvplug.adapters.vllm.scheduler import SchedulerSide

logger = init_logger("vllm.kvplug")


class SchedulerHalf:
    """One engine's. In a worker's process there is one too, which is never begun and answers that there is nothing."""

    def __init__(self, kv_cache_config: Any) -> None:
        self.side: SchedulerSide | None = None
        """None before the workers have told their layouts, where kvplug can't work, and after the end."""
        self.shield = Shield(logger, self._switch_off)
        self._kv_cache_config = kv_cache_config
        self._promised = PromisedLoads()
        self._start: SchedulerStart | None = None
        self._manager: Any = None
        self._layouts: dict[Rank, Any] = {}
        self._reset: compat.CacheReset | None = None
        self._pausing = False

    def _switch_off(self) -> None:
        if self.side is not None:
            self.side.switch_off()

    # -- begin and end -------------------------------------------------------------------------------------------------

    def begin(self, vllm_config: Any) -> None:
        """Identifying the weights begins."""
        if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
            logger.warning("kvplug: a load that fails is computed again; kv_load_failure_policy is set to recompute")
            vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
        self._start = self.shield("start", _scheduler_start, None, vllm_config)

    def manager(self, manager: Any) -> None:
        """Keeps the cache manager, whose blocks are held while they are copied."""
        self._manager = manager
        self.shield("start", compat.before_cache_reset, None, manager, self._before_cache_reset)

    def layouts(self, layouts: dict[Rank, Any]) -> None:
        """All workers have told where their bytes lie: the engine begins to use kvplug, or says why it does not."""
        if not all(isinstance(layout, RankLayout) for layout in layouts.values()):
            return  # it is another connector's, beside which kvplug does not work
        if self._layouts == layouts or self._start is None:  # the engine may tell the same again
            return
        before, self._layouts = self.side, dict(layouts)
        if before is not None:
            if before.loading:
                logger.warning("kvplug: OFF: the workers' layouts changed while blocks were being loaded")
                before.switch_off()
                return
            self.shield("other layouts", before.close, None)
        self.side = self.shield("start", self._begin_side, None, self._start, before)

    def _begin_side(self, start: SchedulerStart, before: SchedulerSide | None) -> SchedulerSide | None:
        side = start.begin(self._kv_cache_config, self._layouts, logger.warning)
        if side is not None:
            side.state.block_pool = self._manager.block_pool if self._manager is not None else None
            side.state.manager = self._manager
            if before is not None:
                side.go_on_from(before)
        return side

    def close(self) -> None:
        """Leaves the pool."""
        side, self.side = self.side, None
        if side is not None:
            self.shield("the end", side.close, None)

    # -- requests ------------------------------------------------------------------------------------------------------

    def matched_tokens(self, request: Any, local: int) -> tuple[int | None, bool]:
        """How many tokens the pool can give (None: ask again), and whether they are loaded while others go on."""
        side = self.side
        if side is None or side.off or self._promised.is_given_up(request.request_id):
            return 0, False
        count = self.shield("a lookup", side.matched_tokens, 0, request, local)
        return count, bool(count)

    def allocated(self, request: Any, blocks: Any, num_tokens: int) -> None:
        """Blocks were allocated; ``num_tokens`` tokens of them are to be loaded, which the request now waits for."""
        side = self.side
        if side is None:
            return
        if num_tokens > 0:
            self._promised.promise(request.request_id)
        elif side.off:
            return
        self.shield("an allocation", side.allocated, None, request, blocks.blocks, num_tokens)

    def new_request(self) -> None:
        """A request was added."""
        if self.side is not None:
            self.shield("a new request", self.side.new_request, None)

    def finished(self, request: Any) -> None:
        """A request is over."""
        if self.side is not None:
            self.shield("a request's end", self.side.finished, None, request)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def build(self, scheduled: dict[str, int]) -> StepMetadata:
        """The step's jobs, among them the load of every request that was promised one since the last step."""
        side = self.side
        meta = StepMetadata(step=0, engine=side.engine if side is not None else "", runs_model=bool(scheduled))
        if side is not None:
            meta = self.shield("a step", side.build, meta, {} if side.off else scheduled)
        lost = self._promised.sent(job.request_id for job in meta.loads)
        if lost:  # by an error
            if side is not None:
                side.loads.queued.clear()  # what is left there would come a second time
            meta = replace(meta, loads=meta.loads + tuple(self._lost_job(request_id) for request_id in lost))
        return meta

    def _lost_job(self, request_id: str) -> Job:
        for pending in self.side.state.pending.values() if self.side is not None else ():
            if pending.job.request_id == request_id:
                return replace(pending.job, hopeless=True)
        return Job(0, -1, (), request_id, hopeless=True)

    def output(self, connector_output: Any) -> None:
        """What the workers have to say. Ends of loads that the engine must not hear of are taken out of it."""
        ended = connector_output.finished_recving
        if ended and (self.side is not None or self._promised):
            wanted, strange = self._promised.heard(ended)
            if wanted != ended:
                connector_output.finished_recving = wanted
                self.shield.counts["hook_errors"] += strange
        if self.side is None:
            return
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self.shield("a report", self.side.reported, None, report)

    def take_counts(self) -> Counter[str]:
        """kvplug's counters since the last call."""
        side = self.side
        if side is not None and side.fetches is not None:
            self.shield("a report", side.fetches.gather_counts, None)
        counts = self.shield.take_counts()
        if side is not None:
            counts.update(side.state.counts)
            side.state.counts.clear()
        return counts

    # -- what the engine is told to do ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """This engine's namespace becomes another; other engines keep what is in the pool."""
        if self.side is not None:
            self.shield("a cache reset", self.side.reset, None, self._pausing)

    def on_pause(self, emptying: bool) -> None:
        """As in :class:`compat.EngineReactions`."""
        self._pausing = emptying

    def on_cache_reset(self, reset: compat.CacheReset | None) -> None:
        """As in :class:`compat.EngineReactions`."""
        self._reset = reset

    def _before_cache_reset(self) -> None:
        self.shield("a cache reset", self._make_way, None)

    def _make_way(self) -> None:
        """Whatever would not be there without kvplug keeps the engine from emptying its prefix cache no longer."""
        reset, side = self._reset, self.side
        if reset is not None and reset.hopeless:
            return  # the engine says that it could not; until it can, loads and stores go on
        if side is not None:
            side.before_reset()
        if reset is None:
            return
        if reset.loads(self._promised.awaited) or (side is not None and side.stores.held):
            newest = (side.loads.newest, side.stores.newest) if side is not None else (0, 0)
            if not reset.quiesce(*newest):
                logger.warning("kvplug: copies do not end; the engine's prefix cache can't be emptied yet")
                return
            reset.give_up_loads(self._promised.awaited)
            self._promised.give_up()
            if side is not None:
                side.quiesced()
        reset.free_deferred()

    def on_weights(self, why: str, seen: int | None) -> None:
        """As in :class:`compat.EngineReactions`."""
        if self.side is not None:
            self.shield("a change of weights", self.side.weights_changed, None, why, seen)

    def on_weights_begin(self, why: str, seen: int | None, reload: Arguments | None) -> None:
        """As in :class:`compat.EngineReactions`."""
        if self.side is not None:
            self.shield("a change of weights", self.side.weights_begin, None, why, seen, reload)

    def on_weights_over(self, seen: int | None, whole: bool) -> None:
        """As in :class:`compat.EngineReactions`."""
        if self.side is not None:
            self.shield("a change of weights", self.side.weights_over, None, seen, whole)

    def on_resumption(self) -> None:
        """As in :class:`compat.EngineReactions`."""
        if self.side is not None:
            self.shield("a resumption", self.side.resumed, None)

    def before_weights(self, look: LookAtWeights) -> None:
        """As in :class:`compat.EngineReactions`."""
        if self.side is not None:
            self.shield("a look at the weights", self.side.weights_before, None, look)

    def after_weights(self, look: LookAtWeights) -> None:
        """As in :class:`compat.EngineReactions`."""
        if self.side is not None:
            self.shield("a look at the weights", self.side.weights_after, None, look)

    def adapters_loaded(self, reports: list[WorkerReport | None]) -> None:
        """What the workers say of their adapters after the engine has loaded one ahead."""
        for report in reports:
            if report is not None and self.side is not None:
                self.shield("an adapter's load", self.side.adapters_reported, None, report)


def _scheduler_start(vllm_config: Any) -> SchedulerStart:
    from kvplug.adapters.vllm.boot import SchedulerStart

    return SchedulerStart(vllm_config)
