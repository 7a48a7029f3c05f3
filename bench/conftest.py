"""Pools that go away, workers that end, and the table of figures behind pytest-benchmark's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench import figures
from bench.harness import CacheFlusher, Worker, pool_name, remove_pool

KEY_BENCH_PREFIX = "test_step_keys["
KEY_BENCH_INCREMENTAL = "16-tokens-at-a-time]"


@pytest.fixture
def pool() -> Iterator[str]:
    """The name of a pool of this test's own, removed afterwards."""
    name = pool_name()
    yield name
    remove_pool(name)


@pytest.fixture
def workers() -> Iterator[Callable[[int], list[Worker]]]:
    """Starts processes; they end with the test."""
    started: list[Worker] = []

    def start(n: int) -> list[Worker]:
        new = [Worker() for _ in range(n)]
        started.extend(new)
        return new

    yield start
    for w in started:
        w.stop()


@pytest.fixture(scope="session")
def flush_caches() -> CacheFlusher:
    return CacheFlusher()


@pytest.fixture
def figure(benchmark: Any) -> Callable[..., None]:
    """Records a figure: ``figure(name, measured, rounds=…, beside=…, note=…)``."""

    def keep(name: str, measured: float, *, rounds: int, beside: str = "", note: str = "") -> None:
        benchmark.extra_info[name] = round(measured, 4)
        figures.record("pool", name, measured, rounds=rounds, beside=beside, note=note)

    return keep


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """The key benchmark's figure, taken from where it leaves it."""
    outcome = yield
    report = outcome.get_result()
    if call.when == "call" and report.passed and item.name == KEY_BENCH_PREFIX + KEY_BENCH_INCREMENTAL:
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        if benchmark is not None and "us_per_16_tokens" in benchmark.extra_info:
            figures.record(
                "pool", "keys", benchmark.extra_info["us_per_16_tokens"], rounds=benchmark.stats.stats.rounds
            )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """All figures, those of earlier runs included, behind everything else."""
    from rich.console import Console

    if figures.RESULTS.exists():
        figures.write()
        terminalreporter.write_line("")
        figures.print_table(Console(file=terminalreporter._tw._file, width=max(120, terminalreporter._tw.fullwidth)))
