"""kvplug's counters in a process in which more than one vLLM engine begins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

pytest.importorskip("vllm")

from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from kvplug.adapters.vllm.connector import KvplugConnector
from kvplug.adapters.vllm.metrics import KvplugPromMetrics

TYPES = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
LABELS = {"model_name": "m", "engine": "0"}


def begin(engines: int = 1) -> KvplugPromMetrics:
    """As PrometheusStatLogger does it."""
    unregister_vllm_metrics()
    config: Any = SimpleNamespace(kv_transfer_config=None)
    made = KvplugConnector.build_prom_metrics(config, TYPES, list(LABELS), {i: ["m", str(i)] for i in range(engines)})
    assert made is not None
    return made


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"kvplug_{name}_total", {**LABELS, **labels})


def test_a_second_engine_in_a_process_begins_and_is_not_mixed_up_with_the_first() -> None:
    first = begin()
    first.observe({"hit_tokens": 5, "not_stored:full": 1, "load_ns": 10**9})
    assert value("hit_tokens") == 5
    second = begin()
    assert value("hit_tokens") == 0
    second.observe({"hit_tokens": 2})
    first.observe({"hit_tokens": 100, "not_stored:full": 7})
    assert value("hit_tokens") == 2
    assert value("not_stored_blocks", reason="full") is None


def test_engines_of_one_server_have_a_label_each() -> None:
    both = begin(engines=2)
    both.observe({"hit_tokens": 1}, 0)
    both.observe({"hit_tokens": 2}, 1)
    assert (value("hit_tokens"), value("hit_tokens", engine="1")) == (1, 2)


def test_counters_that_cannot_be_made_or_counted_end_no_engine(caplog: pytest.LogCaptureFixture) -> None:
    begin().observe({"hit_tokens": 1}, engine_idx=7)
    begin().observe({"hit_tokens": "many"})
    theirs = Counter("kvplug_lookups_of_somebody_else", "Nothing.")
    try:
        unregister_vllm_metrics()
        config: Any = SimpleNamespace(kv_transfer_config=None)

        def taken(**arguments: Any) -> Any:
            return Counter("kvplug_lookups_of_somebody_else", "Nothing.")

        types = {**TYPES, Counter: taken}
        assert KvplugConnector.build_prom_metrics(config, types, list(LABELS), {0: ["m", "0"]}) is None
    finally:
        REGISTRY.unregister(theirs)
    assert begin().per_engine_labelvalues == {0: ["m", "0"]}
