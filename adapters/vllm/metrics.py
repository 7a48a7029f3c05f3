"""kvplug's counters on vLLM's /metrics.

Counts are gathered in the scheduler's process (workers send theirs along with each step's output), travel with vLLM's
own statistics to the process that serves /metrics, and are added to Prometheus counters there.

Prometheus' registry is one for a process. When another engine begins in it, vLLM takes its own collectors out of the
registry and makes new ones, so that /metrics shows the engine that began last and never a sum of two; kvplug's do the
same.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY, Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.logger import init_logger

logger = init_logger("vllm.kvplug")
COUNTERS: dict[str, tuple[str, str]] = {
    "lookups": ("lookups", "Requests that were looked up in the pool."),
    "lookup_tokens": ("lookup_tokens", "Tokens that were looked up in the pool."),
    "hit_tokens": ("hit_tokens", "Tokens that the pool gave or began to give."),
    "loaded_blocks": ("loaded_blocks", "Block parts copied from the pool into the engine's cache."),
    "loaded_bytes": ("loaded_bytes", "Bytes copied from the pool into the engine's cache."),
    "stored_blocks": ("stored_blocks", "Blocks sealed in the pool by this engine."),
    "stored_bytes": ("stored_bytes", "Bytes copied from the engine's cache into the pool."),
    "blocks_present": ("blocks_present", "Full blocks that were in the pool already and needed no storing."),
    "load_failures": ("load_failures", "Loads that failed; their tokens were computed instead."),
    "corrupt_blocks": ("corrupt_blocks", "Blocks whose checksum was wrong when they were read; removed from the pool."),
    "load_errors": ("load_errors", "Errors inside a load."),
    "store_errors": ("store_errors", "Errors inside a store."),
    "hook_errors": ("hook_errors", "Errors inside kvplug that the engine was shielded from."),
    "offers_expired": ("offers_expired", "Hits that the engine did not take up in time."),
    "requests_refused": ("requests_refused", "Requests whose contents could not be identified."),
    "steps_without_room": (
        "steps_without_room",
        "Steps with full blocks after which nothing was stored: too many are held.",
    ),
    "seals_queued": ("seals_queued", "Seals that had to wait for a busy pool lock."),
    "weight_changes": ("weight_changes", "Changes of weights in the living engine."),
    "weights_known_again": (
        "weights_known_again",
        "Times that changed weights were known by content again, so that this engine shares once more.",
    ),
    "fetches": ("fetches", "Fetches begun from another host."),
    "fetched_blocks": ("fetched_blocks", "Blocks that came from other hosts."),
    "fetched_bytes": ("fetched_bytes", "Bytes that came from other hosts."),
    "fetched_tokens": ("fetched_tokens", "Tokens by which hits have grown with what came from other hosts."),
    "fetch_misses": ("fetch_misses", "Prefixes of which no other host had more."),
    "fetch_timeouts": ("fetch_timeouts", "Fetches that their deadline ended."),
    "fetch_not_worth_it": ("fetch_not_worth_it", "Prefixes that were computed because that is faster than fetching."),
    "fetch_no_room": ("fetch_no_room", "Fetches that ended because the pool had no room."),
    "fetch_errors": ("fetch_errors", "Errors inside a fetch."),
    "rotations": ("rotations", "Times that this engine's namespace was rotated by a cache reset."),
}
NOT_STORED = "not_stored:"
_registered: list[Any] = []
"""Collectors of the engine that began last in this process."""
SECONDS = {"load_ns": "load", "store_ns": "store", "fetch_ns": "fetch"}


@dataclass
class KvplugStats(KVConnectorStats):
    """Counts since the last report: name to number."""

    def reset(self) -> None:
        """Forgets everything."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another report to this one."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's periodic log line."""
        return {f"kvplug_{name}": value for name, value in sorted(self.data.items()) if not name.endswith("_ns")}

    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        return not self.data


class KvplugPromMetrics(KVConnectorPromMetrics):
    """kvplug_* counters, one child per engine. Those of an engine that began earlier in this process make way."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _unregister()
        self._failed = False

        def make(**arguments: Any) -> Any:
            collector = metric_types[Counter](**arguments)
            _registered.append(collector)
            return collector

        self._plain = {
            name: make(name=f"kvplug_{metric}", documentation=text, labelnames=labelnames)
            for name, (metric, text) in COUNTERS.items()
        }
        self._not_stored = make(
            name="kvplug_not_stored_blocks",
            documentation="Full blocks that were not stored, by reason.",
            labelnames=[*labelnames, "reason"],
        )
        self._seconds = make(
            name="kvplug_copy_seconds", documentation="Time spent in copies.", labelnames=[*labelnames, "direction"]
        )
        for labels in per_engine_labelvalues.values():
            for counter in self._plain.values():
                counter.labels(*labels)  # present, with 0, from the start

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds a report's numbers. An error is said once, and costs the report."""
        try:
            self._observe(transfer_stats_data, self.per_engine_labelvalues[engine_idx])
        except Exception:
            if not self._failed:
                logger.exception("kvplug: figures of engine %s are missing on /metrics", engine_idx)
            self._failed = True

    def _observe(self, counts: dict[str, Any], labels: Any) -> None:
        for name, value in counts.items():
            if value <= 0:
                continue
            if name in self._plain:
                self._plain[name].labels(*labels).inc(value)
            elif name.startswith(NOT_STORED):
                self._not_stored.labels(*labels, name.removeprefix(NOT_STORED)).inc(value)
            elif name in SECONDS:
                self._seconds.labels(*labels, SECONDS[name]).inc(value / 1e9)


def _unregister() -> None:
    """Takes what an earlier engine of this process has registered out of the registry."""
    while _registered:
        with contextlib.suppress(KeyError):  # somebody else has emptied the registry, or it is not Prometheus' own
            REGISTRY.unregister(_registered.pop())
