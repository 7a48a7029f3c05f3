"""Everything that touches SGLang's insides, checked when it is loaded.

kvplug goes in through interfaces that SGLang offers (the plugin hooks, the storage backend, the cache linker), which
move with every release, and needs some facts that are not offered at all. :func:`problems` compares each hooked
function with what kvplug was written against, so that a changed SGLang is refused with one line instead of failing
later. Device and host page pools are in ``devicepools.py`` and ``storage.py``, behind SGLang's own contracts.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import os
import pkgutil
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvplug.adapters.common.hooks import leads_to
from kvplug.adapters.common.modelconfig import plain_hf_config, rope_depends_on_length
from kvplug.adapters.common.weightbytes import digest_of, sample_of
from kvplug.adapters.sglang.environment import VARIABLES
from kvplug.engines import SGLANG_LINKER_SINCE, SUPPORTED, release

MULTIMODAL_SINCE = (0, 5, 23)
"""Before, an image is 30 bits of a hash in the tokens that pages are named by."""

_SRT = "sglang.srt."
_UPDATER = _SRT + "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
_WRAPPER = _SRT + "mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper."

ADD_CLI_ARGS = _SRT + "server_args.ServerArgs.add_cli_args"
FROM_CLI_ARGS = _SRT + "server_args.ServerArgs.from_cli_args"
RESOLVE_ONCE = _SRT + "server_args.ServerArgs.resolve_once"
CREATE_TREE_CACHE = _SRT + "mem_cache.registry.create_tree_cache"
FLUSH_CACHE = _SRT + "managers.scheduler.Scheduler.flush_cache"
NAMESPACE_SEED = _SRT + "mem_cache.utils.storage_namespace_seed"
RELEASE_REQUEST = _WRAPPER + "release_request"
ADMIT = _SRT + "managers.schedule_policy.PrefillAdder.add_one_req"
RUN_BATCH = _SRT + "managers.scheduler.Scheduler.run_batch"
PROCESS_RESULT = _SRT + "managers.scheduler.Scheduler.process_batch_result"
REQUEST = _SRT + "managers.schedule_batch.Req.__init__"
TOKENIZE = _SRT + "managers.tokenizer_manager.TokenizerManager._tokenize_one_request"
TOKENIZED = _SRT + "managers.tokenizer_manager.TokenizerManager._create_tokenized_object"
DISK_UPDATE = _UPDATER + "update_weights_from_disk"
WEIGHT_CHANGES = tuple(
    _UPDATER + name
    for name in (
        "update_weights_from_distributed",
        "update_weights_from_tensor",
        "update_weights_from_ipc",
        "resume_memory_occupation",
        "check_weights",
    )
)
"""Others than that; ``check_weights`` can overwrite them too, see :func:`leaves_weights`."""
RELEASE_MEMORY = _UPDATER + "release_memory_occupation"
RESUME_MEMORY = _UPDATER + "resume_memory_occupation"
WHOLE_RELOADS = frozenset({"auto", "safetensors"})
"""Load formats with which :data:`DISK_UPDATE` takes the safetensors in a folder as they lie there."""
_NOT_FLUSHED = "Weights were updated, but the cache was not flushed"
SESSION_CHANGES = tuple(_UPDATER + name for name in ("begin_weight_update", "end_weight_update"))
"""Weights that somebody else writes between the two calls; not in every supported version."""
LORA_LOADS = tuple(
    _SRT + "lora.lora_manager.LoRAManager." + name for name in ("_load_lora_adapter", "_load_lora_adapter_from_tensors")
)

_APPLY = _SRT + "plugins.hook_registry.HookRegistry._apply_target"
LORA_COPY = _SRT + "lora.mem_pool.LoRAMemoryPool.load_lora_weight_to_buffer"

CALLED = ("torch.distributed.distributed_c10d._get_default_store",)
"""Functions behind no public name that are called, not hooked, in the processes of an engine that uses kvplug."""

_SHAPES: dict[str, tuple[str, ...]] = {
    ADD_CLI_ARGS: ("parser",),
    FROM_CLI_ARGS: ("args",),
    RESOLVE_ONCE: ("self",),
    CREATE_TREE_CACHE: ("ctx",),
    FLUSH_CACHE: ("self", "empty_cache"),
    NAMESPACE_SEED: ("extra_key", "cache_salt"),
    RELEASE_REQUEST: ("self", "rid"),
    ADMIT: ("self", "req", "has_chunked_req", "truncation_align_size"),
    RUN_BATCH: ("self", "batch"),
    PROCESS_RESULT: ("self", "batch", "result"),
    REQUEST: ("self", "rid"),
    TOKENIZE: ("self", "obj"),
    TOKENIZED: ("self", "obj"),
    _APPLY: ("target", "hooks"),
    LORA_COPY: ("self", "uid"),
    **dict.fromkeys(CALLED, ()),
    **dict.fromkeys(LORA_LOADS, ("self", "lora_ref")),
    **dict.fromkeys((DISK_UPDATE, *WEIGHT_CHANGES, *SESSION_CHANGES, RELEASE_MEMORY), ("self", "recv_req")),
}
_ALSO_TAKES = {
    REQUEST: frozenset(
        {"extra_key", "lora_id", "session", "positional_embed_overrides", "multi_item_delimiter_indices"}
    )
}
"""Parameters that stand further behind, where SGLang adds others in between."""
FRONT_TARGETS = (ADD_CLI_ARGS, FROM_CLI_ARGS, RESOLVE_ONCE)
"""Hooked in every process in which SGLang loads plugins; they do next to nothing unless kvplug is asked for."""
TOKENIZER_TARGETS = (TOKENIZE, TOKENIZED)
"""Hooked in the process that takes requests in, once kvplug's settings are made: a request as it comes in, of which
some of what it brings is used up on the way, and as it goes out, with what another plugin has added in between."""


def registry_problems() -> list[str]:
    """What in SGLang's list of hooks is not as kvplug expects it."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    patched = isinstance(getattr(HookRegistry, "_patched", None), set)
    return problems((_APPLY,)) + ([] if patched else ["HookRegistry._patched is gone"])


