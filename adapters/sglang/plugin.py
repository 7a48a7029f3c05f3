"""SGLang's general plugin: flags, and in the processes of an engine that uses kvplug, the hooks that it needs.

SGLang calls :func:`register` in every process and only logs what goes wrong there; so kvplug says itself, loudly,
whether it is on. Nothing here ever raises into the engine but a command line that can't be meant.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from kvplug.adapters.sglang import compat, compat_pools, engine, flags, lora
from kvplug.errors import ConfigError

logger = logging.getLogger("sglang.kvplug")
_said: set[str] = set()


def register() -> None:
    """Entry point of ``sglang.srt.plugins``; may be called any number of times."""
    try:
        _register()
    except Exception:
        logger.exception("kvplug: OFF, an error at start; the engine runs on without kvplug")


def _register() -> None:
    found = compat.problems(compat.FRONT_TARGETS)
    if found:
        if os.environ.get(flags.ENABLE_ENV):
            _say(f"kvplug: OFF: SGLang {compat.version()} is not as kvplug knows it: {'; '.join(found)}")
        return
    compat.hook(compat.ADD_CLI_ARGS, add_cli_args, "after")
    compat.hook(compat.FROM_CLI_ARGS, from_cli_args, "before")
    compat.hook(compat.RESOLVE_ONCE, resolve_once, "before")
    try:
        if not flags.switched_on():
            return
    except ConfigError as error:
        _say(f"kvplug: OFF: {error}")
        return
    reason = unsupported()
    if reason is not None:
        return  # said where the settings are worked out, once per engine
    register_scheduler_hooks()


def unsupported() -> str | None:
    """Why this SGLang can't be used with kvplug; None if it can."""
    from kvplug import config

    version = compat.version()
    if not compat.version_supported(version) and not config.load().unsupported_engine_ok:
        return (
            f"SGLang {version} is not one that kvplug was written for ({compat.SUPPORTED['sglang']}); "
            "KVPLUG_UNSUPPORTED_ENGINE_OK=1 tries it all the same"
        )
    found = compat.problems(compat.scheduler_targets())
    return f"SGLang {version} is not as kvplug knows it: {'; '.join(found)}" if found else None


def register_scheduler_hooks() -> None:
    """What is hooked in a process that may run a scheduler."""
    compat.hook(compat.CREATE_TREE_CACHE, before_tree_cache, "before")
    compat.hook(compat.CREATE_TREE_CACHE, after_tree_cache, "after")
    compat.hook(compat.FLUSH_CACHE, after_flush, "after")
    compat.hook(compat.NAMESPACE_SEED, around_seed, "around")
    for target in compat.LORA_LOADS:
        compat.hook(target, before_lora_load, "before")
    for target in compat.scheduler_targets():
        if target in compat.WEIGHT_CHANGES or target in compat.SESSION_CHANGES:
            name = target.rpartition(".")[2]
            compat.hook(target, functools.partial(before_weight_change, name), "before")
    if compat.has_linker():
        compat.hook(compat.RELEASE_REQUEST, after_release_request, "after")


# ---- settings --------------------------------------------------------------------------------------------------------


def add_cli_args(_result: Any, parser: Any, *_args: Any, **_kwargs: Any) -> None:
    """After ``ServerArgs.add_cli_args``: kvplug's flags."""
    if "--enable-kvplug" not in getattr(parser, "_option_string_actions", {}):
        flags.add_arguments(parser)


