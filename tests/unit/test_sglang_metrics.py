"""kvplug_* counters of an SGLang scheduler's process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY

from kvplug.adapters.sglang.metrics import COUNTERS, Publisher, _counters
from kvplug.threads import troubles
from tests.stopwatch import LONG_S

SERVER = {"enable_metrics": True, "served_model_name": "unit"}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """An engine has a process of its own; here vLLM's counters of these names come after SGLang's."""
    yield
    plain, *others = _counters()
    for collector in (*plain.values(), *others):
        REGISTRY.unregister(collector)
    _counters.cache_clear()


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"kvplug_{name}_total", {"model_name": "unit", **labels})


def test_counts_are_added_and_a_second_publisher_goes_on() -> None:
    """A storage backend that is taken away and attached again must not end by its metrics."""
    counts: Counter[str] = Counter()
    publisher = Publisher(counts, SERVER)
    try:
        assert all(value(name) == 0 for name in COUNTERS)
        counts.update(stored_pages=3, load_ns=2_000_000_000)
        counts["not_stored:no_space"] = 5
        counts["unnamed"] = 1
        deadline = time.monotonic() + LONG_S
        while value("stored_pages") != 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        counts["stored_pages"] += 1
    finally:
        publisher.close()
    assert value("stored_pages") == 4  # the last ones at the end
    assert value("copy_seconds", direction="load") == 2.0
    assert value("not_stored_pages", reason="no_space") == 5
    again = Publisher(Counter(stored_pages=10), SERVER)
    again.close()
    again.close()
    assert value("stored_pages") == 14


def test_without_metrics_there_is_no_thread() -> None:
    publisher = Publisher(Counter(), {"enable_metrics": False})
    assert publisher._thread is None
    publisher.close()


def test_an_error_that_nobody_foresaw_does_not_end_the_figures() -> None:
    before = troubles().errors.get("kvplug-metrics", 0)
    counts: Counter[str] = Counter()
    turns = []

    def gather() -> None:
        turns.append(1)
        if len(turns) == 1:
            raise ArithmeticError("one that nobody foresaw")
        counts["stored_pages"] = 1

    was = value("stored_pages") or 0
    publisher = Publisher(counts, SERVER, gather)
    try:
        deadline = time.monotonic() + 60
        while value("stored_pages") != was + 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        publisher.close()
    assert troubles().errors["kvplug-metrics"] == before + 1
