"""Everything that touches vLLM's insides, in one file, checked when it is loaded.

kvplug's connector uses vLLM's connector interface, which is public but moves with every release, and a few things that
are not public: the block pool (to hold blocks), requests (to name their contents), the configuration's
``__post_init__`` (to switch itself on), and the methods that change weights. :func:`problems` compares each of them
with what kvplug was written against, so that a changed engine is refused with one line instead of failing later.
"""

from __future__ import annotations

import functools
import inspect
import os
import platform
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kvplug.adapters.common.hooks import put_around
from kvplug.adapters.vllm.compat_requests import processing
from kvplug.adapters.vllm.fingerprint import Look, LookAtWeights, model_of, sleeping, weights_fingerprint, weights_look
from kvplug.adapters.vllm.groups import GroupRule
from kvplug.adapters.vllm.reloads import Arguments
from kvplug.engines import SUPPORTED
from kvplug.errors import UnsupportedEngineError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheConfig

CONNECTOR_NAME = "KvplugConnector"
CONNECTOR_MODULE = "kvplug.adapters.vllm.connector"

_HARMLESS_RPCS = frozenset({
    "add_lora", "check_health", "compute_weight_checksums", "determine_available_memory", "execute_dummy_batch",
    "execute_model", "get_cache_block_size_bytes", "get_kv_cache_spec", "get_kv_connector_handshake_metadata",
    "get_model_inspection", "get_supported_tasks", "init_weight_transfer_engine", "list_loras", "pin_lora", "profile",
    "remove_lora", "reset_encoder_cache", "reset_mm_cache", "sample_tokens", "save_sharded_state",
    "save_tensorized_model", "shutdown_weight_transfer_engine", "start_profile", "stop_profile",
    "supports_draft_weight_updates", "synchronize_device", "take_draft_token_ids", "update_max_model_len",
})  # fmt: skip
"""Worker calls that leave the weights alone."""
_CHANGING_RPCS = frozenset({
    "finish_weight_update", "load_model", "reload_weights", "reset_weights", "sleep", "start_draft_weight_update",
    "start_weight_update", "update_config", "update_weights", "wake_up",
})  # fmt: skip
"""Worker calls that change weights. After any other, weights are compared with what they were before it."""

NEW_VERSION = "a new weight version"
_HISPARSE = "HiSparse keeps KV outside the device's cache"
_HOLDS_A_DRAFT = "cache group {} holds a draft model's state"
CHANGES_OF_A_CALL = 2
"""A worker counts one change before and one after each call that changes weights."""
_WORKER_WEIGHT_METHODS = (
    "reload_weights", "update_weights", "_start_weight_update", "finish_weight_update", "reset_weights", "load_model",
    "update_config", "sleep", "wake_up", "discard",
)  # fmt: skip
_REQUEST_FIELDS = (
    "_all_token_ids", "cache_salt", "lora_request", "mm_features", "num_computed_tokens", "num_prompt_tokens",
    "prompt_embeds", "request_id", "resumable", "skip_reading_prefix_cache",
)  # fmt: skip


def version() -> str:
    """The engine's version, as it says itself."""
    import vllm

    return str(vllm.__version__)


def version_supported(text: str) -> bool:
    """Whether kvplug was written for this version."""
    return text in SUPPORTED["vllm"]


