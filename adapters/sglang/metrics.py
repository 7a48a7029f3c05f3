"""kvplug_* on SGLang's /metrics: SGLang's processes write their metrics into files that its server adds up."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from kvplug.adapters.sglang import compat
from kvplug.threads import LivingThread

INTERVAL_S = 1.0
COUNTERS = {
    "lookups": "Times that the pool was asked for a request's prefix.",
    "hit_pages": "Pages found in the pool, on this rank.",
    "loaded_pages": "Pages copied out of the pool.",
    "loaded_bytes": "Bytes copied out of the pool.",
    "stored_pages": "Pages copied into the pool.",
    "stored_bytes": "Bytes copied into the pool.",
    "already_stored_pages": "Pages that were in the pool when they were to be stored.",
    "corrupt_pages": "Pages whose checksum was wrong; they were dropped.",
    "load_failures": "Loads that did not bring what they should.",
    "pins_swept": "Promised pages released because SGLang had forgotten the request.",
    "weight_changes": "Changes of weights in the living engine.",
    "weights_known_again": "Times that weights which were read again were identified.",
    "rotations": "Times that this engine's pages so far were hidden from it.",
    "errors": "Errors that were kept from the engine.",
    "fetches": "Fetches begun from another host.",
    "fetched_blocks": "Pages that came from other hosts.",
    "fetched_bytes": "Bytes that came from other hosts.",
    "fetched_tokens": "Tokens by which hits have grown with what came from other hosts.",
    "fetch_misses": "Prompts of which no other host had more.",
    "fetch_timeouts": "Fetches that their deadline ended.",
    "fetch_not_worth_it": "Prompts that were computed because that is faster than fetching.",
    "fetch_no_room": "Fetches that ended because the pool had no room.",
    "fetch_errors": "Errors inside a fetch.",
}
NOT_STORED = "not_stored:"
"""Counts of this prefix: pages that were not stored, by reason."""
SECONDS = {"load_ns": "load", "store_ns": "store", "fetch_ns": "fetch"}


@functools.cache
def _counters() -> tuple[dict[str, Any], Any, Any]:
    """This process's Prometheus counters: made once, also where a storage backend is taken away and comes again."""
    from prometheus_client import Counter as Prometheus

    plain = {name: Prometheus(f"kvplug_{name}", text, ["model_name"]) for name, text in COUNTERS.items()}
    reasons = Prometheus("kvplug_not_stored_pages", "Pages that were not stored, by reason.", ["model_name", "reason"])
    seconds = Prometheus("kvplug_copy_seconds", "Time spent in copies.", ["model_name", "direction"])
    return plain, reasons, seconds


class Publisher:
    """Adds what was counted since the last time to Prometheus counters, once a second, on a thread of its own."""

    def __init__(self, counts: Counter[str], server: dict[str, Any], gather: Callable[[], None] | None = None) -> None:
        """``gather``: called before each time, to bring ``counts`` up to date."""
        self._counts = counts
        self._gather = gather
        self._told: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread: LivingThread | None = None
        if not compat.metrics_enabled(server):
            return
        # SGLang has named the folder of its processes' files by now; before that this import would go elsewhere.
        self._labels = (str(server.get("served_model_name") or server.get("model_path")),)
        self._plain, self._not_stored, self._seconds = _counters()
        for counter in self._plain.values():
            counter.labels(*self._labels)  # there, with 0, from the start
        self._thread = LivingThread("kvplug-metrics", self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.publish()

    def publish(self) -> None:
        """Adds what is new."""
        if self._gather is not None:
            self._gather()
        for name, value in list(self._counts.items()):
            new = value - self._told[name]
            if new <= 0:
                continue
            self._told[name] = value
            if name in self._plain:
                self._plain[name].labels(*self._labels).inc(new)
            elif name.startswith(NOT_STORED):
                self._not_stored.labels(*self._labels, name.removeprefix(NOT_STORED)).inc(new)
            elif name in SECONDS:
                self._seconds.labels(*self._labels, SECONDS[name]).inc(new / 1e9)

    def close(self) -> None:
        """Publishes what is left and ends the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.end(INTERVAL_S)
            self.publish()
            self._thread = None