def version() -> str:
    """The engine's version, as its package says."""
    return importlib.metadata.version("sglang")


def version_supported(text: str) -> bool:
    """Whether kvplug was written for this version."""
    return text in SUPPORTED["sglang"]


def has_linker() -> bool:
    """Whether this SGLang lets others bring a linker."""
    return release(version()) >= SGLANG_LINKER_SINCE


def scheduler_targets() -> tuple[str, ...]:
    """What is hooked in the processes of an engine that uses kvplug."""
    optional = [target for target in SESSION_CHANGES if _resolve(target) is not None]
    linker = (RELEASE_REQUEST, ADMIT) if has_linker() else ()
    steps = (RUN_BATCH, PROCESS_RESULT)
    always = (CREATE_TREE_CACHE, FLUSH_CACHE, NAMESPACE_SEED, REQUEST, *steps, *LORA_LOADS, LORA_COPY, *WEIGHT_CHANGES)
    return (*always, DISK_UPDATE, RELEASE_MEMORY, *optional, *linker)


def runs_scheduler() -> bool:
    """Whether this process may run a scheduler: it was started from that module. Others need none of its hooks."""
    return _SRT + "managers.scheduler" in sys.modules


def _resolve(target: str) -> Any:
    """The function that a dotted path names; None if it does not exist."""
    owner, _, name = target.rpartition(".")
    try:
        return getattr(pkgutil.resolve_name(owner), name, None)
    except (ImportError, AttributeError):
        return None


def problems(targets: tuple[str, ...]) -> list[str]:
    """What among the functions to be hooked or called is not as kvplug expects it; empty if all are."""
    found = []
    for target in targets:
        short = ".".join(target.split(".")[-2:])
        function = _resolve(target)
        if function is None:
            found.append(f"{short} is gone")
            continue
        names = tuple(inspect.signature(function).parameters)
        expected = _SHAPES[target]
        if names[: len(expected)] != expected:
            found.append(f"{short} takes {names[: len(expected)]}, not {expected}")
        elif missing := _ALSO_TAKES.get(target, frozenset()).difference(names):
            found.append(f"{short} takes no {', '.join(sorted(missing))}")
    return found


