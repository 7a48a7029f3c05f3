"""How an engine begins with kvplug: the workers open the session and tell their layout, the scheduler joins.

The engine's first worker creates or attaches the pool and opens the session; every other worker of the engine, on the
same host, joins it while caches are set up; the scheduler joins when it gets the workers' layouts. So everybody who
may ever write a slot is attached before the first slot is reserved.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvplug import config as configuration
from kvplug.adapters.devices import device_of, for_device
from kvplug.adapters.vllm import compat, compat_adapters, namespace, plugin
from kvplug.adapters.vllm.adapters import HeldAdapters
from kvplug.adapters.vllm.jobs import Rank, RankLayout
from kvplug.adapters.vllm.layout import group_bytes
from kvplug.adapters.vllm.llvmlite_handle import shield_compiled_modules
from kvplug.adapters.vllm.scheduler import SchedulerSide
from kvplug.adapters.vllm.started import PROCESS_STARTED_NS, STARTED_KEY
from kvplug.adapters.vllm.worker import WorkerSide
from kvplug.errors import KvplugError, PoolError, UnsupportedEngineError
from kvplug.store import KvStore

shield_compiled_modules()

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class SchedulerStart:
    """The scheduler's side before the workers have told their layouts: identifying the weights has begun."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._vllm_config = vllm_config
        self._config = configuration.load()
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._since_ns = extra.get(STARTED_KEY, PROCESS_STARTED_NS)
        self._probe = namespace.weights_probe(vllm_config, self._config, self._since_ns)

    def begin(
        self, kv_cache_config: Any, layouts: dict[Rank, RankLayout], say: Callable[[str], None]
    ) -> SchedulerSide | None:
        """The scheduler's side at work, or None after a line that says why not."""
        try:
            return SchedulerSide(
                self._vllm_config, kv_cache_config, self._config, self._probe, layouts, say, self._since_ns
            )
        except KvplugError as error:
            self._probe.stop()
            say(f"kvplug: OFF: {error}")
            return None


def worker_start(
    vllm_config: VllmConfig, kv_cache_config: Any, caches: dict[str, Any], warn: Callable[[str], None]
) -> tuple[RankLayout, WorkerSide | None]:
    """A worker's layout and its side at work; without the latter, the layout says why.

    All of an engine's workers call this together, and each comes to its end whatever goes wrong in one of them.
    """
    opened: list[KvStore] = []

    def open_session() -> tuple[str, str, str | None]:
        """(host, token, refusal) of the engine's first worker."""
        try:
            store = KvStore(config=configuration.load())
            opened.append(store)
            return _host(), store.token, None
        except KvplugError as error:
            return "", "", str(error)
        except Exception as error:  # noqa: BLE001 - the other workers wait for an answer
            return "", "", f"{type(error).__name__}: {error}"

    host, token, refusal = compat.from_first_rank(open_session)
    rank = compat.ranks()
    try:
        if refusal is not None:
            raise PoolError(refusal)
        if host != _host():
            raise UnsupportedEngineError("the engine's workers are on several hosts")
        store = opened[0] if opened else KvStore.join(token, config=configuration.load())
        opened[:] = [store]
        reason = plugin.unsupported() or plugin.against(vllm_config)
        if reason is None and vllm_config.lora_config is not None:
            reason = "; ".join(compat_adapters.adapter_problems()) or None
        if reason is not None:  # a user's own configuration did not go through the plugin
            raise UnsupportedEngineError(reason)
        rules = compat.group_rules(kv_cache_config)
        views = {name: compat.manager_blocks(cache, kv_cache_config.num_blocks) for name, cache in caches.items()}
        groups = [group_bytes(group.layer_names, views) for group in kv_cache_config.kv_cache_groups]
        kind, isa = compat.device_facts(vllm_config)
        layout = RankLayout(
            rank=rank,
            token=token,
            refusal=None,
            groups=tuple(group.pages for group in groups),
            device=kind,
            isa=isa,
            backends=compat.attention_backends(vllm_config),
        )
        assert len(rules) == len(groups)
        device = for_device(device_of(caches.values()) if caches else kind, store, [group.runs for group in groups])
        if device.describe():
            warn(f"kvplug: {device.describe()}")
        side = WorkerSide(store, device, groups, rank, warn)
        if vllm_config.lora_config is not None:
            side.adapters = HeldAdapters(rank)
    except Exception as error:  # noqa: BLE001 - the engine must start; the scheduler's side says why kvplug is off
        for store in opened:
            store.close()
        return RankLayout(rank, None, str(error) or type(error).__name__), None
    return layout, side


def _host() -> str:
    """Something that differs between hosts, and between containers that do not share /dev/shm well enough."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {socket.gethostname()}"
    except OSError:
        return socket.gethostname()
