"""SGLang's general plugin: flags, and in the processes of an engine that uses kvplug, the hooks that it needs.

SGLang calls :func:`register` in every process and only logs what goes wrong there; so kvplug says itself, loudly,
whether it is on. Nothing here ever raises into the engine but a command line that can't be meant. Where kvplug is
installed and not asked for, three functions are hooked that return at once, and nothing heavy is imported.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvplug.adapters.sglang import compat, flags
from kvplug.engines import SUPPORTED
from kvplug.errors import ConfigError, KvplugError

if TYPE_CHECKING:
    from kvplug.adapters.sglang.engine import RankEngine

logger = logging.getLogger("sglang.kvplug")
NO_PREFIX_CACHE = "SGLang keeps no prefix cache with this model or these settings"
_said: set[str] = set()
_asked: flags.Options | None = None
"""What the command line of this process asked for, until SGLang works its settings out."""
_Hook = Callable[..., Any]


def register() -> None:
    """Entry point of ``sglang.srt.plugins``; may be called any number of times."""
    try:
        _register()
    except KvplugError as error:
        _say(f"kvplug: OFF: {error}")
    except Exception:
        logger.exception("kvplug: OFF, an error at start; the engine runs on without kvplug")


def _register() -> None:
    found = compat.problems(compat.FRONT_TARGETS) + compat.registry_problems()
    if found:
        if os.environ.get(flags.ENABLE_ENV):
            _say(f"kvplug: OFF: SGLang {compat.version()} is not as kvplug knows it: {'; '.join(found)}")
        return
    compat.hook_now(compat.ADD_CLI_ARGS, add_cli_args, "after")
    compat.hook_now(compat.FROM_CLI_ARGS, from_cli_args, "before")
    compat.hook_now(compat.RESOLVE_ONCE, around_resolve_once, "around")
    try:
        wanted = flags.switched_on() and compat.runs_scheduler()
    except ConfigError as error:
        _say(f"kvplug: OFF: {error}")
        return
    if wanted and unsupported() is None:  # why not is said where the settings are worked out, once per engine
        register_scheduler_hooks()


def unsupported(targets: tuple[str, ...] = ()) -> str | None:
    """Why this SGLang can't be used with kvplug; None if it can."""
    from kvplug import config

    version = compat.version()
    if not compat.version_supported(version) and not config.load().unsupported_engine_ok:
        return (
            f"SGLang {version} is not one that kvplug was written for ({SUPPORTED['sglang']}); "
            "KVPLUG_UNSUPPORTED_ENGINE_OK=1 tries it all the same"
        )
    found = compat.problems(targets or (*compat.scheduler_targets(), *compat.CALLED))
    return f"SGLang {version} is not as kvplug knows it: {'; '.join(found)}" if found else None


def register_scheduler_hooks() -> None:
    """What is hooked in a process that may run a scheduler."""
    compat.hook(compat.CREATE_TREE_CACHE, before_tree_cache, "before")
    compat.hook(compat.CREATE_TREE_CACHE, after_tree_cache, "after")
    compat.hook(compat.FLUSH_CACHE, after_flush, "after")
    compat.hook(compat.NAMESPACE_SEED, around_seed, "around")
    compat.hook(compat.REQUEST, after_request, "after")
    compat.hook(compat.LORA_COPY, after_lora_copy, "after")
    compat.hook(compat.RUN_BATCH, before_step, "before")
    compat.hook(compat.PROCESS_RESULT, after_step, "after")
    compat.hook(compat.RELEASE_MEMORY, before_memory_release, "before")
    for target in compat.LORA_LOADS:
        compat.hook(target, before_lora_load, "before")
    compat.hook(compat.DISK_UPDATE, around_disk_update, "around")
    compat.hook(compat.RESUME_MEMORY, after_memory_resumption, "after")
    for target in compat.scheduler_targets():
        if target in compat.WEIGHT_CHANGES or target in compat.SESSION_CHANGES:
            name = target.rpartition(".")[2]
            compat.hook(target, functools.partial(before_weight_change, name), "before")
    if compat.has_linker():
        compat.hook(compat.RELEASE_REQUEST, after_release_request, "after")
        compat.hook(compat.ADMIT, around_admission, "around")


# ---- settings --------------------------------------------------------------------------------------------------------


def add_cli_args(_result: Any, parser: Any, *_args: Any, **_kwargs: Any) -> None:
    """After ``ServerArgs.add_cli_args``: kvplug's flags."""
    if "--enable-kvplug" not in getattr(parser, "_option_string_actions", {}):
        flags.add_arguments(parser)