def hook(target: str, function: Callable[..., Any], kind: str) -> None:
    """Registers a hook; ``kind`` is "before", "after" or "around". SGLang applies it when all plugins are loaded.

    A second call of the same kind changes nothing. SGLang passes over hooks on a function to which it has applied hooks
    already, such as those of another plugin that did not wait: there it is put in place at once.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if (target, kind) in _ours:
        return
    if target in HookRegistry._patched:
        hook_now(target, function, kind)
        return
    _ours[target, kind] = function
    HookRegistry.register(target, function, HookType(kind))


def hook_now(target: str, function: Callable[..., Any], kind: str) -> None:
    """Puts a hook around what stands there now, another plugin's hooks included, unless it is in place.

    Not through SGLang's list of hooks: what it has applied once it does not apply again, to nobody's.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    if (target, kind) in _ours and leads_to(_resolve(target), [_ours[target, kind]]):
        return
    _ours[target, kind] = function
    HookRegistry._apply_target(target, [(HookType(kind), function, HookSource("kvplug", "kvplug"))])


def lost_hooks(targets: tuple[str, ...] = ()) -> str | None:
    """What speaks against kvplug where hooks of its own are not in place any more; None if all are.

    ``targets``: only these, of which all must have been hooked; else all that were.
    """
    lost = [
        target
        for target in targets or sorted({target for target, _ in _ours})
        if not all(leads_to(_resolve(target), [ours]) for (at, _), ours in _ours.items() if at == target)
        or not any(at == target for at, _ in _ours)
    ]
    if not lost:
        return None
    names = ", ".join(".".join(target.split(".")[-2:]) for target in lost)
    return f"another plugin has replaced {names}, which kvplug hooks, without calling what was there before"


_ours: dict[tuple[str, str], Callable[..., Any]] = {}
"""kvplug's hooks in this process, by function and kind."""


def snapshot(server_args: Any) -> Any:
    """A copy of settings that are not worked out yet, for :func:`restore`."""
    return copy.copy(server_args)  # working them out writes beside the fields, not into them


def restore(server_args: Any, before: Any) -> None:
    """Makes settings as they were, also after working them out has failed, so that it can be tried again."""
    import msgspec

    server_args.__dict__.clear()  # what working them out left there, the seal on the fields included
    for name in type(server_args).__struct_fields__:
        msgspec.Struct.__setattr__(server_args, name, getattr(before, name))
    server_args.__dict__.update(before.__dict__)


def already_resolved(server_args: Any) -> bool:
    """Whether the settings have been worked out before, such as in the process that started this one."""
    return bool(
        getattr(server_args, "_resolution_finished", False) or getattr(server_args, "_resolution_failed", False)
    )


def keeps_no_prefix_cache(server_args: Any) -> bool:
    """Whether settings that are worked out leave no prefix cache."""
    return bool(server_args.resolved_dict().get("disable_radix_cache"))


def windows_alone(server_args: Any) -> bool:
    """Whether a model's layers, or a pipeline stage's, all have a sliding window: by the model's configuration, which
    SGLang has read when its settings are worked out. False where that is not known."""
    model: Any = getattr(server_args, "_model_config", None)
    full = getattr(model, "full_attention_layer_ids", None)
    if full is None or not getattr(model, "is_hybrid_swa", False):
        return False
    stages = int(server_args.resolved_dict().get("pp_size") or 1)
    if stages == 1:
        return not full
    from sglang.srt.distributed.utils import get_pp_indices

    bounds = [get_pp_indices(int(model.num_hidden_layers), stage, stages) for stage in range(stages)]
    return not all(any(first <= layer < last for layer in full) for first, last in bounds)


def linker_lacks(server_args: Any) -> str | None:
    """What of this model or these settings SGLang's linker does not take, and its host cache does; None if nothing."""
    if int(server_args.resolved_dict().get("pp_size") or 1) > 1:
        return "the linker takes no pipeline parallelism"
    model = getattr(server_args, "_model_config", None)
    if model is None:
        return None
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    if mambaish_config(model) is not None and model.attention_arch != AttentionArch.MLA:
        return "the linker takes recurrent layers beside MLA alone"
    return None


def session_finished_loads(updater: Any) -> bool:
    """Whether a weight-update session's weights came through calls that were each followed by a flush."""
    return bool(getattr(getattr(updater, "_session", None), "loaded_weights", False))


def leaves_pages(recv_req: Any) -> bool:
    """Whether a :data:`RELEASE_MEMORY` with this request leaves the KV cache where it is."""
    tags: Any = getattr(recv_req, "tags", None)
    return bool(tags) and "kv_cache" not in tags


