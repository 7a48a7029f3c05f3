"""The scheduler's side of the connector: decides, in batches, what is looked up, pinned, loaded and stored.

It never touches a block's bytes and never waits: a pool that does not answer in time is a miss, or "not stored".
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvplug.adapters.common.reloads import Reloads
from kvplug.adapters.vllm import compat, compat_adapters, compat_requests, namespace
from kvplug.adapters.vllm.environment import VARIABLES
from kvplug.adapters.vllm.fetches import Fetches
from kvplug.adapters.vllm.fingerprint import LookAtWeights, Seen, see
from kvplug.adapters.vllm.jobs import Job, Rank, RankLayout, StepMetadata, WorkerReport
from kvplug.adapters.vllm.loads import Loads
from kvplug.adapters.vllm.reloads import Arguments, folder_of
from kvplug.adapters.vllm.requests import LoraIdentities, NotYetKnownError, Record, open_chain
from kvplug.adapters.vllm.state import EngineState, Pending, part_sizes
from kvplug.adapters.vllm.stores import Stores
from kvplug.config import Config
from kvplug.errors import ConfigError, KeyFormatError, KvplugError, NamespaceError, UnsupportedEngineError
from kvplug.identity.keys import block_keys
from kvplug.identity.namespace import Namespace
from kvplug.identity.weights import AdapterProbe, WeightsProbe
from kvplug.sizes import format_size
from kvplug.store import KvStore

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

WEIGHTS_WAIT_S = 1.0
"""How long the start of an engine waits for the identity of its weights; small models are known by then."""
ADAPTER_WAIT_S = 0.05
"""How long an adapter's first request waits for its identity; small ones are known by then."""
MAX_REASONS_SAID = 20
MAX_PATHS = 256
"""Paths of adapters whose contents are remembered."""
NEVER = 1 << 62
"""Tokens: a request that is not cached has no next block to store."""


