"""The compiled library beside numba: what a fresh process pays until its first blocks, and what calls cost then.

Run by hand: ``python -m bench.start``. Each round starts a process of each way by turns. ``--first-use`` adds the first
process after an installation, whose kernels numba compiles: a minute and more of CPU a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any, Final

from kvplug.shm import native
from kvplug.shm.segment import remove_pool

WAYS: Final = ("native", "numba")
POOL: Final = f"bench-start-{os.getpid()}"

USED: Final = """
import json, resource, sys, time
began = time.perf_counter()
import numpy
numpy_s = time.perf_counter() - began
def anonymous_mib():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
def cpu_s():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
numpy_mib, numpy_cpu_s = anonymous_mib(), cpu_s()
from kvplug import KvStore
with KvStore(sys.argv[1], "256mib", prefault=False) as store:
    block = numpy.ones(262144, numpy.uint8)
    key = bytes(range(32))
    store.put([key], [block])
    out = numpy.empty_like(block)
    assert store.get_into([key], [out])[0] == 0
    found = dict(begin_ms=(time.perf_counter() - began - numpy_s) * 1e3, cpu_s=cpu_s(),
                 beyond_numpy_cpu_s=cpu_s() - numpy_cpu_s, beyond_numpy_mib=anonymous_mib() - numpy_mib)
    if len(sys.argv) > 2:
        def timed(call, count, each):
            times = []
            for _ in range(count):
                at = time.perf_counter()
                for _ in range(each):
                    call()
                times.append((time.perf_counter() - at) / each * 1e6)
            times.sort()
            return times[len(times) // 2], times[0]
        keys = numpy.random.default_rng(1).integers(0, 256, (2048, 32), dtype=numpy.uint8)
        store.put(keys[:900], numpy.ones((900, 1024), numpy.uint8))
        outs, one = [out], [key]
        for name, call, count, each in (
            ("get_us", lambda: store.get_into(one, outs), 400, 5),
            ("exists_us", lambda: store.exists(keys), 200, 2),
            ("match_prefix_us", lambda: store.match_prefix(keys), 200, 2),
            ("exists_one_us", lambda: store.exists(one), 400, 20),
        ):
            found[name], found[name + "_least"] = timed(call, count, each)
print(json.dumps(found))
"""


def process(way: str, *arguments: str, cache: str | None = None) -> dict[str, float]:
    """What one fresh process of a way says of itself."""
    environment = {**os.environ, native.ENV: way} | ({"NUMBA_CACHE_DIR": cache} if cache else {})
    run = subprocess.run(
        [sys.executable, "-c", USED, POOL, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(run.stdout)
    return found


def stat_cpu_s(way: str) -> float:
    """User and system time of `kvplug stat` on a pool that is not there."""
    command = [sys.executable, "-c", "from kvplug.cli import main; main()", "stat", "--pool", f"{POOL}-none"]
    before = os.times()
    subprocess.run(command, env={**os.environ, native.ENV: way}, capture_output=True, check=False)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def main() -> None:
    """Print a table: both ways, and the first ÷ the second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--first-use", type=int, default=0, help="rounds of it")
    given = parser.parse_args()
    seen: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}

    def note(way: str, found: dict[str, float]) -> None:
        for name, value in found.items():
            seen[way].setdefault(name, []).append(value)

    process("numba")  # the cache is filled
    for _ in range(given.rounds):
        for way in WAYS:
            note(way, process(way))
            note(way, {"stat_cpu_s": stat_cpu_s(way)})
    for _ in range(3):
        for way in WAYS:
            note(way, {k: v for k, v in process(way, "calls").items() if "_us" in k})
    for _ in range(given.first_use):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as cache:
                note(way, {"first_use_cpu_s": process(way, cache=cache)["cpu_s"]})
    remove_pool(POOL)
    print_table(seen)


def print_table(seen: dict[str, dict[str, Any]]) -> None:
    """Medians; the least of three where a name says so."""
    print("| figure | native | numba | ÷ |\n|---|---|---|---|")
    for name in seen[WAYS[0]]:
        pick = min if name.endswith("_least") else statistics.median
        ours, theirs = (pick(seen[way][name]) for way in WAYS)
        print(f"| {name} | {ours:.4g} | {theirs:.4g} | {ours / theirs:.3f} |")


if __name__ == "__main__":
    main()