def weights_look(updater: Any, sample: bytes | None) -> tuple[bytes, bytes] | None:
    """A sample and the digest of all bytes of this rank's weights (:mod:`kvplug.adapters.common.weightbytes`); the
    second is empty if ``sample`` is another. None if they can't be read.
    """
    if "weights" in getattr(updater, "offload_tags", ()):
        return None  # reading them where they are not would end this process
    try:
        model = updater.tp_worker.model_runner.model
        found = sample_of(model)
        return found, digest_of(model) if sample in (None, found) else b""
    except Exception:  # noqa: BLE001 - tensors of a kind that has no bytes, no memory beside the weights
        return None


def loses_weights(recv_req: Any, facts: Facts) -> bool:
    """Whether weights have to be loaded again after a :data:`RELEASE_MEMORY` with this request."""
    kept = facts.server.get("enable_weights_cpu_backup") or not facts.server.get("enable_memory_saver")
    return not kept and not leaves_weights("resume_memory_occupation", recv_req)


def leaves_weights(name: str, recv_req: Any) -> bool:
    """Whether a call of this name among :data:`WEIGHT_CHANGES`, with this request, leaves the weights as they are."""
    if name == "resume_memory_occupation":
        tags: Any = getattr(recv_req, "tags", None)
        return bool(tags) and "weights" not in tags
    if name == "check_weights":
        return getattr(recv_req, "action", None) in ("snapshot", "compare", "checksum")
    return False


def reloaded_folder(recv_req: Any) -> str | None:
    """The folder from which :data:`DISK_UPDATE`, with this request, reads all of the model's weights.

    None if they are elsewhere, or not read as they lie there.
    """
    path = getattr(recv_req, "model_path", None)
    as_saved = getattr(recv_req, "load_format", None) in WHOLE_RELOADS and getattr(recv_req, "manifest", None) is None
    return path if isinstance(path, str) and as_saved else None


def reloaded_whole(answer: Any) -> bool:
    """Whether :data:`DISK_UPDATE`, with this answer, has replaced all weights of this rank.

    Where it has failed, any of them may be the new ones: what SGLang calls rolling back reads the new folder again.
    """
    if bool(getattr(answer, "success", False)):
        return True
    return str(getattr(answer, "message", "")).startswith(_NOT_FLUSHED)  # from 0.5.22; before, the engine ends


# ---- facts of one rank -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a scheduler process knows of its engine when it makes its prefix cache. Plain values."""

    server: dict[str, Any]
    """All of SGLang's settings, resolved."""
    model: dict[str, Any]
    """What the model computes: its configuration after overrides, dtype, quantisation."""
    model_path: str
    revision: str | None
    draft_path: str | None
    draft_revision: str | None
    load_format: str
    download_dir: str | None
    page_size: int
    kv_dtype: str
    kv_pool: str
    """Class of the device's page pool."""
    device: str
    backends: dict[str, str]
    is_multimodal: bool
    is_generation: bool
    """Requests are answered with tokens, not with embeddings or scores."""
    is_eagle: bool
    tp: tuple[int, int]
    """Rank and size of the attention's tensor parallelism."""
    cp: tuple[int, int]
    pp: tuple[int, int]
    layers: tuple[int, int]
    """The first layer of this rank's stage and the one after its last."""
    quantization_param_path: str | None
    lora_enabled: bool
    rust_tree: bool
    replica: str
    """Which of the server's data-parallel replicas this rank belongs to."""
    environment: dict[str, str]
    """The environment variables that count: as this process has them now, before SGLang computes anything."""
    one_tokenizer: bool
    """Whether all requests come in through the process in which kvplug has seen what they bring along."""
    params: Any = field(repr=False, default=None)
    runner: Any = field(repr=False, default=None)


_context: Any = None
_asked = False
_weights_replaced: str | None = None
_ENGINE_WORD = "kvplug/engine"


def remember_context(ctx: Any, *, asked: bool) -> None:
    """Keeps what SGLang builds its prefix cache from: the one place where all facts of a rank meet.

    ``asked``: this engine's settings switch kvplug on, and so all of its processes know of it.
    """
    global _context, _asked
    _context, _asked = ctx, asked