def problems() -> list[str]:
    """What of the engine is not as kvplug expects it; empty if everything is there."""
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

    connector = getattr(base, "KVConnectorBase_V1", None)
    expected: list[tuple[Any, str, tuple[str, ...]]] = [
        (connector, "__init__", ("vllm_config", "role", "kv_cache_config")),
        (connector, "get_num_new_matched_tokens", ("request", "num_computed_tokens")),
        (connector, "update_state_after_alloc", ("request", "blocks", "num_external_tokens")),
        (connector, "build_connector_meta", ("scheduler_output",)),
        (connector, "update_connector_output", ("connector_output",)),
        (connector, "bind_kv_cache_manager", ("kv_cache_manager",)),
        (connector, "get_transfer_results", ("finished_req_ids",)),
        (connector, "set_xfer_handshake_metadata_pp_aware", ("metadata",)),
        (connector, "register_kv_caches", ("kv_caches",)),
        (getattr(base, "SupportsHMA", None), "request_finished_all_groups", ("request", "block_ids")),
        (BlockPool, "touch", ("blocks",)),
        (BlockPool, "free_blocks", ("ordered_blocks",)),
        (KVCacheManager, "get_blocks", ("request_id",)),
        (KVCacheManager, "free", ("request",)),
        (KVCacheManager, "reset_prefix_cache", ()),
        (EngineCore, "collective_rpc", ("method",)),
        (EngineCore, "reset_prefix_cache", ("reset_running_requests", "reset_connector")),
        (EngineCore, "set_weight_version", ()),
        (Scheduler, "_free_blocks", ("request",)),
        (
            kv_cache_utils,
            "generate_block_hash_extra_keys",
            ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
        ),
        (VllmConfig, "__post_init__", ()),
        (EngineCore, "_reset_caches", ()),
        (EngineCore, "resume_scheduler", ()),
        (EngineCore, "collective_rpc", ("method", "timeout", "args", "kwargs")),
        *processing(),
    ]
    found = []
    for owner, name, names in expected:
        function = getattr(owner, name, None)
        if function is None:
            found.append(f"{getattr(owner, '__name__', owner)}.{name} is gone")
            continue
        parameters = tuple(p for p in inspect.signature(function).parameters if p != "self")
        if parameters[: len(names)] != names:
            found.append(f"{getattr(owner, '__name__', owner)}.{name} takes {parameters}, not {names}")
    kept: list[tuple[Any, tuple[str, ...]]] = [
        (Request, _REQUEST_FIELDS),
        (BlockPool, ("blocks", "null_block", "num_gpu_blocks", "cached_block_hash_to_block")),
        (BlockHashToBlockMap, ("_cache",)),
        (Scheduler, ("deferred_frees", "failed_recving_kv_req_ids", "finished_recving_kv_req_ids", "running")),
    ]
    for owner, names in kept:
        fields = set(owner.__init__.__code__.co_names)
        found += [f"{owner.__name__}.{name} is gone" for name in names if name not in fields]
    if "failed_recving" not in getattr(getattr(base, "KVConnectorTransferResults", None), "__dataclass_fields__", {}):
        found.append("KVConnectorTransferResults.failed_recving is gone")
    return found


# -- switching on ------------------------------------------------------------------------------------------------


def after_config_init(react: Callable[[VllmConfig], None]) -> None:
    """Calls ``react`` with every VllmConfig once it is complete. A second call changes nothing."""
    from vllm.config import VllmConfig

    def around(original: Any) -> Any:
        @functools.wraps(original)
        def post_init(self: VllmConfig, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            react(self)

        return post_init

    put_around(VllmConfig, "__post_init__", around)


def transfer_config() -> Any:
    """The KVTransferConfig that names kvplug's connector; a load that fails is computed again, never an error."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector=CONNECTOR_NAME,
        kv_connector_module_path=CONNECTOR_MODULE,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
    )


def who_named_connector(config: Any) -> str:
    """The setting by which a user has asked for another KV connector, and which one that is."""
    name = config.kv_transfer_config.kv_connector
    if getattr(config.cache_config, "kv_offloading_size", None) is not None:
        return (
            f"--kv-offloading-size asks for vLLM's {name}, which is left alone; an engine has one KV connector, so "
            "leave that option out to use kvplug"
        )
    return f"--kv-transfer-config names {name}, which is left alone"


def register_connector() -> None:
    """Makes the connector's name known, so that a user's configuration needs no module path."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR_NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR_NAME, CONNECTOR_MODULE, CONNECTOR_NAME)


def config_problem(config: Any) -> str | None:
    """What in a complete configuration kvplug can't work with; None if nothing."""
    parallel = config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is not 1"
    if getattr(parallel, "enable_fault_tolerance", False) or getattr(parallel, "all2all_backend", "") == "nixl_ep":
        return (
            "--enable-fault-tolerance or --all2all-backend nixl_ep: a step in which a rank does not answer is computed "
            "without its experts, and its blocks are stored before that is known"
        )
    speculative = config.speculative_config
    if speculative is not None and str(speculative.method) not in ("ngram", "ngram_gpu", "suffix"):
        return f"speculative decoding by {speculative.method} keeps a draft model's state beside the model's own"
    if getattr(config.attention_config, "hisparse_config", None) is not None:
        return _HISPARSE
    if getattr(config, "diffusion_config", None) is not None:
        return "diffusion language models: a block's KV depends on more than the tokens up to its end"
    foreign = _dtype_of_a_plugin(config)
    if foreign is not None:
        return (
            f"--kv-cache-dtype {foreign} comes from a plugin, so that vLLM's release does not say what its bytes mean"
        )
    if returns_routed_experts(config):
        return (
            "--enable-return-routed-experts: answers list the experts of each prompt token, which vLLM keeps beside "
            "its own blocks, and blocks from the pool come without them"
        )
    if "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") and not getattr(
        config.model_config, "enable_cumem_allocator", False
    ):
        return "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True moves the cache's memory"
    return None


