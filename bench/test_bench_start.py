"""The compiled library beside numba: what a fresh process pays until its first blocks, and what calls cost then. And
how much longer an engine takes to start with kvplug.

Processes of both ways are started by turns. ``KVPLUG_KERNELS`` makes them go one way or the other.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import figures
from kvplug.shm import native
from kvplug.store import KvStore
from tests.kernels import LIBRARY_ONLY
from tests.lab.env import temporary_pool
from tests.lab.models import LLAMA, model_dir
from tests.sglang_lab.server import SglangServer
from tests.vllm_lab.engine import InProcess

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("native", "numba")
ROUNDS = 10
FIRST_USE_ROUNDS = 2
CALLS_ROUNDS = 9
ENGINE_ROUNDS = 4

pytestmark = pytest.mark.timeout(1800)

USED = """
import json, sys, time
began = time.perf_counter()
import numpy
numpy_s = time.perf_counter() - began
def anonymous_mib():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
numpy_mib = anonymous_mib()
from kvplug import KvStore
with KvStore(sys.argv[1], "256mib") as store:
    block = numpy.ones(262144, numpy.uint8)
    key = bytes(range(32))
    store.put([key], [block])
    out = numpy.empty_like(block)
    assert store.get_into([key], [out])[0] == 0
    found = dict(ready_ms=(time.perf_counter() - began - numpy_s) * 1e3, memory_mib=anonymous_mib() - numpy_mib)
    if len(sys.argv) > 2:
        def timed(call, count, each):
            times = []
            for _ in range(count):
                at = time.perf_counter()
                for _ in range(each):
                    call()
                times.append((time.perf_counter() - at) / each * 1e6)
            times.sort()
            return times[len(times) // 2]
        rng = numpy.random.default_rng(1)
        keys = rng.integers(0, 256, (2048, 32), dtype=numpy.uint8)
        small = numpy.ones((900, 1024), numpy.uint8)
        blocks = numpy.ones((64, 262144), numpy.uint8)
        many = rng.integers(0, 256, (64, 32), dtype=numpy.uint8)
        store.put(keys[:900], small)
        store.put(many, blocks)
        def put():
            store.remove(many)
            store.put(many, blocks)
        def hold():
            pinned = store.pin_batch(keys[:256])
            store.unpin(pinned.slots, pinned.gens)
        found |= dict(
            get_us=timed(lambda: store.get_into([key], [out]), 400, 5),
            exists_us=timed(lambda: store.exists(keys), 200, 2),
            match_us=timed(lambda: store.match_prefix(keys), 200, 2),
            get_many_us=timed(lambda: store.get_into(many, blocks), 40, 1),
            put_many_us=timed(put, 40, 1),
            pin_us=timed(hold, 200, 2),
            hold_us=float(numpy.median(store._pool.hold_times_ns())) / 1e3,
        )
print(json.dumps(found))
"""


@pytest.fixture
def keep(benchmark: Any) -> Callable[..., None]:
    """Records a figure of this file's part of the results."""

    def one(name: str, measured: float, *, rounds: int, beside: str = "") -> None:
        benchmark.extra_info[name] = round(measured, 4)
        figures.record("start", name, measured, rounds=rounds, beside=beside)

    return one


def plain() -> dict[str, str]:
    """The environment, in which Python keeps the bytecode of modules, as it does where a package is installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def process(way: str, pool: str, *arguments: str, cache: Path | None = None) -> dict[str, float]:
    """What one fresh process of a way says of itself, and ``cpu_s``, what all of it took."""
    environment = {**plain(), native.ENV: way, "KVPLUG_PREFAULT": "false"} | (
        {"NUMBA_CACHE_DIR": str(cache)} if cache else {}
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-c", USED, pool, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found: dict[str, float] = json.loads(run.stdout)
    return {**found, "cpu_s": cpu_s}


def by_turns(pool: str, rounds: int, *arguments: str) -> dict[str, dict[str, float]]:
    """Medians of each way's processes."""
    seen: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    process("numba", pool)  # what numba compiles is kept for the others
    for _ in range(rounds):
        for way in WAYS:
            seen[way].append(process(way, pool, *arguments))
    return {
        way: {name: statistics.median(one[name] for one in found) for name in found[0]} for way, found in seen.items()
    }


@LIBRARY_ONLY
def test_a_fresh_process(benchmark: Any, pool: str, keep: Callable[..., None]) -> None:
    seen: dict[str, dict[str, float]] = {}
    benchmark.pedantic(lambda: seen.update(by_turns(pool, ROUNDS)), rounds=1)
    ours, theirs = (seen[way] for way in WAYS)
    for figure, name, unit in (("start_ready", "ready_ms", "ms"), ("start_memory", "memory_mib", "MiB")):
        keep(
            figure,
            ours[name] / theirs[name],
            rounds=ROUNDS,
            beside=f"library {ours[name]:.3g} {unit}, numba {theirs[name]:.3g} {unit}",
        )


@LIBRARY_ONLY
def test_the_first_process_after_an_installation(
    benchmark: Any, pool: str, keep: Callable[..., None], tmp_path: Path
) -> None:
    seen: dict[str, list[float]] = {way: [] for way in WAYS}

    def both() -> None:
        for way in WAYS:
            cache = tmp_path / "cache"
            seen[way].append(process(way, pool, cache=cache)["cpu_s"])
            shutil.rmtree(cache, ignore_errors=True)

    benchmark.pedantic(both, rounds=FIRST_USE_ROUNDS)
    ours, theirs = (statistics.median(seen[way]) for way in WAYS)
    keep(
        "start_first_use",
        ours / theirs,
        rounds=FIRST_USE_ROUNDS,
        beside=f"library {ours:.2f} s, numba {theirs:.1f} s of CPU",
    )


CALLS = {
    "native_get": ("get_us", "µs"),
    "native_exists": ("exists_us", "µs"),
    "native_match": ("match_us", "µs"),
    "native_get_many": ("get_many_us", "µs"),
    "native_put_many": ("put_many_us", "µs"),
    "native_pin": ("pin_us", "µs"),
    "native_hold": ("hold_us", "µs"),
}


@LIBRARY_ONLY
def test_calls(benchmark: Any, pool: str, keep: Callable[..., None]) -> None:
    seen: dict[str, dict[str, float]] = {}
    benchmark.pedantic(lambda: seen.update(by_turns(pool, CALLS_ROUNDS, "calls")), rounds=1)
    ours, theirs = (seen[way] for way in WAYS)
    for figure, (name, unit) in CALLS.items():
        keep(
            figure,
            ours[name] / theirs[name],
            rounds=CALLS_ROUNDS,
            beside=f"library {ours[name]:.4g} {unit}, numba {theirs[name]:.4g} {unit}",
        )


@LIBRARY_ONLY
def test_the_command(benchmark: Any, pool: str, keep: Callable[..., None]) -> None:
    """``kvplug stat`` in a pipe, of a pool that is there, as from an installed package."""
    paths = os.pathsep.join((str(ROOT), str(Path(pytest.__file__).parents[1])))  # without an editable one's finder
    command = [sys.executable, "-S", "-c", "from kvplug.cli import main; main()", "stat", "--pool", pool]
    environment = {**plain(), native.ENV: "native", "PYTHONPATH": paths}
    times = []
    with KvStore(pool, "256mib"):

        def once() -> None:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, env=environment, capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

        benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=1)
    keep("stat_cpu", statistics.median(times[1:]), rounds=ROUNDS)


