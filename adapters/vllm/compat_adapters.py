"""Where vLLM's workers read LoRA adapters and copy them to the device: private interfaces, checked when they are used.

``WorkerLoRAManager._load_adapter`` reads an adapter, from where ``get_adapter_absolute_path`` says that it lies;
``LoRAModelManager.activate_adapter`` copies it to where the model reads it, each time that it gets a place there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

from kvplug.adapters.common.hooks import put_around

ReadReaction = Callable[[int, str | None, Callable[[], Iterable[int]]], None]
"""Called with an adapter's id, the local path that is about to be read (None: its weights do not lie there), and what
lists the ids of those held."""
IdReaction = Callable[[int], None]


class _Watcher(NamedTuple):
    config: Any
    reads: ReadReaction
    not_read: IdReaction
    copied: IdReaction


_watchers: list[_Watcher] = []
_loading: list[tuple[Any, Any]] = []
"""Managers that are loading an adapter, and the request for it."""


def adapter_problems() -> list[str]:
    """What of the engine's way with adapters is not as kvplug expects it; empty if all is."""
    from vllm.lora import model_manager, worker_manager

    expected: list[tuple[Any, str, tuple[str, ...]]] = [
        (worker_manager.WorkerLoRAManager, "_load_adapter", ("lora_request",)),
        (worker_manager.WorkerLoRAManager, "list_adapters", ()),
        (worker_manager, "get_adapter_absolute_path", ("lora_path",)),
        (model_manager.LoRAModelManager, "activate_adapter", ("lora_id",)),
    ]
    found = []
    for owner, name, names in expected:
        function = getattr(owner, name, None)
        parameters = tuple(p for p in inspect.signature(function).parameters if p != "self") if function else None
        if parameters != names:
            found.append(f"{owner.__name__}.{name} takes {parameters}, not {names}")
    return found


def on_adapters(config: Any, reads: ReadReaction, not_read: IdReaction, copied: IdReaction) -> None:
    """In a worker: calls ``reads`` before the engine of this configuration reads an adapter, ``not_read`` if it could
    not use that, and ``copied`` after it has copied one to where the model reads it."""
    from vllm.lora import model_manager, worker_manager

    _watchers.append(_Watcher(config.lora_config, reads, not_read, copied))
    put_around(worker_manager, "get_adapter_absolute_path", _around_path)
    put_around(worker_manager.WorkerLoRAManager, "_load_adapter", _around_load)
    put_around(model_manager.LoRAModelManager, "activate_adapter", _around_activate)


def _around_load(plain: Any) -> Any:
    @functools.wraps(plain)
    def load_adapter(self: Any, lora_request: Any) -> Any:
        _loading.append((self, lora_request))
        try:
            return plain(self, lora_request)
        except BaseException:
            for watcher in _watchers:
                if watcher.config is self.lora_config:
                    watcher.not_read(int(lora_request.lora_int_id))
            raise
        finally:
            _loading.pop()

    return load_adapter


def _around_path(plain: Any) -> Any:
    @functools.wraps(plain)
    def get_adapter_absolute_path(lora_path: Any) -> Any:
        path = plain(lora_path)
        if _loading:
            manager, request = _loading[-1]
            there = None if lies_elsewhere(request) else str(path)
            for watcher in _watchers:
                if watcher.config is manager.lora_config:
                    watcher.reads(int(request.lora_int_id), there, manager.list_adapters)
        return path

    return get_adapter_absolute_path


def _around_activate(plain: Any) -> Any:
    @functools.wraps(plain)
    def activate_adapter(self: Any, lora_id: int) -> Any:
        done = plain(self, lora_id)
        if done:
            for watcher in _watchers:
                if watcher.config is self.lora_config:
                    watcher.copied(int(lora_id))
        return done

    return activate_adapter


# -- in the scheduler's process ----------------------------------------------------------------------------------


_askers: list[tuple[Any, Callable[[list[Any]], None]]] = []


def after_add_lora(connector: Any, react: Callable[[list[Any]], None]) -> None:
    """Calls ``react`` with what each worker says of its adapters after the connector's engine has loaded one ahead."""
    from vllm.v1.engine.core import EngineCore

    _askers.append((connector, react))
    put_around(EngineCore, "add_lora", _around_add)


def _around_add(plain: Any) -> Any:
    @functools.wraps(plain)
    def add_lora(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = plain(self, *args, **kwargs)
        mine = getattr(getattr(self, "scheduler", None), "connector", None)
        for asker, tell in _askers:
            if asker is mine:
                tell(_reports(self))
        return answer

    return add_lora


def _reports(core: Any) -> list[Any]:
    try:
        return list(core.model_executor.collective_rpc(adapters_report))
    except Exception:  # noqa: BLE001 - they will say so themselves with the next step
        return []


def adapters_report(_worker: Any) -> Any:
    """In a worker: what its connector has to say of its adapters."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().adapters_report()


def forget_adapters(connector: Any, copied: IdReaction) -> None:
    """Drops what a connector that was shut down has asked for."""
    _watchers[:] = [one for one in _watchers if one.copied != copied]
    _askers[:] = [one for one in _askers if one[0] is not connector]


def lies_elsewhere(lora: Any) -> bool:
    """Whether only an adapter's configuration lies at its path, and its weights in another folder (up to 0.31)."""
    return bool(getattr(lora, "tensorizer_config_dict", None))


def adapters_by_name_alone() -> bool:
    """Whether the engine's own prefix cache takes adapters of one name for one adapter, wherever they lie."""
    from vllm.v1.core import kv_cache_utils

    keys = getattr(kv_cache_utils, "_gen_lora_extra_hash_keys", None)
    if keys is None:
        return True
    lora = SimpleNamespace(lora_name="name", lora_path="path")
    return "path" not in str(keys(SimpleNamespace(lora_request=lora)))