class SchedulerSide:
    """One engine's scheduler, made when the workers have told where their bytes lie; KvplugError if it can't be."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        config: Config,
        probe: WeightsProbe,
        layouts: dict[Rank, RankLayout],
        say: Callable[[str], None],
        loading_since_ns: int | None = None,
    ) -> None:
        """``loading_since_ns``: wall clock, in ns, before the engine began to load its weights, if that is known."""
        parallel = vllm_config.parallel_config
        tokens = {layout.token for layout in layouts.values()}
        refusals = [f"rank {rank}: {layout.refusal}" for rank, layout in sorted(layouts.items()) if layout.refusal]
        if refusals or len(tokens) != 1 or None in tokens:
            raise UnsupportedEngineError("; ".join(refusals) or "the workers did not join one session")
        if len(layouts) != parallel.tensor_parallel_size * parallel.pipeline_parallel_size:
            raise UnsupportedEngineError(f"{len(layouts)} of {parallel.world_size} workers have told their layout")
        self.off = False
        """Set once an error was caught: nothing more is offered or stored."""
        self._vllm_config = vllm_config
        self._layouts = layouts
        self._kv_layout = kv_cache_config.kv_cache_layout
        self._config = config
        self._environment = VARIABLES.deciding(os.environ)
        role = vllm_config.kv_transfer_config
        self._reads, self._writes = role.is_kv_consumer, role.is_kv_producer
        self._mm_by_content = compat_requests.mm_named_by_content(vllm_config)
        self._probe: WeightsProbe | None = probe
        self._reloads = Reloads(namespace.reloaded_from(vllm_config), loading_since_ns)
        self._weights_seen: Seen | None = None
        self._say = say
        rules = compat.group_rules(kv_cache_config)
        plan = namespace.plan_parts(rules, layouts)
        token = tokens.pop()
        assert token is not None
        store = KvStore.join(token, config=config)
        try:
            placed = namespace.place_parts(plan, store.part_offsets)
            for sizes in map(part_sizes, placed):  # refuses what no slot can hold
                store.check_fits(sizes)
            self.state = EngineState(store, config, rules, placed, len(layouts))
        except BaseException:
            store.close()
            raise
        self.state.on_namespace = self._announce
        self.loads = Loads(self.state, takes_back=not compat.steps_overlap(vllm_config))
        self.stores = Stores(self.state)
        self.fetches = self._fetches(store)
        self._adapters: dict[str, AdapterProbe] = {}
        self._lora = LoraIdentities(
            self._adapter_identity,
            ranks=layouts,
            by_name_alone=compat_adapters.adapters_by_name_alone(),
            settings=namespace.adapter_settings(vllm_config),
        )
        self.loads.adapters = self.stores.adapters = self._lora
        self._cache: object = None
        self._refusals: set[str] = set()
        self._step = 0
        self.engine = token
        """The session that this engine's workers share."""
        self._weights_known(WEIGHTS_WAIT_S)
        if self._probe is not None:
            self._say(
                f"kvplug: ON, pool {store.pool_name}; the weights are being identified, nothing is cached until then"
            )

    def _fetches(self, store: KvStore) -> Fetches | None:
        """What asks other hosts; None where the settings name none."""
        if not self._config.asks_other_hosts:
            return None
        from kvplug.remote.fetcher import Fetcher  # with all that engines of one host have no use for

        try:
            return Fetches(self.state, self.loads, Fetcher(store, self._config))
        except ConfigError as error:
            self._say(f"kvplug: nothing is read from other hosts: {error}")
            return None

    # -- identity ----------------------------------------------------------------------------------------------------

    def _weights_known(self, wait_s: float = 0.0) -> None:
        if self._probe is None:
            return
        try:
            identity = self._probe.result(wait_s)
            if identity is None:
                return
            self._probe = None
            found = namespace.build(
                self._vllm_config, self.state.rules, self._layouts, self._kv_layout, identity, self._environment
            )
        except NamespaceError as error:
            self._probe = None
            self._say(f"kvplug: OFF, nothing is cached: {error}")
            return
        self.state.identified(found)

    def _announce(self, found: Namespace) -> None:
        stats = self.state.store.stats()
        size = getattr(stats, "size_bytes", None) or self.state.store.mapping.nbytes
        block = sum(sum(sizes) for sizes in self.state.part_nbytes)
        self._say(
            f"kvplug: ON, pool {self.state.store.pool_name} of {format_size(int(size))}, namespace {found.describe()}, "
            f"{format_size(block)} for {self.state.span} tokens{self._role()}{_alone(found, self._reloads.possible)}"
        )

    def _role(self) -> str:
        if not self._reads:
            return "; kv_role is kv_producer: blocks are stored and none is read"
        return "" if self._writes else "; kv_role is kv_consumer: blocks are read and none is stored"

    def _adapter_identity(self, path: str) -> bytes | None:
        """The content of the adapter that lies at a path now; None while it is being read, or was written just now."""
        probe, wait_s = self._adapters.get(path), 0.0
        if probe is None:
            while len(self._adapters) >= MAX_PATHS:
                self._adapters.pop(next(iter(self._adapters))).stop()
            probe, wait_s = self._adapters.setdefault(path, AdapterProbe(path)), ADAPTER_WAIT_S
        try:
            files = probe.result(wait_s)
        except NamespaceError:
            del self._adapters[path]  # the next request looks again: a disk may have been away for a moment
            raise
        if files is None:
            return None
        if not files.unchanged() or (not files.settled and time.time_ns() > files.settles_ns):
            del self._adapters[path]  # the next request reads what lies there now
            return None
        return files.identity.digest if files.settled else None

    def adapters_reported(self, report: WorkerReport) -> None:
        """What workers have read. Requests that run with an adapter which is another now are not cached any more."""
        changed = self._lora.reported(report)
        for record in self.state.records.values():
            lora = record.request.lora_request
            if lora is None or record.refused:
                continue
            mistaken = record.adapter is not None and not self._lora.agrees(record.adapter, report)
            if mistaken or (record.adapter is None and int(lora.lora_int_id) in changed):
                self._refuse(
                    record, NamespaceError(f"LoRA adapter {lora.lora_name}: it became another while a request used it")
                )

    def _look_at_cache(self) -> None:
        """Notes whether the engine has emptied its own prefix cache."""
        cache = compat.cache_identity(self.state.block_pool)
        if cache is not self._cache:
            self._cache = cache
            living = (record.request.lora_request for record in self.state.records.values())
            self._lora.cache_emptied(lora for lora in living if lora is not None)

    def weights_changed(self, why: str, seen: int | None = None) -> None:
        """Weights may have changed in the living engine; ``seen`` by the workers so often in all ("": if that says
        so).
        """
        if not why and self._heard(seen):
            return
        if why:  # else it was a sleep, as far as is known
            self._weights_seen = None
        self._reloads.changed()
        if why != compat.NEW_VERSION:
            self._reloads.give_up()
        self._leave(seen)
        self.state.go_on_if_empty()
        self._say_changed(why)

    def weights_begin(self, why: str, seen: int | None, reload: Arguments | None) -> None:
        """A call that changes weights is about to be made; ``reload``: what ``reload_weights`` is called with."""
        self._weights_seen = None
        if reload is None or not self._heard(seen):
            self._reloads.give_up()
        else:
            self._reloads.begins(folder_of(*reload, self._reloads.source))
        self._leave(seen)
        self._say_changed(why)

    def weights_over(self, seen: int | None, whole: bool) -> None:
        """The call is over; ``whole``: as is known, in every worker, and nothing else has changed weights beside it."""
        try:
            self._reloads.ended(whole)
        except NamespaceError as error:
            self._not_known(error)
        self._leave(seen)
        self.state.go_on_if_empty()

    def weights_before(self, look: LookAtWeights) -> None:
        """A pause or a sleep begins, in which weights may become others unseen: they are read while they are known."""
        if self._weights_seen is None and self.state.weights_known and not self._useless():
            self._weights_seen = see(look, self.state.worker_changes)

    def weights_after(self, look: LookAtWeights) -> None:
        """The pause or the sleep ends. If every byte is what it was, and no call has changed weights meanwhile, the
        engine goes on as before; if one is not, they are others, whatever the engine has been told.
        """
        seen = self._weights_seen
        if seen is None or self._useless():
            return
        same = seen.again(look)
        if not same:
            self._weights_seen = None
        if same and not self.state.weights_known:
            self._reloads.same_again()
            self.state.same_again()
        elif same is False and self.state.weights_known:
            self.weights_changed("in a pause")

    def _useless(self) -> bool:
        """Whether nothing is cached, or what other engines compute decides what is: experts of several."""
        parallel, model = self._vllm_config.parallel_config, self._vllm_config.model_config
        alone = parallel.data_parallel_size == 1 or not getattr(model, "is_moe", True)
        return self.off or not alone or (self._probe is None and self.state.namespace is None)

    def resumed(self) -> None:
        """The engine is about to go on after a pause or a sleep."""
        self.state.resumed()

    def _heard(self, seen: int | None) -> bool:
        """Whether all changes that workers have seen are known here."""
        return seen is not None and seen <= self.state.worker_changes

    def _leave(self, seen: int | None) -> None:
        self.state.weights_changed()
        self.state.worker_changes = max(self.state.worker_changes, seen or 0)
        for record in self.state.records.values():
            self._let_go(record)

    def _say_changed(self, why: str) -> None:
        if why:
            self.state.counts["weight_changes"] += 1
            self._say(f"kvplug: weights changed ({why}); nothing is cached until the engine's prefix cache is reset")

    def _known_again(self) -> None:
        """Looks whether the weights that were read from files again are identified."""
        try:
            identity = self._reloads.result()
        except NamespaceError as error:
            self._not_known(error)
            return
        if identity is not None:
            self.state.known_again(identity)

    def _not_known(self, error: NamespaceError) -> None:
        self._say(f"kvplug: this engine shares with no other: the weights that were read again are not known: {error}")

    # -- requests ----------------------------------------------------------------------------------------------------

    def matched_tokens(self, request: Request, local: int) -> int | None:
        """Tokens beyond the engine's own that the pool can give; pinned. None: ask again, more may be on its way."""
        record = self._record(request)
        if request.lora_request is not None and not self._adapter_stands(record):
            return 0
        if not self._reads or record.chain is None or record.load_failed or request.skip_reading_prefix_cache:
            return 0
        if record.loads > request.num_preemptions:  # it was admitted with a load, and is here again: that load failed
            return 0
        try:
            return (self.fetches or self.loads).lookup(record, local)
        except KeyFormatError as error:
            self._refuse(record, error)
            return 0

    def _adapter_stands(self, record: Record) -> bool:
        """Whether the adapter still is what the request's chain takes it for, and the pool may be asked for it."""
        if record.chain is None:
            return False
        assert record.adapter is not None
        try:
            adapter = self._lora.find(record.request.lora_request)
        except NamespaceError as error:
            self._refuse(record, error)
            return False
        if adapter is None or (not adapter.held and not self.loads.forecasts):
            self._let_go(record)
            return False
        if adapter.content != record.adapter.content:
            self._let_go(record)
            record.chain, record.stored = None, [0] * len(self.state.rules)
            self._open(record, self.state.current_root())
        else:
            record.adapter = adapter
        return record.chain is not None

    def _record(self, request: Request) -> Record:
        """The request's record; opened anew when the namespace was changed while the request had nothing computed."""
        state = self.state
        record = state.records.get(request.request_id)
        if record is None:
            self._known_again()
        root = state.current_root()
        if record is None or (record.epoch != state.epoch and request.num_computed_tokens == 0):
            if record is not None:
                self._let_go(record)
            tokens = request._all_token_ids
            record = Record(request, None, tokens, state.step_tokens, state.epoch, stored=[0] * len(state.rules))
            state.records[request.request_id] = record
            if request.lora_request is not None:
                self._look_at_cache()
                self._lora.used(request.lora_request)
        if record.chain is None and not record.refused and record.epoch == state.epoch:
            self._open(record, root)
        return record

    def _open(self, record: Record, root: bytes | None) -> None:
        if root is None:
            self._weights_known()
            root = self.state.root
            if root is None:
                return
        try:
            record.chain = open_chain(
                record.request,
                root,
                self.state.step_tokens,
                lora_identity=lambda lora: self._adapter_digest(record, lora),
                trust_mm_ids=self._config.trust_mm_ids,
                mm_by_content=self._mm_by_content,
            )
            record.next_at = min(rule.span for rule in self.state.rules)
        except NotYetKnownError as error:
            self._say_once(f"kvplug: a request reads nothing from the pool: {error}")
        except NamespaceError as error:
            self._refuse(record, error)

    def _adapter_digest(self, record: Record, lora: Any) -> bytes | None:
        record.adapter = self._lora.find(lora)
        return None if record.adapter is None else self._lora.digest(lora, record.adapter)

    def _refuse(self, record: Record, error: KvplugError) -> None:
        """This request is not cached; each reason is said once."""
        self._let_go(record)
        record.chain, record.refused, record.next_at = None, True, NEVER
        self.state.counts["requests_refused"] += 1
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyFormatError) else str(error)
        self._say_once(f"kvplug: a request is not cached: {reason}")

    def _say_once(self, line: str) -> None:
        if line not in self._refusals and len(self._refusals) < MAX_REASONS_SAID:
            self._refusals.add(line)
            self._say(line)

    def _let_go(self, record: Record) -> None:
        """The request uses neither what it was offered nor what is being fetched for it."""
        record.drop_fetch()
        self.loads.give_back(record)

    def allocated(self, request: Request, blocks: tuple[Any, ...], num_tokens: int) -> None:
        """The engine has given the request its blocks, ``num_tokens`` of them to be loaded."""
        record = self._record(request)
        if num_tokens > 0:
            self.loads.take_up(record, blocks, num_tokens)
        elif record.offer is not None:
            self.loads.give_back(record)

    def finished(self, request: Request) -> None:
        """The request is over; a load that was issued goes on until every rank has reported it."""
        record = self.state.records.pop(request.request_id, None)
        if record is None:
            return
        self._let_go(record)
        if record.chain is None or record.epoch != self.state.epoch:
            return
        missed = self.stores.without_room(record)
        if missed:
            self.state.counts["not_stored:no_room"] += missed
        for group, rule in enumerate(self.state.rules):
            if record.stored[group]:
                steps = record.chain.step_keys[: record.stored[group] * rule.span // self.state.step_tokens]
                self.state.store.touch(block_keys(steps, rule.span // self.state.step_tokens, group))

    # -- steps -------------------------------------------------------------------------------------------------------

    def build(self, scheduled: dict[str, int]) -> StepMetadata:
        """The jobs of a step, given how many tokens it computes of each request."""
        state = self.state
        self._step += 1
        if self.loads.offered:
            self.loads.sweep(time.monotonic())
        due = []
        records = state.records
        for request_id, count in scheduled.items():
            record = records.get(request_id)
            if record is None:
                continue
            computed = record.request.num_computed_tokens + count
            if self._writes and computed >= record.next_at and self._storable(record):
                try:
                    record.step_keys(min(computed, len(record.tokens)))
                except KeyFormatError as error:
                    self._refuse(record, error)
                    continue
                due.append((record, computed))
        job = self.stores.plan(due) if due else None
        loads, self.loads.queued = tuple(self.loads.queued), []
        stores: tuple[Job, ...] = (job,) if job is not None else ()
        timed = waits = False
        if self.fetches is not None:
            timed = self.fetches.speed.began(self._step, scheduled.values())
            waits, self.fetches.waiting = self.fetches.waiting > 0, 0
        return StepMetadata(
            step=self._step,
            engine=self.engine,
            runs_model=bool(scheduled),
            timed=timed,
            waits=waits,
            plan=state.plan if loads or stores else None,
            loads=loads,
            stores=stores,
        )

    def _storable(self, record: Record) -> bool:
        state = self.state
        if record.refused or record.epoch != state.epoch:
            return False
        if record.chain is None and (self._probe is not None or record.request.lora_request is not None):
            self._open(record, state.current_root())
        if record.adapter is not None and not self._lora.confirmed(record.adapter):
            return False
        return record.chain is not None and state.root is not None

    def reported(self, report: WorkerReport) -> None:
        """What the workers have to say after a step. Whatever goes wrong with some of it, jobs that ended end here."""
        with contextlib.ExitStack() as ends:
            for pending in self._ended(report):
                ends.callback(self._end, pending)
            self._noted(report)

    def _ended(self, report: WorkerReport) -> list[Pending]:
        """The jobs that every rank is through with now."""
        pending = self.state.pending
        for job_id in report.failed:
            if job_id in pending:
                pending[job_id].failed = True
        for job_id, group, block in report.bad:
            if job_id in pending:
                pending[job_id].bad.add((group, block))
        ended = []
        for job_id, ranks in report.done.items():
            if job_id in pending:
                pending[job_id].ranks_left -= ranks
                if pending[job_id].ranks_left <= 0:
                    ended.append(pending.pop(job_id))
        return ended

    def _end(self, pending: Pending) -> None:
        self.loads.unpin(pending)
        try:
            (self.loads if pending.job.request_id is not None else self.stores).finished(pending)
        finally:
            self.stores.let_go(pending)

    def _noted(self, report: WorkerReport) -> None:
        state = self.state
        state.counts.update(report.counts)
        if report.adapters or report.held:
            self.adapters_reported(report)
        if report.ran and self.fetches is not None:
            self.fetches.speed.ended(report.ran)
        if report.changed > state.worker_changes:
            state.worker_changes = report.changed
            self.weights_changed("in the workers")

    def new_request(self) -> None:
        """A request was added: a moment at which an engine that was idle gets its held blocks back."""
        if self.stores.held:
            self.stores.poll()

    def before_reset(self) -> None:
        """The engine is about to empty its prefix cache, which it can't while blocks are held."""
        for record in self.state.records.values():
            self.loads.give_back(record)
        if self.stores.held:
            self.stores.poll()
        if self.stores.held:
            self.stores.cancel_all()

    @property
    def loading(self) -> bool:
        """Whether workers read from slots that are pinned for them."""
        return any(pending.job.request_id is not None for pending in self.state.pending.values())

    def quiesced(self) -> None:
        """No worker copies any more, and nobody waits for a load: nothing is held or pinned for them any longer."""
        pending = self.state.pending
        for job_id in [job_id for job_id, one in pending.items() if one.job.request_id is not None]:
            self.loads.unpin(pending.pop(job_id))
        self.stores.let_all_go()

    def go_on_from(self, before: SchedulerSide) -> None:
        """Takes the place of a side that was closed: jobs and steps are counted on, so that workers take what comes
        for new. Where that side had left the shared namespace, this one uses none before the engine's own cache was
        emptied, and a private one then.
        """
        self._step, self._reloads = before._step, before._reloads
        self.state.go_on_from(before.state)

    def reset(self, paused: bool) -> None:
        """The engine's caches are emptied, and nothing that was cached so far is to be used again: it pauses, or its
        user has said so.
        """
        for record in self.state.records.values():
            self._let_go(record)
        if paused:
            self._reloads.changed()
            self.state.paused()
        else:
            self.state.rotate()

    def switch_off(self) -> None:
        """From now on nothing is offered or stored; what the workers report is still taken in."""
        if self.off:
            return
        self.off = True
        self.state.root = None
        for record in self.state.records.values():
            try:
                self._let_go(record)
            except Exception:  # noqa: BLE001 - this is what an error has led to; the pool takes the pin back with the session
                self.state.counts["hook_errors"] += 1

    def close(self) -> None:
        """Lets go of everything."""
        for record in list(self.state.records.values()):
            self._let_go(record)
        if self.fetches is not None:
            self.fetches.close()
        if self._probe is not None:
            self._probe.stop()
        self._reloads.changed()
        for probe in self._adapters.values():
            probe.stop()
        self.stores.cancel_all()
        self.quiesced()
        try:
            self.state.store.close()
        except KvplugError as error:
            self._say(f"kvplug: closing the pool failed: {error}")


def _alone(found: Namespace, known_by_reload: bool) -> str:
    """What a user has to know of a namespace that no other engine has."""
    if found.rotation is not None:
        return "; this engine shares with no other until it is started again: its cache was reset"
    if found.weights_epoch is None:
        return ""
    if known_by_reload:
        return (
            "; this engine shares with no other: its weights may have changed. It shares again once reload_weights has "
            "read them from a folder, or it is started again"
        )
    return "; this engine shares with no other until it is started again: its weights were changed"