def have_context() -> bool:
    """Whether kvplug's hooks were there when this process built its prefix cache."""
    return _context is not None


def remember_new_weights(how: str) -> None:
    """Keeps that weights were replaced in this process before kvplug was attached: they are not those that it finds."""
    global _weights_replaced
    _weights_replaced = how


def weights_replaced() -> str | None:
    """The call by which weights were replaced before kvplug was attached; None if they are those of the start."""
    return _weights_replaced


def engine_word() -> str:
    """32 hexadecimal digits that the ranks of one engine share with nobody: the first to ask draws them.

    Not from settings, which can be given to several engines. In the store of the ranks' process group, which needs no
    other rank to take part; the same again as long as the processes live.
    """
    import torch.distributed as dist

    drawn = secrets.token_hex(16)
    if not dist.is_available() or not dist.is_initialized():
        return drawn
    store = pkgutil.resolve_name(CALLED[0])()
    return bytes(store.compare_set(_ENGINE_WORD, "", drawn)).decode()


def ranks_agree(topic: str, mine: bytes) -> bool | None:
    """Whether all ranks of this engine have said the same of a topic, and this one says it now; None until all have.

    In the store of the ranks' process group, which needs no other rank to take part. Never waits for one.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    store = pkgutil.resolve_name(CALLED[0])()
    keys = [f"kvplug/{topic}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], mine.hex())
    return {bytes(store.get(key)).decode() for key in keys} == {mine.hex()} if store.check(keys) else None


def facts() -> Facts:
    """The facts of this rank; call only where :func:`have_context`."""
    ctx = _context
    server = dict(ctx.server_args.resolved_dict())
    params, model, runner = ctx.params, ctx.model_config, ctx.tp_worker.model_runner
    return Facts(
        server=server,
        model=_model_values(model),
        model_path=str(getattr(model, "model_path", None) or server["model_path"]),
        revision=getattr(model.hf_config, "_commit_hash", None) or getattr(model, "revision", None),
        draft_path=server.get("speculative_draft_model_path"),
        draft_revision=server.get("speculative_draft_model_revision"),
        load_format=str(getattr(server.get("load_format"), "value", server.get("load_format"))),
        download_dir=server.get("download_dir"),
        page_size=int(params.page_size),
        kv_dtype=str(getattr(runner, "kv_cache_dtype", None) or model.dtype).removeprefix("torch."),
        kv_pool=type(params.token_to_kv_pool_allocator.get_kvcache()).__qualname__,
        device=str(server.get("device") or "").split(":", maxsplit=1)[0],
        backends={
            name: str(server[name])
            for name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
            if server.get(name) is not None
        },
        is_multimodal=bool(getattr(model, "is_multimodal", False)),
        is_generation=bool(getattr(model, "is_generation", True)),
        is_eagle=bool(getattr(params, "is_eagle", False)),
        tp=_group_rank(getattr(params, "attn_tp_cache_group", None) or params.tp_cache_group, ctx),
        cp=(int(params.attn_cp_rank), int(params.attn_cp_size)),
        pp=(int(params.pp_rank), int(params.pp_size)),
        layers=(int(getattr(runner, "start_layer", 0) or 0), int(getattr(runner, "end_layer", 0) or 0)),
        quantization_param_path=server.get("quantization_param_path"),
        lora_enabled=bool(server.get("enable_lora") or server.get("lora_paths")),
        rust_tree=_rust_tree(params),
        replica=_replica(ctx),
        environment=VARIABLES.deciding(os.environ),
        one_tokenizer=_one_tokenizer(server) and _asked,
        params=params,
        runner=runner,
    )


def _model_values(model: Any) -> dict[str, Any]:
    plain = plain_hf_config(model.hf_config)
    return {
        "hf": plain,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization) if getattr(model, "quantization", None) else None,
        "context_len": int(model.context_len) if rope_depends_on_length(plain) else None,
        "architecture": [str(name) for name in getattr(model.hf_config, "architectures", None) or ()],
    }


def _group_rank(group: Any, ctx: Any) -> tuple[int, int]:
    import torch.distributed as dist

    if group is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_rank(group=group)), int(dist.get_world_size(group=group))
    return int(ctx.tp_rank), int(ctx.tp_size)


def _replica(ctx: Any) -> str:
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    number = getattr(parallel, "dp_rank", None)
    if number is None:
        number = getattr(getattr(ctx.tp_worker.model_runner, "ps", None), "dp_rank", None)  # 0.5.20
    return f"{number or 0}.{getattr(parallel, 'attn_dp_rank', 0) or 0}"


def _one_tokenizer(server: dict[str, Any]) -> bool:
    from sglang.srt.environ import envs

    rust = getattr(envs, "SGLANG_RUST_SERVER", None)
    return (
        int(server.get("tokenizer_worker_num") or 1) == 1
        and not any(server.get(name) for name in ("grpc_mode", "smg_grpc_mode", "language_only"))
        and not (rust is not None and rust.get())
    )


def _rust_tree(params: Any) -> bool:
    """Whether the prefix tree, and with it the naming of pages, is SGLang's compiled one."""
    from sglang.srt.environ import envs

    setting = getattr(envs, "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", None)
    return (
        getattr(params, "tree_core_backend", None) or (setting.get() if setting is not None else "python")
    ) == "rust"