def _dtype_of_a_plugin(config: Any) -> str | None:
    """The cache's dtype where a platform's plugin has brought it, as one may from 0.33 on."""
    from vllm.config import cache

    handler_of = getattr(cache, "get_kv_cache_dtype_handler", None)
    name = str(config.cache_config.cache_dtype)
    return name if handler_of is not None and handler_of(name) is not None else None


def uses_modelscope() -> bool:
    """Whether the engine takes names of repositories for those of another hub."""
    from vllm import envs

    return bool(envs.VLLM_USE_MODELSCOPE)


def returns_routed_experts(config: Any) -> bool:
    """Whether answers bring along what each of the prompt's tokens went through, and not only what was generated."""
    outputs = getattr(config, "aux_output_config", None)  # 0.31 and later; the model's own setting before
    older = getattr(config.model_config, "enable_return_routed_experts", False)
    return bool(older or getattr(outputs, "enabled", False))


def steps_overlap(config: Any) -> bool:
    """Whether the engine plans a step before it has the results of the one before, as it does by default on devices.

    What it has computed of a request can't be thrown away then: the next step builds on it already, and the engine's
    own count of the request's tokens goes wrong.
    """
    return int(config.max_concurrent_batches) > 1


def reuse_problem(config: Any) -> str | None:
    """Why the engine does not reuse KV here, though kvplug could; None if it does, or if that is the user's wish."""
    from vllm.platforms import current_platform

    mla = bool(getattr(config.model_config, "use_mla", False))
    if mla and current_platform.is_cpu() and not config.cache_config.enable_prefix_caching:
        return (
            "vLLM turns prefix caching off for MLA on this device, where an answer that continues from cached tokens "
            "differs from one that was computed; KVPLUG_UNSUPPORTED_ENGINE_OK=1 tries it all the same"
        )
    return None


def host_hit_source() -> Any:
    """What hits are called in the engine's own statistics, where it tells sources apart (0.32)."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return CacheHitSource.HOST


# -- cache groups and layout -------------------------------------------------------------------------------------


def group_rules(kv_cache_config: KVCacheConfig) -> list[GroupRule]:
    """One rule per cache group; UnsupportedEngineError, for the whole model, if any group is not understood."""
    rules = []
    if getattr(kv_cache_config, "hisparse_host_num_blocks", None) is not None:  # it tells of loads' blocks later (0.33)
        raise UnsupportedEngineError(_HISPARSE)
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        if getattr(group, "host_resident", False) or not getattr(group, "enable_kv_transfer", True):
            raise UnsupportedEngineError(f"cache group {index} is not kept in the device's block pool")
        if getattr(group, "is_eagle_group", False):
            raise UnsupportedEngineError(_HOLDS_A_DRAFT.format(index))
        rules.append(_rule_of(index, group.kv_cache_spec))
    if not rules:
        raise UnsupportedEngineError("the model keeps no KV cache")
    if tuple(kv_cache_config.prefix_cacheable_group_ids) != tuple(range(len(rules))):
        raise UnsupportedEngineError("some cache groups can't be reused by prefix")
    return rules


def _rule_of(index: int, spec: Any) -> GroupRule:
    from vllm.v1 import kv_cache_interface as specs

    if type(spec) is specs.UniformTypeKVCacheSpecs:
        inner = {_rule_of(index, one) for one in spec.kv_cache_specs.values()}
        if len(inner) != 1:
            raise UnsupportedEngineError(f"cache group {index} mixes kinds of attention")
        return inner.pop()
    kinds = {
        specs.FullAttentionSpec: ("full", None),
        specs.MLAAttentionSpec: ("mla", None),
        specs.SlidingWindowSpec: ("sliding", "sliding_window"),
        specs.ChunkedLocalAttentionSpec: ("chunked", "attention_chunk_size"),
    }
    if type(spec) not in kinds:
        raise UnsupportedEngineError(f"cache group {index} is a {type(spec).__name__}, which kvplug does not know")
    if getattr(spec, "is_draft", False):  # from 0.33 on groups are marked only where vLLM drops blocks for the draft
        raise UnsupportedEngineError(_HOLDS_A_DRAFT.format(index))
    if getattr(spec, "non_causal", False):  # vLLM turns its own prefix caching off, after the configuration was seen
        raise UnsupportedEngineError(f"cache group {index} attends to later tokens, which decide a prefix's KV with it")
    if getattr(spec, "tokens_per_state", 1) != 1 or getattr(spec, "compress_ratio", 1) != 1:
        raise UnsupportedEngineError(f"cache group {index} keeps compressed states")
    if getattr(spec, "extra_retained_tokens", 0):
        raise UnsupportedEngineError(f"cache group {index} keeps tokens beyond its window")
    kind, window = kinds[type(spec)]
    return GroupRule(kind=kind, span=int(spec.block_size), window=int(getattr(spec, window)) if window else None)


def manager_blocks(cache: Any, num_blocks: int) -> Any:
    """A layer's cache tensor with the scheduler's blocks as its first dimension (kernel blocks are grouped)."""
    if cache.shape[0] == num_blocks:
        return cache
    if cache.shape[0] % num_blocks:
        raise UnsupportedEngineError(f"a cache of shape {tuple(cache.shape)} does not hold {num_blocks} blocks")
    return cache.unflatten(0, (num_blocks, -1))


def attention_backends(vllm_config: VllmConfig) -> tuple[str, ...]:
    """Names of the attention backends in use in this worker."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends

    return tuple(sorted(str(backend.full_cls_name()) for backend in get_current_attn_backends(vllm_config)))