def from_cli_args(_cls: Any, args: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before ``ServerArgs.from_cli_args``: turns kvplug's flags into SGLang's settings."""
    try:
        options = flags.from_arguments(args)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    if options is not None:
        os.environ[flags.ENABLE_ENV] = "1"  # what the engine's other processes look at
        _apply(args, options)


def resolve_once(server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before ``ServerArgs.resolve_once``: ``KVPLUG_ENABLE=1``, for ``sglang.Engine(...)`` and for servers."""
    try:
        if compat.already_resolved(server_args) or _configured(server_args) or _refused(server_args):
            return
        options = flags.from_environment()
        if options is not None:
            _apply(server_args, options)
    except ConfigError as error:
        _say(f"kvplug: OFF: {error}")
    except Exception:
        logger.exception("kvplug: OFF, an error at start; the engine runs on without kvplug")


def _apply(target: Any, options: flags.Options) -> None:
    reason = unsupported()
    mode: flags.Mode = "linker" if options.mode == "linker" else "hicache"
    if reason is None:
        if options.mode == "auto" and compat.has_linker() and not getattr(target, "enable_hierarchical_cache", False):
            mode = "linker"
        if mode == "linker" and not compat.has_linker():
            reason = f"--kvplug-mode linker needs SGLang 0.5.23, this is {compat.version()}; hicache works"
    if reason is None:
        reason = flags.conflict(target, mode)
    if reason is not None:
        _off.append(reason)
        _say(f"kvplug: OFF: {reason}")
        return
    for name, value in flags.settings_for(mode, options).items():
        setattr(target, name, value)
    logger.info("kvplug: %s mode", mode)


_off: list[str] = []


def _refused(_server_args: Any) -> bool:
    """Whether the command line was already refused: then the environment, which it set, does not count either."""
    return bool(_off)


def _configured(server_args: Any) -> bool:
    """Whether the settings name kvplug already."""
    linker = getattr(server_args, "unified_cache_external_linker_config", None)
    storage = getattr(server_args, "hicache_storage_backend_extra_config", None)
    return "kvplug.adapters.sglang" in f"{linker} {storage}"


# ---- in a scheduler's process ----------------------------------------------------------------------------------------


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A hook whose own errors never reach the engine."""

    @functools.wraps(function)
    def hook(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            for each in engine.engines():
                each.off(f"an error in {function.__name__}: {type(error).__name__}: {error}")
            logger.exception("kvplug: an error in %s", function.__name__)
            return None

    return hook


@_guarded
def before_tree_cache(ctx: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before the prefix cache is made: where all facts of a rank are at hand."""
    compat.remember_context(ctx)


@_guarded
def after_tree_cache(cache: Any, ctx: Any, *_args: Any, **_kwargs: Any) -> None:
    """After the prefix cache was made: SGLang may have swallowed why kvplug's part of it is missing."""
    compat_pools.attach_linker(cache)
    if _configured(ctx.server_args) and not engine.engines():
        _say(
            "kvplug: OFF: SGLang was told to load kvplug and did not; its log says why, "
            "look for 'storage backend' or 'linker'"
        )


@_guarded
def after_flush(result: Any, *_args: Any, **_kwargs: Any) -> None:
    """After SGLang emptied its own cache, if it did."""
    if result:
        for each in engine.engines():
            each.flushed()


@_guarded
def before_weight_change(name: str, updater: Any, recv_req: Any = None, *_args: Any, **_kwargs: Any) -> None:
    """Before weights change, or may be changed by somebody else."""
    if name == "end_weight_update" and compat.session_finished_loads(updater):
        return
    if name == "resume_memory_occupation" and not compat.weights_in_tags(recv_req):
        return
    for each in engine.engines():
        each.weights_changed(name)


@_guarded
def before_lora_load(_manager: Any, lora_ref: Any, *args: Any, **_kwargs: Any) -> None:
    """Before an adapter is loaded: from tensors if there are more arguments, else from its path."""
    lora.note_load(str(lora_ref.lora_id), None if args or _kwargs else getattr(lora_ref, "lora_path", None))


def around_seed(plain: Callable[..., Any], extra_key: Any = None, cache_salt: Any = None) -> Any:
    """Around the function that seeds the names of a request's pages."""
    engines = engine.engines()
    if extra_key is None or not engines:
        return plain(extra_key, cache_salt)
    try:
        return lora.seed(extra_key, cache_salt, plain, engines[0].secret, engines[0].hub_cache)
    except Exception as error:  # noqa: BLE001
        engines[0].off(f"an error while an adapter was named: {type(error).__name__}: {error}")
        return plain(extra_key, cache_salt)


@_guarded
def after_release_request(_result: Any, wrapper: Any, rid: str, *_args: Any, **_kwargs: Any) -> None:
    """After SGLang has forgotten what it found for a request: so does the linker, whose pins would be left."""
    release = getattr(wrapper.cache_linker, "release_request", None)
    if release is not None:
        release(rid)


def _say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        logger.warning(line)