def fresh(cache: Path) -> dict[str, str | None]:
    """Of an engine: nothing that numba has compiled before, and bytecode as where packages are installed."""
    return {"NUMBA_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": None}


def start_of_vllm(pool: str | None, log: Path, cache: Path) -> float:
    """Seconds until an engine stands, with a cache of its own for whatever is compiled."""
    began = time.monotonic()
    with InProcess(
        model_dir(LLAMA), log, pool=pool, env={"NUMBA_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": None}
    ) as engine:
        engine.ready()
        return time.monotonic() - began


def start_of_sglang(pool: str | None, log: Path, cache: Path) -> float:
    began = time.monotonic()
    with SglangServer(
        LLAMA, log, pool=pool, cold=True, env={"NUMBA_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": None}
    ) as server:
        server.ready()
        return time.monotonic() - began


@LIBRARY_ONLY
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engines_first_start(benchmark: Any, engine: str, keep: Callable[..., None], tmp_path: Path) -> None:
    """In a container in which nothing has run: by turns with kvplug and without."""
    start = {"vllm": start_of_vllm, "sglang": start_of_sglang}[engine]
    took: dict[bool, list[float]] = {True: [], False: []}
    with temporary_pool("bench-start") as pool:

        def both() -> None:
            for on in (True, False) if len(took[True]) % 2 else (False, True):
                cache = tmp_path / f"cache-{len(took[True])}-{on}"
                took[on].append(start(pool if on else None, tmp_path / f"{engine}-{on}.log", cache))

        benchmark.pedantic(both, rounds=ENGINE_ROUNDS, warmup_rounds=1)
    ours, theirs = (statistics.median(took[on][1:]) for on in (True, False))
    keep(f"start_{engine}", ours / theirs, rounds=ENGINE_ROUNDS, beside=f"{ours:.2f} s against {theirs:.2f} s")