def device_facts(vllm_config: VllmConfig) -> tuple[str, str | None]:
    """The kind of device, and on a CPU what decides how bytes are packed inside a block."""
    from vllm.platforms import current_platform

    kind = str(current_platform.device_type)
    if kind != "cpu":
        import torch

        return kind, f"{torch.cuda.get_device_capability()}" if kind == "cuda" else None
    import torch

    layers = vllm_config.compilation_config.static_forward_context.values()
    packings = sorted({str(getattr(layer, "isa", "")) for layer in layers})
    return kind, f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {','.join(packings)}"


# -- ranks -------------------------------------------------------------------------------------------------------


def is_only_connector(connector: Any) -> bool:
    """In a worker: whether the engine has no other KV connector, which it could have in a MultiConnector."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group() is connector


def ranks() -> tuple[int, int]:
    """(pp rank, tp rank) of this worker."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return get_pp_group().rank_in_group, get_tp_group().rank_in_group


def from_first_rank(make: Callable[[], Any]) -> Any:
    """Calls ``make`` in the engine's first worker; every worker of the engine gets its answer.

    All workers must call this together, which they do while they set up their caches.
    """
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    pp, tp = get_pp_group(), get_tp_group()
    value = make() if pp.rank_in_group == 0 and tp.rank_in_group == 0 else None
    if tp.world_size > 1:
        value = tp.broadcast_object(value, src=0)
    if pp.world_size > 1:
        value = pp.broadcast_object(value, src=0)
    return value


# -- blocks ------------------------------------------------------------------------------------------------------


def request_blocks(manager: Any, request_id: str) -> tuple[Sequence[KVCacheBlock], ...]:
    """The request's blocks, one sequence per group; nothing is copied."""
    blocks: tuple[Sequence[KVCacheBlock], ...] = manager.get_blocks(request_id).blocks
    return blocks


def hold(pool: BlockPool, blocks: list[KVCacheBlock]) -> None:
    """Keeps blocks from being given to another request. None of them may be the null block."""
    pool.touch(blocks)


def release(pool: BlockPool, blocks: Iterable[KVCacheBlock]) -> None:
    """Takes back :func:`hold`, last block first, so that a prefix's tail is evicted before its head."""
    pool.free_blocks(reversed(list(blocks)))


def num_blocks(pool: BlockPool) -> int:
    """Blocks of the engine's cache."""
    return int(pool.num_gpu_blocks)


def cache_identity(pool: BlockPool) -> object:
    """An object that is replaced whenever the engine's own prefix cache is emptied."""
    return pool.cached_block_hash_to_block