def take_python_tree(ctx: Any) -> None:
    """Asks for the prefix tree in Python, which names pages through the function that is hooked, where adapters are
    used. Only before the tree is made; releases without that choice have the Python tree unless told otherwise."""
    server = ctx.server_args.resolved_dict()
    if (server.get("enable_lora") or server.get("lora_paths")) and hasattr(ctx.params, "tree_core_backend"):
        ctx.params.tree_core_backend = "python"


def wide_image_names() -> bool:
    """Whether an image's place in a page's name is wide enough to tell images apart."""
    return (
        release(version()) >= MULTIMODAL_SINCE
        and _resolve(_SRT + "managers.schedule_batch._compute_pad_values") is not None
    )


def dummy_seed() -> int:
    """The seed from which SGLang fills dummy weights."""
    from sglang.srt.model_loader.weight_utils import initialize_dummy_weights

    return int(inspect.signature(initialize_dummy_weights).parameters["seed"].default)


def lora_hub_cache(manager: Any) -> str | None:
    """Where SGLang's LoRA manager has the hub's files, if not in the usual place."""
    return getattr(getattr(manager, "load_config", None), "download_dir", None)


def not_now() -> Any:
    """What SGLang's :data:`ADMIT` answers for a request that is not to be part of this batch, while others may be."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    return AddReqResult.CONTINUE


def linker_of(adder: Any) -> Any:
    """The cache linker behind what puts a batch together (``PrefillAdder``); None if there is none."""
    return cache_linker(adder.tree_cache)


def cache_linker(cache: Any) -> Any:
    """The cache linker behind a prefix cache; None if it has none."""
    return getattr(getattr(cache, "linker", None), "cache_linker", None)


def runs_nothing(adder: Any) -> bool:
    """Whether there is nothing to compute but what is going to be admitted."""
    running = getattr(adder, "running_batch", None)
    return not adder.can_run_list and (running is None or running.is_empty())


def step_begins(scheduler: Any, batch: Any) -> tuple[int, list[int]] | None:
    """(number of the step that this batch is about to be, tokens that it computes of each request's prompt); None for
    one that computes no prompt."""
    lengths = batch.extend_lens if batch.forward_mode.is_extend() else None
    return (int(scheduler.forward_ct) + 1, lengths) if lengths else None


def step_of(batch: Any) -> int:
    """The number of the step that a batch was, once it was run."""
    return int(batch.forward_iter or 0)


def metrics_enabled(server: dict[str, Any]) -> bool:
    """Whether SGLang serves /metrics, from files that all its processes write."""
    return bool(server.get("enable_metrics"))


# ---- the host cache -----------------------------------------------------------------------------------------------


def holds_own_heads(host_pool: Any) -> bool:
    """Whether a host pool keeps keys and values by heads, of which each tensor-parallel rank has its own."""
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKOnlyPoolHost, MHATokenToKVPoolHost

    return isinstance(host_pool, (MHATokenToKVPoolHost, MHATokenToKOnlyPoolHost))


def storage_metrics(**values: list[Any]) -> Any:
    """SGLang's record of what a storage backend did: ``prefetch_pgs``, ``prefetch_bandwidth``, and so for backups."""
    from sglang.srt.observability.metrics_collector import StorageMetrics

    return StorageMetrics(**values)