def from_cli_args(_cls: Any, args: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before ``ServerArgs.from_cli_args``: takes down kvplug's flags."""
    global _asked
    try:
        _asked = flags.from_arguments(args)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    if _asked is not None:
        try:
            compat.hook_now(compat.RESOLVE_ONCE, around_resolve_once, "around")  # should another plugin have it now
        except Exception as error:
            logger.exception("kvplug: an error at start")
            _refuse(f"{type(error).__name__}: {error}")


def around_resolve_once(plain: _Hook, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``ServerArgs.resolve_once``: kvplug's settings go in first. Should SGLang refuse them together with the
    model or with other settings, or not run with them, another mode is tried, and at last it starts without kvplug."""
    modes: tuple[flags.Mode, ...] = ()
    reason: str | None = None
    try:
        modes = _modes(server_args)
    except ConfigError as error:
        _refuse(str(error))
    except Exception as error:
        logger.exception("kvplug: an error at start")
        _refuse(f"{type(error).__name__}: {error}")
    for mode in modes:
        before = compat.snapshot(server_args)
        try:
            _put_in(server_args, mode)
            answer = plain(server_args, *args, **kwargs)
            reason = _unfit(server_args, has_choice=mode != modes[-1])
            if reason is None:
                _switch_on(mode)
                return answer
        except Exception as error:  # noqa: BLE001 - it is raised once more where kvplug has no part in it
            reason = f"SGLang does not take it together with this model or these settings: {error}"
        compat.restore(server_args, before)
    answer = plain(server_args, *args, **kwargs)  # raises what has nothing to do with kvplug
    if reason is not None:
        _refuse(reason)
    return answer


def _unfit(server_args: Any, *, has_choice: bool) -> str | None:
    """Why kvplug's settings must not stay, although SGLang has taken them; None if they may.

    ``has_choice``: hicache mode can be tried where the linker lacks something. Otherwise the linker says so itself.
    """
    if compat.keeps_no_prefix_cache(server_args):  # with some models SGLang sees to that after it has looked at ours
        return NO_PREFIX_CACHE
    if compat.windows_alone(server_args):
        return (
            "a model, or a stage of it, in which every layer has a sliding window: SGLang's cache for those takes no "
            "storage, and with one that does its answers are wrong, or it ends"
        )
    return compat.linker_lacks(server_args) if has_choice else None


def _modes(server_args: Any) -> tuple[flags.Mode, ...]:
    """In which modes kvplug can be switched on, the best first; none if it was not asked for, or can't be."""
    if compat.already_resolved(server_args) or flags.extra_of(server_args) is not None:
        return ()
    options = _options()
    if options is None:
        return ()
    reason = unsupported() or unsupported(compat.TOKENIZER_TARGETS)
    modes: tuple[flags.Mode, ...] = ("linker",) if options.mode == "linker" else ("hicache",)
    if reason is None:
        if options.mode == "auto" and compat.has_linker() and not flags.host_cache_wanted(server_args):
            modes = ("linker", "hicache")
        if modes[0] == "linker" and not compat.has_linker():
            reason = f"--kvplug-mode linker needs SGLang 0.5.23, this is {compat.version()}; hicache works"
    if reason is None:
        reason = flags.conflict(server_args, modes[0]) or _watch_requests()
    if reason is not None:
        _refuse(reason)
        return ()
    for mode in modes:
        importlib.import_module(flags.MODULES[mode])  # in a scheduler, an error there would end the engine
    return modes


def _options() -> flags.Options | None:
    return _asked or flags.from_environment()


def _put_in(server_args: Any, mode: flags.Mode) -> None:
    options = _options()
    assert options is not None
    for name, value in flags.settings_for(mode, options).items():
        setattr(server_args, name, value)


def _watch_requests() -> str | None:
    """Sees to it that images which users name are noticed from now on; why it can't be, None if it is."""
    for target in compat.TOKENIZER_TARGETS:
        compat.hook_now(target, before_tokenize, "before")
    return compat.lost_hooks(compat.TOKENIZER_TARGETS)


def _switch_on(mode: flags.Mode) -> None:
    os.environ[flags.ENABLE_ENV] = "1"  # what the engine's other processes look at
    logger.info("kvplug: %s mode", mode)


def _refuse(reason: str) -> None:
    _say(f"kvplug: OFF: {reason}")


# ---- requests as they come in ----------------------------------------------------------------------------------------


def before_tokenize(manager: Any, obj: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before and after a request is tokenized: images that are named by the user's word stay within this engine."""
    extra = flags.extra_of(manager.server_args)
    key = getattr(obj, "extra_key", None) or ""  # one to be embedded has none
    if extra is not None and not key.startswith(flags.PRIVATE) and _names_given(obj) and not _trusts_names(extra):
        obj.extra_key = flags.PRIVATE + key


def _trusts_names(extra: dict[str, Any]) -> bool:
    from kvplug import config

    try:
        return config.load(**dict(extra.get("settings") or {})).trust_mm_ids
    except Exception as error:  # noqa: BLE001 - a request must not fail by it
        _say(f"kvplug: names that users give to images are not trusted, the settings can't be read: {error}")
        return False


def _names_given(obj: Any) -> bool:
    """Whether a request names its images, videos or sounds by itself, and SGLang would believe it."""
    if getattr(obj, "mm_hashes", None):
        return True
    media = [getattr(obj, name, None) for name in ("image_data", "video_data", "audio_data")]
    while media:
        item = media.pop()
        if isinstance(item, (list, tuple)):
            media.extend(item)
        elif isinstance(item, dict) and (item.get("hash") is not None or item.get("pad_value") is not None):
            return True
    return False


# ---- in a scheduler's process ----------------------------------------------------------------------------------------


def _engines() -> list[RankEngine]:
    module = sys.modules.get("kvplug.adapters.sglang.engine")
    return module.engines() if module is not None else []


def _guarded(function: _Hook) -> _Hook:
    """A hook whose own errors never reach the engine."""

    @functools.wraps(function)
    def hook(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            for each in _engines():
                each.off(f"an error in {function.__name__}: {type(error).__name__}: {error}")
            logger.exception("kvplug: an error in %s", function.__name__)
            return None

    return hook


@_guarded
def before_tree_cache(ctx: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before the prefix cache is made: where all facts of a rank are at hand."""
    compat.remember_context(ctx, asked=flags.extra_of(ctx.server_args) is not None)
    compat.take_python_tree(ctx)


@_guarded
def after_tree_cache(cache: Any, ctx: Any, *_args: Any, **_kwargs: Any) -> None:
    """After the prefix cache was made: SGLang may have swallowed why kvplug's part of it is missing."""
    if flags.extra_of(ctx.server_args) is None:
        lost = compat.lost_hooks(compat.FRONT_TARGETS)
        if lost is not None:  # where the settings are worked out nothing of kvplug was called that could have said it
            _refuse(lost)
        return
    engines = _engines()
    if not engines:
        _say(
            "kvplug: OFF: SGLang was told to load kvplug and did not; its log says why, "
            "look for 'storage backend' or 'linker'"
        )
    for each in engines:
        if ctx.disable_radix_cache:
            each.off(NO_PREFIX_CACHE)
        elif each.mode == "linker" and not getattr(compat.cache_linker(cache), "is_attached", False):
            each.off("SGLang's prefix cache was made without kvplug's linker: another plugin has taken its place")


@_guarded
def after_flush(result: Any, *_args: Any, **_kwargs: Any) -> None:
    """After SGLang emptied its own cache, if it did."""
    if result:
        for each in _engines():
            each.flushed()


@_guarded
def before_weight_change(name: str, updater: Any, recv_req: Any = None, *_args: Any, **_kwargs: Any) -> None:
    """Before weights change, or may be changed by somebody else."""
    if compat.leaves_weights(name, recv_req):
        return
    engines = _engines()
    if not engines:
        compat.remember_new_weights(name)
    for each in engines:
        if name == "begin_weight_update":
            each.update_began()
        elif name == "end_weight_update":
            each.update_ended(all_flushed=compat.session_finished_loads(updater))
        elif name == "resume_memory_occupation":
            each.wakes_up(name)
        else:
            each.weights_changed(name)


def around_disk_update(plain: _Hook, updater: Any, recv_req: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Around an update of weights from files, which are looked at before it reads them and after."""
    _disk_update_begins(recv_req)
    whole = False
    try:
        answer = plain(updater, recv_req, *args, **kwargs)
        whole = compat.reloaded_whole(answer)
        return answer
    finally:
        _disk_update_ended(whole)


@_guarded
def after_memory_resumption(_result: Any, updater: Any, recv_req: Any = None, *_args: Any, **_kwargs: Any) -> None:
    """After the device's memory is there again, with the weights or without what was in them."""
    if not compat.leaves_weights("resume_memory_occupation", recv_req):
        for each in _engines():
            each.sleep_ended(functools.partial(compat.weights_look, updater))


@_guarded
def _disk_update_begins(recv_req: Any) -> None:
    name = compat.DISK_UPDATE.rpartition(".")[2]
    engines = _engines()
    if not engines:
        compat.remember_new_weights(name)
    for each in engines:
        each.reload_began(name, compat.reloaded_folder(recv_req))


@_guarded
def _disk_update_ended(whole: bool) -> None:
    for each in _engines():
        each.reload_ended(whole)


@_guarded
def before_memory_release(updater: Any, recv_req: Any = None, *_args: Any, **_kwargs: Any) -> None:
    """Before the device's memory is released. SGLang flushes its cache only after that, when nobody may read it."""
    if not compat.leaves_weights("resume_memory_occupation", recv_req):
        for each in _engines():
            each.sleep_begins(
                functools.partial(compat.weights_look, updater), compat.loses_weights(recv_req, each.facts)
            )
    if compat.leaves_pages(recv_req):
        return
    for each in _engines():
        if each.leave_device is not None:
            each.leave_device()


@_guarded
def before_lora_load(manager: Any, lora_ref: Any, *args: Any, **kwargs: Any) -> None:
    """Before an adapter is loaded: from tensors if there are more arguments, else from its path."""
    from kvplug.adapters.sglang import lora

    path = None if args or kwargs else getattr(lora_ref, "lora_path", None)
    became_another = lora.note_load(str(lora_ref.lora_id), path, compat.lora_hub_cache(manager))
    for each in _engines():
        if became_another:
            each.rotate("an adapter was loaded again under its id, with other content")
        lora.tell_ranks(each)


@_guarded
def after_lora_copy(_result: Any, _pool: Any, uid: str | None, *_args: Any, **_kwargs: Any) -> None:
    """After an adapter was copied to the device, which may be from files that were changed since it was loaded."""
    from kvplug.adapters.sglang import lora

    if uid is not None and lora.note_copy(str(uid)):
        for each in _engines():
            each.rotate("an adapter's files were changed after it was loaded, and it was copied from them")


@_guarded
def after_request(_result: Any, request: Any, *_args: Any, **_kwargs: Any) -> None:
    """After a request was made: where its pages depend on more than tokens, extra key and salt, the extra key says so.

    Only from what all ranks know alike, since SGLang's own tree is kept by it.
    """
    from kvplug.adapters.sglang import requests

    engines = _engines()
    if engines:
        requests.complete_extra_key(request, engines[0])


def before_step(scheduler: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before a batch is computed: a fetch from another host has to be faster than that."""
    for each in _engines():
        each.step_begins(scheduler, batch)


def after_step(_result: Any, _scheduler: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
    """After the results of a batch were taken in."""
    for each in _engines():
        each.step_ended(batch)


def around_seed(plain: _Hook, extra_key: Any = None, cache_salt: Any = None) -> Any:
    """Around the function that seeds the names of a request's pages."""
    engines = _engines()
    if extra_key is None or not engines:
        return plain(extra_key, cache_salt)
    from kvplug.adapters.sglang import lora

    try:
        return lora.seed(extra_key, cache_salt, plain, engines[0])
    except Exception as error:  # noqa: BLE001
        engines[0].off(f"an error while an adapter was named: {type(error).__name__}: {error}")
        return plain(extra_key, cache_salt)


@_guarded
def after_release_request(_result: Any, wrapper: Any, rid: str, *_args: Any, **_kwargs: Any) -> None:
    """After SGLang has forgotten what it found for a request: so does the linker, whose pins would be left."""
    release = getattr(wrapper.cache_linker, "release_request", None)
    if release is not None:
        release(rid)


def around_admission(plain: _Hook, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Around what adds a request to the next batch: one that waits for another host stays in the queue."""
    holds_back = getattr(compat.linker_of(adder), "holds_back", None)
    if holds_back is not None and holds_back(req.rid, compat.runs_nothing(adder)):
        return compat.not_now()
    return plain(adder, req, *args, **kwargs)


def _say(line: str) -> None:
    """Once, and as an error: an offline engine shows nothing less."""
    if line not in _said:
        _said.add(line)
        logger.error(line)