def before_cache_reset(manager: Any, react: Callable[[], None]) -> None:
    """Calls ``react`` before the engine empties its prefix cache, which fails while blocks are held."""
    original = manager.reset_prefix_cache

    @functools.wraps(original)
    def reset_prefix_cache(*args: Any, **kwargs: Any) -> Any:
        react()
        return original(*args, **kwargs)

    manager.reset_prefix_cache = reset_prefix_cache


class CacheReset:
    """An engine that is about to empty its prefix cache, and what keeps it from doing so that is not there without a
    KV connector: requests that wait for a load or were loaded and not admitted yet, aborted ones whose load has not
    been reported, and blocks that vLLM frees late because a load could overtake a step's writes.
    """

    def __init__(self, core: Any, preempts: bool) -> None:
        self._scheduler, self._executor = core.scheduler, core.model_executor
        self._preempts = preempts
        """Whether running requests were sent back to the queue, so that the cache can be emptied at all."""

    def _loaded(self) -> list[Any]:
        """Requests that are not running and have blocks: they are loaded, or were."""
        from vllm.v1.request import RequestStatus

        waiting = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        return [
            request
            for request in self._scheduler.requests.values()
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            or (request.status in waiting and request.num_computed_tokens > 0 and not request.resumable)
        ]

    @property
    def hopeless(self) -> bool:
        """Whether requests keep their blocks, so that the engine answers that its cache could not be emptied."""
        return not self._preempts and bool(self._scheduler.running or self._loaded())

    def loads(self, awaited: set[str]) -> set[str]:
        """Requests of which a load is not over or was not used yet; ``awaited``: those whose load was not reported."""
        over = {name for name in awaited if name in self._scheduler.requests}
        return over | {request.request_id for request in self._loaded()}

    def quiesce(self, newest_load: int, newest_store: int) -> bool:
        """Every worker gives up what it has not begun to copy, and waits for what it copies; whether all is quiet.

        ``newest_load``, ``newest_store``: the last jobs that were sent to the workers.
        """
        return all(self._executor.collective_rpc(quiesce_copies, args=(newest_load, newest_store)))

    def give_up_loads(self, awaited: set[str]) -> None:
        """Takes the blocks back. Requests that were loaded are computed when they are scheduled again.

        Only after :meth:`quiesce`: nothing may still write to these blocks.
        """
        from vllm.v1.request import RequestStatus

        scheduler = self._scheduler
        for name in awaited:
            request = scheduler.requests.get(name)
            if request is not None and request.is_finished():
                scheduler._free_blocks(request)
        for request in self._loaded():
            request.num_computed_tokens = 0
            scheduler.kv_cache_manager.free(request)
            getattr(scheduler, "_inflight_prefills", set()).discard(request)
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:  # as after a load that has failed
                scheduler.failed_recving_kv_req_ids.add(request.request_id)
                scheduler.finished_recving_kv_req_ids.add(request.request_id)

    def free_deferred(self) -> None:
        """Frees what vLLM frees late. Loads of kvplug's wait for the steps that were given to the device before them,
        so none can overtake a step that still writes there."""
        deferred = self._scheduler.deferred_frees
        while deferred:
            _, blocks = deferred.popleft()
            self._scheduler.kv_cache_manager.block_pool.free_blocks(reversed(blocks))


def quiesce_copies(_worker: Any, newest_load: int, newest_store: int) -> bool:
    """In a worker: :meth:`CacheReset.quiesce`."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return bool(get_kv_transfer_group().quiesce(newest_load, newest_store))


# -- weights -----------------------------------------------------------------------------------------------------


class EngineReactions(Protocol):
    """What a connector in the scheduler's process does about calls that its engine gets."""

    def on_weights(self, why: str, seen: int | None) -> None:
        """Weights have changed ("": if ``seen`` says so); ``seen``: how many changes workers have seen, if known."""

    def on_weights_begin(self, why: str, seen: int | None, reload: Arguments | None) -> None:
        """A call that changes weights is about to be made; ``reload``: what ``reload_weights`` is called with."""

    def on_weights_over(self, seen: int | None, whole: bool) -> None:
        """The call that changes weights is over; ``whole``: it is known that every worker has carried it out, that
        nothing else has changed theirs meanwhile, and that they read from one folder only.
        """

    def on_pause(self, emptying: bool) -> None:
        """The engine begins, or ends, to empty its caches of its own accord: it pauses or goes to sleep."""

    def on_resumption(self) -> None:
        """The engine is about to go on after a pause or a sleep."""

    def before_weights(self, look: LookAtWeights) -> None:
        """From now on weights may become others; ``look`` reads them, in every worker."""

    def after_weights(self, look: LookAtWeights) -> None:
        """Weights may be what they were."""

    def on_cache_reset(self, reset: CacheReset | None) -> None:
        """The engine's prefix cache is about to be emptied; None: that is over, whatever came of it."""


def watch_engine(reactions: EngineReactions) -> None:
    """In the scheduler's process: from now on the connector is told of calls that its engine gets, and of no other's.

    Calls to the workers that are known by name are judged by it. Around any other, a function or a method of the
    user's own, the weights are looked at in every worker (:mod:`kvplug.adapters.vllm.fingerprint`).
    """
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    _watching.add(reactions)
    put_around(EngineCore, "collective_rpc", _around_rpc)
    put_around(EngineCore, "set_weight_version", _around_version)
    put_around(EngineCore, "reset_prefix_cache", _around_cache_reset)
    put_around(EngineCore, "_reset_caches", _around_emptying)
    put_around(EngineCore, "resume_scheduler", _around_resumption)
    for owner in (EngineCore, EngineCoreProc):
        put_around(owner, "pause_scheduler", _around_pause)


_watching: weakref.WeakSet[EngineReactions] = weakref.WeakSet()
"""Connectors of the engines in this process."""


def _reactions_of(core: Any) -> EngineReactions | None:
    connector = getattr(getattr(core, "scheduler", None), "connector", None)
    return connector if connector in _watching else None


def _around_rpc(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        reactions = _reactions_of(self)
        if reactions is None or (isinstance(method, str) and method in _HARMLESS_RPCS):
            return original(self, method, *args, **kwargs)
        if isinstance(method, str) and method in _CHANGING_RPCS:
            before, ended = _asked_of_workers(self), False
            reload = _arguments(*args, **kwargs) if method == "reload_weights" else None
            reactions.on_weights_begin(method, _newest(before), reload)
            try:
                answer = original(self, method, *args, **kwargs)
                ended = True
                return answer
            finally:
                after = _asked_of_workers(self)
                expected = [(seen + CHANGES_OF_A_CALL, True) for seen, _ in before or ()]
                reactions.on_weights_over(_newest(after), ended and after is not None and after == expected)
        before = _fingerprints(self)
        try:
            return original(self, method, *args, **kwargs)
        finally:
            if before is None or _fingerprints(self) != before:
                reactions.on_weights(
                    method if isinstance(method, str) else "by a function that was sent to the workers", None
                )

    return collective_rpc


def _arguments(_timeout: Any = None, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Arguments:
    """What the workers' method is called with, of a ``collective_rpc``'s own arguments."""
    return tuple(args), dict(kwargs or {})


def _around_emptying(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _reset_caches(self: Any, *args: Any, **kwargs: Any) -> Any:
        reactions = _reactions_of(self)
        if reactions is None:
            return original(self, *args, **kwargs)
        reactions.on_pause(True)
        try:
            return original(self, *args, **kwargs)
        finally:
            reactions.on_pause(False)

    return _reset_caches


def _around_resumption(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def resume_scheduler(self: Any, *args: Any, **kwargs: Any) -> Any:
        reactions = _reactions_of(self)
        if reactions is not None:  # a sleep goes past collective_rpc; else it would be heard of when requests run again
            reactions.on_weights("", _newest(_asked_of_workers(self)))
            reactions.after_weights(functools.partial(_looks, self))
            reactions.on_resumption()
        return original(self, *args, **kwargs)

    return resume_scheduler


def _around_pause(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def pause_scheduler(self: Any, *args: Any, **kwargs: Any) -> Any:
        reactions = _reactions_of(self)
        if reactions is not None:  # a sleep begins with a pause, too
            reactions.before_weights(functools.partial(_looks, self))
        return original(self, *args, **kwargs)

    return pause_scheduler


def nothing_is_cached(pool: BlockPool) -> bool:
    """Whether the engine's own prefix cache is empty."""
    return not pool.cached_block_hash_to_block._cache


def _around_version(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_weight_version(self: Any, *args: Any, **kwargs: Any) -> Any:
        reactions = _reactions_of(self)
        if reactions is not None:
            reactions.on_weights(NEW_VERSION, None)
        return original(self, *args, **kwargs)

    return set_weight_version


def _around_cache_reset(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reset_prefix_cache(
        self: Any, reset_running_requests: bool = False, reset_connector: bool = False, **kwargs: Any
    ) -> Any:
        reactions = _reactions_of(self)
        if reactions is None:
            return original(self, reset_running_requests, reset_connector, **kwargs)
        reactions.on_cache_reset(CacheReset(self, reset_running_requests))
        try:
            return original(self, reset_running_requests, reset_connector, **kwargs)
        finally:
            reactions.on_cache_reset(None)

    return reset_prefix_cache


def _asleep(core: Any) -> bool:
    """Whether the weights are out of the device's memory: reading them there would end the workers."""
    return "weights" in getattr(core.model_executor, "sleeping_tags", ())


def _looks(core: Any, samples: tuple[bytes, ...] | None) -> list[Look] | None:
    if _asleep(core):
        return None
    try:
        answers: list[Look | None] = core.model_executor.collective_rpc(weights_look, args=(samples,))
    except Exception:  # noqa: BLE001 - weights that can't be looked at count as others
        return None
    return [answer for answer in answers if answer is not None] if all(answers) else None


def _fingerprints(core: Any) -> list[Any] | None:
    if _asleep(core):
        return None
    try:
        found = list(core.model_executor.collective_rpc(weights_fingerprint))
        return found if all(found) else None
    except Exception:  # noqa: BLE001 - weights that can't be looked at count as changed
        return None


def _asked_of_workers(core: Any) -> list[tuple[int, bool]] | None:
    """:func:`weights_state` of each worker; None: they will say so themselves with the next step."""
    try:
        return [(int(seen), bool(one)) for seen, one in core.model_executor.collective_rpc(weights_state)]
    except Exception:  # noqa: BLE001 - it is taken for a change whose kind is not known
        return None


def _newest(states: list[tuple[int, bool]] | None) -> int | None:
    return max((seen for seen, _ in states), default=None) if states else None


def weights_state(worker: Any) -> tuple[int, bool]:
    """In a worker: how many changes of weights its connector has seen; whether its model reads one folder only."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    model = model_of(worker)
    one_folder = not tuple(getattr(model, "secondary_weights", ())) and not getattr(
        model, "allow_patterns_overrides", None
    )
    return int(get_kv_transfer_group().weight_changes_seen()), one_folder


def on_worker_weights(react: WorkerReaction) -> None:
    """In a worker's process: calls ``react`` around each method that changes weights or drops the cache's memory, with
    its name and whether it throws weights away.
    """
    from vllm.platforms import current_platform
    from vllm.v1.worker import gpu_worker

    _worker_reactions.append(react)
    classes = [gpu_worker.Worker]
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        classes.append(CPUWorker)
    for owner in classes:
        for name in _WORKER_WEIGHT_METHODS:
            if name in owner.__dict__:
                put_around(owner, name, functools.partial(_watched, name))


def _watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        loses = _loses_weights(name, *args, **kwargs)
        _note_sleep(self, name, *args, **kwargs)
        for react in _worker_reactions:
            react(name, loses)
        try:
            return original(self, *args, **kwargs)
        finally:
            for react in _worker_reactions:
                react(name, False)

    return call


def _note_sleep(worker: Any, name: str, what: Any = None, *_: Any, **kwargs: Any) -> None:
    """Of a worker's method, about to be called so: whether the worker's weights can be read from now on."""
    tags = kwargs.get("tags") if what is None else what
    if name == "sleep" or (name == "discard" and "weights" in (tags or ("weights",))):
        sleeping.add(worker)
    elif name == "wake_up" and (tags is None or "weights" in tags):
        sleeping.discard(worker)


def _loses_weights(name: str, what: Any = None, *_: Any, **kwargs: Any) -> bool:
    """Of a worker's method, called so: whether weights have to be loaded again after it."""
    if name == "sleep":
        return bool((kwargs.get("level", 1) if what is None else what) != 1)
    if name == "discard":
        return "weights" in (kwargs.get("tags", ("weights",)) if what is None else what)
    return name in ("reset_weights", "load_model")


WorkerReaction: TypeAlias = Callable[[str, bool], None]
_worker_reactions: list[WorkerReaction] = []


def forget(connector: Any, worker: WorkerReaction) -> None:
    """Drops the reactions of a connector that was shut down."""
    _watching.discard(connector)
    _worker_reactions[:] = [react for react in _worker_reactions if react != worker]
